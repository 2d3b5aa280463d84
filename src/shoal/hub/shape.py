"""
A Hugging Face `config.json`, read into the values of our `Model` and written from them.

`config/families.py` says which model types belong to which family. A missing key has the default that transformers
gives it for that model type. Unsupported values are rejected by name; unknown keys are reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from shoal.config.families import FAMILIES, Family, ModelType
from shoal.config.options import Model
from shoal.errors import ModelError
from shoal.hub.any_shape import read_any_shape
from shoal.hub.find import find_model
from shoal.hub.folder import CONFIG, ModelFolder
from shoal.hub.values import Kind, kind_of_option, wrong_values

Json = Mapping[str, Any]


MODEL_TYPES: Final = {name: kind for family in FAMILIES.values() for name, kind in family.types.items()}
_FAMILY_OF: Final = {name: ours for ours, family in FAMILIES.items() for name in family.types}
_ROPE_KINDS: Final = {
    "rope_theta": kind_of_option("rope_theta"), "rope_scaling": Kind(dict), "rope_parameters": Kind(dict),
    "partial_rotary_factor": Kind(float), "original_max_position_embeddings": kind_of_option("rope_original_seq_len"),
}  # fmt: skip
_WINDOW_KINDS: Final = {
    "sliding_window": Kind(int, {"ge": 0}), "use_sliding_window": Kind(bool), "max_window_layers": Kind(int),
    "layer_types": Kind(list),
}  # fmt: skip
_LLAMA3: Final = {
    "low_freq_factor": "rope_low_freq_factor", "high_freq_factor": "rope_high_freq_factor",
    "original_max_position_embeddings": "rope_original_seq_len",
}  # fmt: skip
# Keys inside rope_scaling and rope_parameters.
_IN_ROPE_KINDS: Final = {
    "rope_theta": kind_of_option("rope_theta"), "rope_type": Kind(str), "type": Kind(str),
    "factor": kind_of_option("rope_factor"), "partial_rotary_factor": Kind(float),
    **{theirs: kind_of_option(ours) for theirs, ours in _LLAMA3.items()},
}  # fmt: skip
# Keys that do not affect the arithmetic: about tokens, files, and how other programs run the model.
_NEUTRAL: Final = {
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id",
    "sep_token_id", "decoder_start_token_id", "transformers_version", "torch_dtype", "dtype", "use_cache",
    "pretraining_tp", "model_type", "n_ctx", "is_encoder_decoder", "is_decoder", "output_attentions",
    "output_hidden_states", "return_dict", "id2label", "label2id", "prefix", "problem_type",
    "chunk_size_feed_forward", "finetuning_task", "task_specific_params", "tokenizer_class", "summary_type",
    "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
    "reorder_and_upcast_attn", "is_llama_config", "rope_interleaved", "transformers.js_config",
    "attn_implementation", "_attn_implementation",
}  # fmt: skip
_MAY_BE_NULL: Final = ("num_kv_heads", "head_dim", "ffn_dim")


@dataclass(frozen=True)
class Shape:
    """The content of a config: values of `Model`, and notes for the user."""

    values: dict[str, Any]
    # Size of the sliding window in tokens; None: no window. shoal implements no windows: a context must fit into it.
    window: int | None = None
    notes: tuple[str, ...] = ()


def read_shape(config: Json, where: str) -> Shape:
    """
    Return the shape in a `config.json`, which errors call `where`.

    Raises `ModelError`, which lists all such values, if values are invalid or unsupported.
    """
    kind = MODEL_TYPES.get(str(config.get("model_type")))
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{where} has no model_type, so its architecture is unknown; get that file again")
    if kind is None:
        raise ModelError(
            f"{where} is a {config['model_type']}; shoal implements {', '.join(MODEL_TYPES)}. "
            "Set model.family to hf to have transformers compute it"
        )
    name = _FAMILY_OF[config["model_type"]]
    family, given = FAMILIES[name], {**kind.defaults, **config}
    if wrong := [*_missing(kind, given), *_wrong(family, kind, given)]:
        lines = "\n".join(f"  {line}" for line in wrong)
        raise ModelError(
            f"{where} is not a valid config of a {config['model_type']}; correct it, or get it again:\n{lines}"
        )
    if refused := [*_refused(family, kind, given)]:
        lines = "\n".join(f"  {line}" for line in refused)
        raise ModelError(
            f"{where} needs features that shoal does not implement:\n{lines}\nSet model.family to hf to have transformers compute it"
        )
    values = {"family": name, **kind.always, **{ours: given[theirs] for theirs, ours in kind.keys.items()}}
    if family.rotary:
        values |= _read_rope(given)
    known = {*kind.keys, *kind.defaults, *kind.only, *kind.twins, *_other_kinds(family, kind), *_NEUTRAL}
    known.add("quantization_config")
    strange = sorted(set(config) - known)
    notes = (f"{where} has {', '.join(strange)}, which shoal does not know and ignores",) if strange else ()
    return Shape(values, _window(kind, given) if family.rotary else None, notes)


def may_differ(values: Json, key: str, given: Any) -> bool:
    """Return whether the user's value `given` may override the folder's value of our option `key`."""
    family = FAMILIES[values["family"]]
    if family.native:  # no weight depends on these; learned position embeddings have max_seq_len rows
        return key in ("dropout", "init_std") or (key == "max_seq_len" and family.rotary)
    # a transformers model can keep its several dropout rates or disable all; its context may be shorter
    return (key == "dropout" and given == 0) or (
        key == "max_seq_len" and isinstance(given, int) and given < values[key]
    )


def read_model(
    name: str, family: str | None = None, kept: Mapping[str, Path] = MappingProxyType({})
) -> tuple[Shape, str | None]:
    """
    Return the shape of the model `name` (a folder, or the name of a downloaded model), and its tokenizer's folder or None.

    family: the family that the user set; "hf" reads any config, other values and None read only configs of shoal's own
    families. kept: see `resolve`. Raises `ModelError` if the model is missing, broken or unsupported.
    """
    shape, tokenizer = read_folder(ModelFolder.open(find_model(name, kept.get(name))), family)
    # for a kept copy, return its name in data.tokenizer (the last name), so that the config of a resumed run does not change
    names = [other for other, folder in kept.items() if str(folder) == tokenizer]
    return shape, names[-1] if names else tokenizer


def read_folder(folder: ModelFolder, family: str | None = None) -> tuple[Shape, str | None]:
    """Return the same as `read_model`, for an open folder."""
    where = str(folder.path / CONFIG)
    shape = Shape(read_any_shape(folder.config, where)) if family == "hf" else read_shape(folder.config, where)
    has_tokenizer = any((folder.path / file).is_file() for file in ("tokenizer.json", "tokenizer.model"))
    return shape, str(folder.path) if has_tokenizer else None


def _missing(kind: ModelType, given: Json) -> Iterator[str]:
    missing = [k for k, ours in kind.keys.items() if given.get(k) is None and ours not in _MAY_BE_NULL]
    if missing:
        yield f"it lacks {', '.join(missing)}"


def _wrong(family: Family, kind: ModelType, given: Json) -> Iterator[str]:
    """Yield every invalid value. All keys are checked here, once, so that later code can trust them."""
    yield from wrong_values(given, {theirs: kind_of_option(ours) for theirs, ours in kind.keys.items()})
    yield from wrong_values(given, _other_kinds(family, kind))
    for key in ("rope_scaling", "rope_parameters"):
        if family.rotary and isinstance(given.get(key), dict):
            yield from wrong_values(given[key], _IN_ROPE_KINDS, f"{key}: ")


def _other_kinds(family: Family, kind: ModelType) -> dict[str, Kind]:
    """Return the valid values of the keys that do not map to a single option of ours."""
    drops = {key: kind_of_option("dropout") for key in kind.dropouts if key not in kind.keys}
    return {**drops, **_ROPE_KINDS, **_WINDOW_KINDS} if family.rotary else drops


def _refused(family: Family, kind: ModelType, given: Json) -> Iterator[str]:
    for key, supported in kind.only.items():
        if key in given and given[key] not in supported:
            yield f"{key} {given[key]} (shoal supports {supported[0]})"
    if given.get("quantization_config"):
        yield "quantization_config (shoal supports float32, bfloat16 and float16 weights)"
    if len({given[key] for key in kind.dropouts}) > 1:
        yield f"{', '.join(kind.dropouts)} that differ (shoal has one model.dropout)"
    for twin, key in kind.twins.items():
        if given.get(twin, given[key]) != given[key]:
            yield f"{twin} {given[twin]} beside {key} {given[key]} (the two must agree)"
    if family.rotary:
        yield from _refused_rope(given)


def _refused_rope(given: Json) -> Iterator[str]:
    rope = _rope(given)
    if rope["rope_type"] not in ("default", "llama3"):
        yield f"rope scaling of type {rope['rope_type']} (shoal supports default and llama3)"
    elif rope["rope_type"] == "llama3" and (lacking := [k for k in ("factor", *_LLAMA3) if rope.get(k) is None]):
        yield f"rope scaling of type llama3 without {', '.join(lacking)}"
    if float(rope.get("partial_rotary_factor") or given.get("partial_rotary_factor") or 1) != 1:
        yield "partial_rotary_factor (shoal rotates whole heads)"


def _rope(given: Json) -> dict[str, Any]:
    """Return the rope parameters of either spelling, with transformers' precedence."""
    rope = {"rope_theta": given.get("rope_theta") or 10_000.0}
    said = given.get("rope_scaling") or given.get("rope_parameters") or {}
    rope |= {key: value for key, value in said.items() if value is not None}
    rope.setdefault("rope_type", rope.get("type") or "default")
    if given.get("original_max_position_embeddings") is not None:
        rope["original_max_position_embeddings"] = given["original_max_position_embeddings"]
    return rope


def _read_rope(given: Json) -> dict[str, Any]:
    rope = _rope(given)
    values: dict[str, Any] = {"rope_theta": float(rope["rope_theta"])}
    if rope["rope_type"] == "llama3":
        values |= {"rope_factor": float(rope["factor"])}
        values |= {"rope_low_freq_factor": float(rope["low_freq_factor"])}
        values |= {"rope_high_freq_factor": float(rope["high_freq_factor"])}
        values |= {"rope_original_seq_len": int(rope["original_max_position_embeddings"])}
    return values


def _window(kind: ModelType, given: Json) -> int | None:
    """Return the sliding window in tokens, if any block has one. It has no effect on contexts up to that length."""
    switched_on = given.get(kind.window_switch, False) if kind.window_switch else True
    if given.get("layer_types") is not None:
        switched_on = switched_on and any(t != "full_attention" for t in given["layer_types"])
    return given["sliding_window"] or None if switched_on and "sliding_window" in given else None


def write_shape(shape: Model, base: Json | None = None) -> dict[str, Any]:
    """
    Return the `config.json` of a resolved shape. The caller adds dtype and token ids.

    base: the config that the model came with, whose other keys are kept; None for a model that was not started from a
    folder. Raises `ModelError` if no model type has this shape.
    """
    family = FAMILIES[shape.family]
    if not family.native:
        assert base is not None  # which defined its shape
        return dict(base)
    name = str(base["model_type"]) if base else _type_of(shape, family)
    config: dict[str, Any] = dict(base or {})
    # For llama, transformers rejects a width that the heads do not divide; for mistral, it accepts one
    if name == "llama" and shape.dim % shape.num_heads:
        foreign = MODEL_TYPES[name].only.keys() - MODEL_TYPES["mistral"].only.keys()
        name, config = "mistral", {key: value for key, value in config.items() if key not in foreign}
    kind = MODEL_TYPES[name]
    config |= {"model_type": name, "architectures": [kind.architecture]}
    derived = {theirs for theirs, ours in kind.keys.items() if ours in _MAY_BE_NULL and config.get(theirs, 0) is None}
    config |= {theirs: getattr(shape, ours) for theirs, ours in kind.keys.items() if theirs not in derived}
    config |= {**kind.written, **{key: getattr(shape, ours) for key, ours in kind.copied.items()}}
    if family.rotary and (base is None or "rope_parameters" not in base):
        config |= _write_rope(shape)
    if "sliding_window" in kind.defaults and kind.window_switch is None:
        config.setdefault("sliding_window", None)
    return config


def _type_of(shape: Model, family: Family) -> str:
    """Return the model type with this shape, for a model that was not started from a folder."""
    switches = {key for kind in family.types.values() for key in kind.always}
    for name, kind in family.types.items():
        if all(getattr(shape, key) == kind.always.get(key, False) for key in switches):
            return name
    # resolving rejects such a llama, but an older run's config is not resolved again
    given = ", ".join(f"model.{key} {str(getattr(shape, key)).lower()}" for key in sorted(switches))
    raise ModelError(
        f"cannot export: no model type of transformers is of model.family {shape.family}" + (given and f" with {given}")
    )


def _write_rope(shape: Model) -> dict[str, Any]:
    """Return the rope parameters in the older spelling, which every program reads."""
    scaling = None
    if shape.rope_factor is not None:
        scaling = {"rope_type": "llama3", "factor": shape.rope_factor}
        scaling |= {theirs: getattr(shape, ours) for theirs, ours in _LLAMA3.items()}
    return {"rope_theta": shape.rope_theta, "rope_scaling": scaling}
