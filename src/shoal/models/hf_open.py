"""
A folder's config.json -> transformers' model, its parameters on meta.

Buffers are made for real, on the CPU: rotary frequencies and the like are computed once, when a module is built, and
nothing in a file could bring them back.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from shoal.config.options import Model
from shoal.errors import ModelError
from shoal.hub.any_shape import drop_rates
from shoal.hub.find import find_model
from shoal.hub.folder import CONFIG, ModelFolder


def transformers_library() -> Any:
    """Transformers, imported, and quiet. Raises `ModelError` where it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise ModelError('model.family hf needs transformers; pip install "shoal[hf]" brings it') from error
    library: Any = transformers
    library.logging.set_verbosity_error()
    return library


def open_causal_lm(shape: Model) -> tuple[Any, dict[str, str]]:
    """
    The causal language model that `model.from` describes: parameters float32 on meta, buffers as they will be. And what
    its files call a parameter by another name than the model does.

    Raises `ModelError` where transformers does not know it, or it would need code that is not in transformers.
    """
    assert shape.from_ is not None
    transformers = transformers_library()
    folder = ModelFolder.open(find_model(shape.from_, shape.kept))
    config = _read_config(transformers, folder)
    if shape.dropout == 0:
        for key in drop_rates(config.to_dict()):
            setattr(config, key, 0.0)
    kind = transformers.AutoModelForCausalLM._model_mapping.get(type(config), None)
    if kind is None:
        raise ModelError(f"{folder.path} is a {config.model_type}, which transformers has no causal language model for")
    kind = kind[0] if isinstance(kind, tuple) else kind
    with _parameters_on_meta(), _saying_why(folder):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention_of(kind), trust_remote_code=False
        )
    _load_buffers(model, folder)
    return model.requires_grad_(True), _other_names(model, folder)


def attention_of(kind: Any) -> str:
    """Torch's own attention, which picks a fused kernel; products and a softmax where scores are capped."""
    return "sdpa" if getattr(kind, "_supports_sdpa", False) else "eager"


def faster_attention_of(kind: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """
    The FlashAttention library where it is installed and torch's own attention cannot do what the class asks for.

    It keeps packed documents apart in a batch of one row only: not for those.
    """
    installed: Any = importlib.import_module("transformers.utils").is_flash_attn_2_available
    fits = device.type == "cuda" and dtype != torch.float32 and getattr(kind, "_supports_flash_attn", False)
    if not fits or attention_of(kind) == "sdpa" or not installed():
        return None
    return "flash_attention_2"


def _read_config(transformers: Any, folder: ModelFolder) -> Any:
    """Never runs code of the folder's."""
    name = folder.config.get("model_type")
    if not isinstance(name, str) or name not in transformers.CONFIG_MAPPING:
        code = "; it comes with code of its own, which shoal never runs" if folder.config.get("auto_map") else ""
        raise ModelError(
            f"{folder.path} is a {name}, which transformers {transformers.__version__} does not know{code}"
        )
    with _saying_why(folder):
        return transformers.AutoConfig.from_pretrained(str(folder.path), trust_remote_code=False, local_files_only=True)


@contextlib.contextmanager
def _saying_why(folder: ModelFolder) -> Iterator[None]:
    """What transformers finds wrong with a config, as a `ModelError`: each of its models raises errors of its own."""
    try:
        yield
    except Exception as error:
        what = " ".join(str(error).split())
        raise ModelError(
            f"transformers cannot make a model of {folder.path / CONFIG} ({type(error).__name__}: {what}); correct it, or "
            "get it again"
        ) from error


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """
    Modules built here keep their parameters on meta, and their buffers where they are made.

    A parameter goes to meta when its module takes it, before anybody has written to it: its memory was never touched.
    """
    plain = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        plain(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = plain  # type: ignore[method-assign]


def _load_buffers(model: nn.Module, folder: ModelFolder) -> None:
    """What the files hold of buffers: constants of the model that no gradient changes."""
    from safetensors import safe_open

    kept = {name for name in model.state_dict() if name in dict(model.named_buffers())}
    if folder.is_kept and kept & set(folder.tensors):
        raise ModelError(
            f"{min(kept & set(folder.tensors))} is a constant that no checkpoint holds, and the folder which had it is gone; put "
            "the folder that model.from names back"
        )
    for name in sorted(kept & set(folder.tensors)):
        with safe_open(str(folder.tensors[name].file), framework="pt") as file:
            buffer = model.get_buffer(name)
            buffer.copy_(file.get_tensor(name).to(buffer.dtype))


def _other_names(model: Any, folder: ModelFolder) -> dict[str, str]:
    """
    A name in the files -> the parameter's: an older name that transformers knows, or one with or without the part
    before the base model's own names.
    """
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    prefix, found = f"{model.base_model_prefix}.", {}
    for name in set(folder.tensors) - known:
        renamed = _renamed(model, name)
        for ours in (renamed, prefix + renamed, renamed.removeprefix(prefix)):
            if ours in known:
                found[name] = ours
                break
    return found


def _renamed(model: Any, name: str) -> str:
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, apply_renamings
    except ImportError:  # a transformers that moved them: then a name is what it is
        return name
    changes = [change for change in get_model_conversion_mapping(model) if isinstance(change, WeightRenaming)]
    return str(apply_renamings(name, changes))
