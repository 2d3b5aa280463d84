"""
A Hugging Face `config.json` -> the values of our `Model`, and back.

Five model types say, in their own keys, what the families here are: `gpt2` is gpt2; `llama`, `mistral`, `qwen2` and
`qwen3` are llama. A key that is not there has the default of its type in transformers. What a config asks for and is
not built here is refused by name; a key that nobody here has heard of is told of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from shoal.config.options import Model
from shoal.errors import ModelError
from shoal.hub.any_shape import read_any_shape
from shoal.hub.find import called, find_model
from shoal.hub.folder import CONFIG, ModelFolder
from shoal.hub.values import Kind, kind_of_option, wrong_values

Json = Mapping[str, Any]


@dataclass(frozen=True)
class ModelType:
    """What one `model_type` means: the keys that are ours by another name, and what every model of it has."""

    family: str
    architecture: str  # the class of transformers that its checkpoints name
    keys: Mapping[str, str]  # Hugging Face's key -> ours
    defaults: Json  # of keys that are left out
    always: Json = field(default_factory=dict)  # ours, as every model of this type has them
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # key -> the values that are honoured
    switch: str | None = None  # the key that switches sliding windows on; None: a window that is there is on


_LLAMA_KEYS: Final = {
    "vocab_size": "vocab_size", "hidden_size": "dim", "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads", "head_dim": "head_dim",
    "intermediate_size": "ffn_dim", "max_position_embeddings": "max_seq_len", "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings", "initializer_range": "init_std",
}  # fmt: skip
_LLAMA_DEFAULTS: Final = {
    "num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "initializer_range": 0.02,
}  # fmt: skip
_LLAMA_ONLY: Final = {"hidden_act": ("silu", None), "attention_dropout": (0, None), "is_causal": (True,)}
_NO_BIASES: Final = {"attention_bias": (False, None), "mlp_bias": (False, None)}

MODEL_TYPES: Final[dict[str, ModelType]] = {
    "gpt2": ModelType(
        "gpt2",
        "GPT2LMHeadModel",
        {
            "vocab_size": "vocab_size", "n_embd": "dim", "n_layer": "num_layers", "n_head": "num_heads",
            "n_inner": "ffn_dim", "n_positions": "max_seq_len", "layer_norm_epsilon": "norm_eps",
            "tie_word_embeddings": "tie_embeddings", "initializer_range": "init_std", "resid_pdrop": "dropout",
        },
        {
            "n_inner": None, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "initializer_range": 0.02,
            "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1,
        },
        only={
            "activation_function": ("gelu_new", "gelu_pytorch_tanh", None), "scale_attn_weights": (True, None),
            "scale_attn_by_inverse_layer_idx": (False, None), "add_cross_attention": (False, None), "is_causal": (True,),
        },
    ),
    "llama": ModelType(
        "llama", "LlamaForCausalLM", _LLAMA_KEYS, {"max_position_embeddings": 2048, **_LLAMA_DEFAULTS},
        only={**_LLAMA_ONLY, **_NO_BIASES},
    ),
    "mistral": ModelType(
        "llama", "MistralForCausalLM", _LLAMA_KEYS,
        {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096,
         **{k: v for k, v in _LLAMA_DEFAULTS.items() if k != "num_key_value_heads"}},
        only=_LLAMA_ONLY,
    ),
    "qwen2": ModelType(
        "llama", "Qwen2ForCausalLM", _LLAMA_KEYS,
        {"max_position_embeddings": 32_768, "sliding_window": 4096, **_LLAMA_DEFAULTS},
        always={"qkv_bias": True}, only=_LLAMA_ONLY, switch="use_sliding_window",
    ),
    "qwen3": ModelType(
        "llama", "Qwen3ForCausalLM", _LLAMA_KEYS,
        {"max_position_embeddings": 32_768, "sliding_window": 4096, **_LLAMA_DEFAULTS, "head_dim": 128},
        always={"qk_norm": True}, only={**_LLAMA_ONLY, **_NO_BIASES}, switch="use_sliding_window",
    ),
}  # fmt: skip

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
_DROPS: Final = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
# Transformers takes these for the same attributes, whichever of the two comes last.
_GPT2_TWINS: Final = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
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
    given = {**kind.defaults, **config}
    if wrong := [*_missing(kind, given), *_wrong(kind, given)]:
        lines = "\n".join(f"  {line}" for line in wrong)
        raise ModelError(
            f"{where} is not the config of a {config['model_type']}; correct it, or get it again:\n{lines}"
        )
    if refused := [*_refused(kind, given)]:
        lines = "\n".join(f"  {line}" for line in refused)
        raise ModelError(
            f"{where} asks for what is not built here:\n{lines}\nSet model.family to hf to have transformers compute it"
        )
    values = {"family": kind.family, **kind.always, **{ours: given[theirs] for theirs, ours in kind.keys.items()}}
    if kind.family == "llama":
        values |= _read_rope(given)
    known = {*kind.keys, *kind.defaults, *kind.only, *_other_kinds(kind), *_NEUTRAL, "quantization_config"}
    known |= set(_GPT2_TWINS) if kind.family == "gpt2" else set()
    strange = sorted(set(config) - known)
    notes = (f"{where} says {', '.join(strange)}, which is not known here and changes nothing",) if strange else ()
    return Shape(values, _window(kind, given), notes)


# What may be said otherwise beside a folder: no weight depends on it.
FREE: Final = {"llama": ("dropout", "init_std", "max_seq_len"), "gpt2": ("dropout", "init_std")}


def may_differ(values: Json, key: str, given: Any) -> bool:
    """Whether `given` may stand for what a folder says of this key of ours."""
    if values["family"] != "hf":
        return key in FREE[values["family"]]
    # dropout has several rates there, which can be left or all be off; a context may be shorter
    return (key == "dropout" and given == 0) or (
        key == "max_seq_len" and isinstance(given, int) and given < values[key]
    )


def read_model(name: str, family: str | None = None) -> tuple[Shape, str | None]:
    """
    The shape of a folder, or of a model by its name; and its tokenizer's folder, if it has one.

    family: as it was given; "hf" reads any config, null those of the families here. Raises `ModelError`.
    """
    return read_folder(ModelFolder.open(find_model(name)), family)


def read_folder(folder: ModelFolder, family: str | None = None) -> tuple[Shape, str | None]:
    """`read_model` of a folder that is open."""
    where = str(folder.path / CONFIG)
    shape = Shape(read_any_shape(folder.config, where)) if family == "hf" else read_shape(folder.config, where)
    has_tokenizer = any((folder.path / file).is_file() for file in ("tokenizer.json", "tokenizer.model"))
    return shape, called(folder.path) if has_tokenizer else None


def _missing(kind: ModelType, given: Json) -> Iterator[str]:
    missing = [k for k, ours in kind.keys.items() if given.get(k) is None and ours not in _MAY_BE_NULL]
    if missing:
        yield f"it does not say {', '.join(missing)}"


def _wrong(kind: ModelType, given: Json) -> Iterator[str]:
    """What has no meaning at its key. Each is looked at here, once, so that all who read them may trust them."""
    yield from wrong_values(given, {theirs: kind_of_option(ours) for theirs, ours in kind.keys.items()})
    yield from wrong_values(given, _other_kinds(kind))
    for key in ("rope_scaling", "rope_parameters"):
        if kind.family == "llama" and isinstance(given.get(key), dict):
            yield from wrong_values(given[key], _IN_ROPE_KINDS, f"{key}: ")


def _other_kinds(kind: ModelType) -> dict[str, Kind]:
    """Of the keys that are not ours by another name."""
    if kind.family == "gpt2":
        return {key: kind_of_option("dropout") for key in _DROPS if key not in kind.keys}
    return {**_ROPE_KINDS, **_WINDOW_KINDS}


def _refused(kind: ModelType, given: Json) -> Iterator[str]:
    for key, honoured in kind.only.items():
        if key in given and given[key] not in honoured:
            yield f"{key} {given[key]} (here it is {honoured[0]})"
    if given.get("quantization_config"):
        yield "quantization_config (here weights are float32, bfloat16 or float16)"
    if kind.family == "gpt2":
        drops = {given[k] for k in _DROPS}
        if len(drops) > 1:
            yield "resid_pdrop, embd_pdrop and attn_pdrop that differ (here they are one model.dropout)"
        for twin, key in _GPT2_TWINS.items():
            if given.get(twin, given[key]) != given[key]:
                yield f"{twin} {given[twin]} beside {key} {given[key]} (they are one)"
        return
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
    if kind.family == "gpt2":
        return None
    switched_on = given.get(kind.switch, False) if kind.switch else True
    if given.get("layer_types") is not None:
        switched_on = switched_on and any(t != "full_attention" for t in given["layer_types"])
    return given["sliding_window"] or None if switched_on and "sliding_window" in given else None


def write_shape(shape: Model, base: Json | None = None) -> dict[str, Any]:
    """
    The `config.json` of a resolved shape, without dtype and token ids.

    base: the config that the model came with; what it says and we do not is kept. Raises `ModelError` where no
    type of model has this shape.
    """
    if shape.family == "hf":
        assert base is not None  # its shape came from one
        return dict(base)
    name = str(base["model_type"]) if base else _type_of(shape)
    config: dict[str, Any] = dict(base or {})
    if name == "llama" and shape.dim % shape.num_heads:  # transformers refuses it there, and computes it here
        name = "mistral"
        config = {key: value for key, value in config.items() if key not in _NO_BIASES}
    kind = MODEL_TYPES[name]
    config |= {"model_type": name, "architectures": [kind.architecture]}
    derived = {theirs for theirs, ours in kind.keys.items() if ours in _MAY_BE_NULL and config.get(theirs, 0) is None}
    config |= {theirs: getattr(shape, ours) for theirs, ours in kind.keys.items() if theirs not in derived}
    if kind.family == "gpt2":
        return config | {
            "embd_pdrop": shape.dropout, "attn_pdrop": shape.dropout, "activation_function": "gelu_new",
            "n_ctx": shape.max_seq_len,  # what llama.cpp reads
        }  # fmt: skip
    config |= {"hidden_act": "silu", "attention_dropout": 0.0}
    if "attention_bias" in kind.only:
        config["attention_bias"] = False
    if base is None or "rope_parameters" not in base:
        config |= _write_rope(shape)
    if "sliding_window" in kind.defaults and kind.switch is None:
        config.setdefault("sliding_window", None)
    return config


def _type_of(shape: Model) -> str:
    """The type of model that has this shape, for one that came from none."""
    if shape.family == "gpt2":
        return "gpt2"
    if shape.qk_norm and shape.qkv_bias:  # a config that says so is rejected; an older run's is not read again
        raise ModelError("no type of model has both model.qk_norm and model.qkv_bias: this one cannot be exported")
    return "qwen3" if shape.qk_norm else "qwen2" if shape.qkv_bias else "llama"


def _write_rope(shape: Model) -> dict[str, Any]:
    """In the older spelling, which every program reads."""
    scaling = None
    if shape.rope_factor is not None:
        scaling = {"rope_type": "llama3", "factor": shape.rope_factor}
        scaling |= {theirs: getattr(shape, ours) for theirs, ours in _LLAMA3.items()}
    return {"rope_theta": shape.rope_theta, "rope_scaling": scaling}
