"""
A Hugging Face `config.json` -> the values of our `Model`, and back.

Five model types say, in their own keys, what the families here are: `gpt2` is gpt2; `llama`, `mistral`, `qwen2` and
`qwen3` are llama. A key that is not there has the default of its type in transformers. What a config asks for and is
not built here is refused by name; a key that nobody here has heard of is told of.
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
# Inside of rope_scaling, and of rope_parameters.
_IN_ROPE_KINDS: Final = {
    "rope_theta": kind_of_option("rope_theta"), "rope_type": Kind(str), "type": Kind(str),
    "factor": kind_of_option("rope_factor"), "partial_rotary_factor": Kind(float),
    **{theirs: kind_of_option(ours) for theirs, ours in _LLAMA3.items()},
}  # fmt: skip
# Keys that say nothing of the arithmetic: of tokens, of files, of how other programs run it.
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
    """What a config says: values of `Model`, and what a person should be told."""

    values: dict[str, Any]
    window: int | None = None  # tokens that a place may look back; beyond it another model would be needed
    notes: tuple[str, ...] = ()


def read_shape(config: Json, where: str) -> Shape:
    """
    The shape that a `config.json` says; `where` is what errors call it.

    Raises `ModelError` with all that cannot be honoured.
    """
    kind = MODEL_TYPES.get(str(config.get("model_type")))
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{where} does not say its model_type, so nobody can tell what it is; get that file again")
    if kind is None:
        raise ModelError(
            f"{where} is a {config['model_type']}; the families built here are {', '.join(MODEL_TYPES)}. "
            "Set model.family to hf to have transformers compute it"
        )
    name = _FAMILY_OF[config["model_type"]]
    family, given = FAMILIES[name], {**kind.defaults, **config}
    if wrong := [*_missing(kind, given), *_wrong(family, kind, given)]:
        lines = "\n".join(f"  {line}" for line in wrong)
        raise ModelError(
            f"{where} is not the config of a {config['model_type']}; correct it, or get it again:\n{lines}"
        )
    if refused := [*_refused(family, kind, given)]:
        lines = "\n".join(f"  {line}" for line in refused)
        raise ModelError(
            f"{where} asks for what is not built here:\n{lines}\nSet model.family to hf to have transformers compute it"
        )
    values = {"family": name, **kind.always, **{ours: given[theirs] for theirs, ours in kind.keys.items()}}
    if family.rotary:
        values |= _read_rope(given)
    known = {*kind.keys, *kind.defaults, *kind.only, *kind.twins, *_other_kinds(family, kind), *_NEUTRAL}
    known.add("quantization_config")
    strange = sorted(set(config) - known)
    notes = (f"{where} says {', '.join(strange)}, which is not known here and changes nothing",) if strange else ()
    return Shape(values, _window(kind, given) if family.rotary else None, notes)


def may_differ(values: Json, key: str, given: Any) -> bool:
    """Whether `given` may stand for what a folder says of this key of ours."""
    family = FAMILIES[values["family"]]
    if family.native:  # no weight depends on these; learned positions are as many as max_seq_len
        return key in ("dropout", "init_std") or (key == "max_seq_len" and family.rotary)
    # dropout has several rates there, which can be left or all be off; a context may be shorter
    return (key == "dropout" and given == 0) or (
        key == "max_seq_len" and isinstance(given, int) and given < values[key]
    )


def read_model(
    name: str, family: str | None = None, kept: Mapping[str, Path] = MappingProxyType({})
) -> tuple[Shape, str | None]:
    """
    The shape of a folder, or of a model by its name; and its tokenizer's folder, if it has one.

    family: as it was given; "hf" reads any config, null those of the families here. kept: as `resolve` takes it.
    Raises `ModelError`.
    """
    shape, tokenizer = read_folder(ModelFolder.open(find_model(name, kept.get(name))), family)
    # by the last name, data.tokenizer's own: the config of a resumed run does not change
    names = [other for other, folder in kept.items() if str(folder) == tokenizer]
    return shape, names[-1] if names else tokenizer


def read_folder(folder: ModelFolder, family: str | None = None) -> tuple[Shape, str | None]:
    """`read_model` of a folder that is open."""
    where = str(folder.path / CONFIG)
    shape = Shape(read_any_shape(folder.config, where)) if family == "hf" else read_shape(folder.config, where)
    has_tokenizer = any((folder.path / file).is_file() for file in ("tokenizer.json", "tokenizer.model"))
    return shape, str(folder.path) if has_tokenizer else None


def _missing(kind: ModelType, given: Json) -> Iterator[str]:
    missing = [k for k, ours in kind.keys.items() if given.get(k) is None and ours not in _MAY_BE_NULL]
    if missing:
        yield f"it does not say {', '.join(missing)}"


def _wrong(family: Family, kind: ModelType, given: Json) -> Iterator[str]:
    """What has no meaning at its key. Each is looked at here, once, so that all who read them may trust them."""
    yield from wrong_values(given, {theirs: kind_of_option(ours) for theirs, ours in kind.keys.items()})
    yield from wrong_values(given, _other_kinds(family, kind))
    for key in ("rope_scaling", "rope_parameters"):
        if family.rotary and isinstance(given.get(key), dict):
            yield from wrong_values(given[key], _IN_ROPE_KINDS, f"{key}: ")


def _other_kinds(family: Family, kind: ModelType) -> dict[str, Kind]:
    """Of the keys that are not ours by another name."""
    drops = {key: kind_of_option("dropout") for key in kind.dropouts if key not in kind.keys}
    return {**drops, **_ROPE_KINDS, **_WINDOW_KINDS} if family.rotary else drops


def _refused(family: Family, kind: ModelType, given: Json) -> Iterator[str]:
    for key, honoured in kind.only.items():
        if key in given and given[key] not in honoured:
            yield f"{key} {given[key]} (here it is {honoured[0]})"
    if given.get("quantization_config"):
        yield "quantization_config (here weights are float32, bfloat16 or float16)"
    if len({given[key] for key in kind.dropouts}) > 1:
        yield f"{', '.join(kind.dropouts)} that differ (here they are one model.dropout)"
    for twin, key in kind.twins.items():
        if given.get(twin, given[key]) != given[key]:
            yield f"{twin} {given[twin]} beside {key} {given[key]} (they are one)"
    if family.rotary:
        yield from _refused_rope(given)


def _refused_rope(given: Json) -> Iterator[str]:
    rope = _rope(given)
    if rope["rope_type"] not in ("default", "llama3"):
        yield f"rope scaling of type {rope['rope_type']} (here: default, llama3)"
    elif rope["rope_type"] == "llama3" and (lacking := [k for k in ("factor", *_LLAMA3) if rope.get(k) is None]):
        yield f"rope scaling of type llama3 without {', '.join(lacking)}"
    if float(rope.get("partial_rotary_factor") or given.get("partial_rotary_factor") or 1) != 1:
        yield "partial_rotary_factor (here all of a head turns)"


def _rope(given: Json) -> dict[str, Any]:
    """Either spelling, and what goes before what, as transformers has it."""
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
    """How far a place may look back where some block's attention is bounded; a context within it is not touched."""
    switched_on = given.get(kind.window_switch, False) if kind.window_switch else True
    if given.get("layer_types") is not None:
        switched_on = switched_on and any(t != "full_attention" for t in given["layer_types"])
    return given["sliding_window"] or None if switched_on and "sliding_window" in given else None


def write_shape(shape: Model, base: Json | None = None) -> dict[str, Any]:
    """
    The `config.json` of a resolved shape, without dtype and token ids.

    base: the config that the model came with; what it says and we do not is kept. Raises `ModelError` where no
    type of model has this shape.
    """
    family = FAMILIES[shape.family]
    if not family.native:
        assert base is not None  # its shape came from one
        return dict(base)
    name = str(base["model_type"]) if base else _type_of(shape, family)
    config: dict[str, Any] = dict(base or {})
    if name == "llama" and shape.dim % shape.num_heads:  # transformers refuses it there, and computes it here
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
    """The type of model that has this shape, for one that came from none."""
    switches = {key for kind in family.types.values() for key in kind.always}
    for name, kind in family.types.items():
        if all(getattr(shape, key) == kind.always.get(key, False) for key in switches):
            return name
    # a config that says so is rejected; an older run's is not read again
    raise ModelError("no type of model has both model.qk_norm and model.qkv_bias: this one cannot be exported")


def _write_rope(shape: Model) -> dict[str, Any]:
    """In the older spelling, which every program reads."""
    scaling = None
    if shape.rope_factor is not None:
        scaling = {"rope_type": "llama3", "factor": shape.rope_factor}
        scaling |= {theirs: getattr(shape, ours) for theirs, ours in _LLAMA3.items()}
    return {"rope_theta": shape.rope_theta, "rope_scaling": scaling}
