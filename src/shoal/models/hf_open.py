"""
Build transformers' model from a folder's config.json, with its parameters on meta.

Buffers are allocated on the CPU: modules compute rotary frequencies and the like once, when they are built, and no file
contains them.
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
    """Import transformers and silence its log. Raises `ModelError` if it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise ModelError('model.family hf needs transformers; install it with pip install "shoal[hf]"') from error
    library: Any = transformers
    library.logging.set_verbosity_error()
    return library


def open_causal_lm(shape: Model) -> tuple[Any, dict[str, str]]:
    """
    Return the causal language model of `model.from`, and the parameters' other names in its files.

    Parameters are float32 on meta, buffers have their values. Raises `ModelError` if transformers does not know the
    model, or it needs code that is not in transformers.
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
        raise ModelError(f"{folder.path} is a {config.model_type}, for which transformers has no causal language model")
    kind = kind[0] if isinstance(kind, tuple) else kind
    with _parameters_on_meta(), _saying_why(folder):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention_of(kind), trust_remote_code=False
        )
    _load_buffers(model, folder)
    return model.requires_grad_(True), _other_names(model, folder)


def attention_of(kind: Any) -> str:
    """Return "sdpa", torch's attention with fused kernels, or "eager" for classes that cap scores and so cannot use it."""
    return "sdpa" if getattr(kind, "_supports_sdpa", False) else "eager"


def faster_attention_of(kind: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """
    Return FlashAttention's name if it is installed and supports the class, and torch's own attention does not; else None.

    Also None on a CPU or in float32.

    Do not use it for packed documents: it separates documents only in batches of one row.
    """
    installed: Any = importlib.import_module("transformers.utils").is_flash_attn_2_available
    fits = device.type == "cuda" and dtype != torch.float32 and getattr(kind, "_supports_flash_attn", False)
    if not fits or attention_of(kind) == "sdpa" or not installed():
        return None
    return "flash_attention_2"


def _read_config(transformers: Any, folder: ModelFolder) -> Any:
    """Read the folder's config, without running code from the folder."""
    name = folder.config.get("model_type")
    if not isinstance(name, str) or name not in transformers.CONFIG_MAPPING:
        code = "; it comes with its own code, which shoal never runs" if folder.config.get("auto_map") else ""
        raise ModelError(
            f"{folder.path} is a {name}, which transformers {transformers.__version__} does not know{code}"
        )
    with _saying_why(folder):
        return transformers.AutoConfig.from_pretrained(str(folder.path), trust_remote_code=False, local_files_only=True)


@contextlib.contextmanager
def _saying_why(folder: ModelFolder) -> Iterator[None]:
    """Turn any error of transformers about a config into a `ModelError`: each of its models raises different errors."""
    try:
        yield
    except Exception as error:
        what = " ".join(str(error).split())
        raise ModelError(
            f"transformers cannot build a model from {folder.path / CONFIG} ({type(error).__name__}: {what}); correct it, "
            "or fetch it again"
        ) from error


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """
    Put parameters of modules built in this context on meta, and leave their buffers on their device.

    A parameter is replaced when its module registers it, before it is written: its memory pages are never touched.
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
    """Load the buffers that the files hold: constants of the model, which training does not change."""
    from safetensors import safe_open

    kept = {name for name in model.state_dict() if name in dict(model.named_buffers())}
    if folder.is_kept and kept & set(folder.tensors):
        raise ModelError(
            f"{min(kept & set(folder.tensors))} is a constant that no checkpoint holds, and the folder with it is gone; "
            "restore the folder that model.from names"
        )
    for name in sorted(kept & set(folder.tensors)):
        with safe_open(str(folder.tensors[name].file), framework="pt") as file:
            buffer = model.get_buffer(name)
            buffer.copy_(file.get_tensor(name).to(buffer.dtype))


def _other_names(model: Any, folder: ModelFolder) -> dict[str, str]:
    """
    Return a map from names in the files to parameter names, where they differ.

    A file may use older names that transformers knows, or have or lack the base model's prefix.
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
    except ImportError:  # another version of transformers moved them: do without renaming
        return name
    changes = [change for change in get_model_conversion_mapping(model) if isinstance(change, WeightRenaming)]
    return str(apply_renamings(name, changes))
