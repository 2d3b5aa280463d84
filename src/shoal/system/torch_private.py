"""
The tested versions of torch, and every private name of torch that shoal uses, by feature.

Any release may remove a private name. `require` turns a missing one into a message that names the feature. The tests check
this list against the installed torch, and find private names that are not in it. Imports torch only to look up a name.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from dataclasses import dataclass
from types import CodeType
from typing import Any, Final, Literal

from shoal.errors import LaunchError

# `make test-torch VERSION=...` passed with each. docs/SETUP.md has the results, pyproject.toml the range.
TESTED: Final = ("2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0")

Feature = Literal[
    "processes",
    "train",
    "compile",
    "selective",
    "ring",
    "v_schedule",
    "bitwise_shards",
    "hf",
    "products",
    "kernel",
    "timeouts",
    "memory_snapshot",
    "trace",
]


@dataclass(frozen=True)
class Private:
    """
    The private names that one feature needs.

    names: each as "module:object.attribute". instead: advice on what works without them. seen: the tested versions of torch
    that have them.
    """

    feature: str
    names: tuple[str, ...]
    instead: str
    optional: bool = False  # the code checks for them and works without
    seen: tuple[str, ...] = TESTED


def _in(place: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{place}{name}" for name in names)


_RING = "torch.distributed.tensor.experimental._context_parallel._attention:"
_ATTENTION = "torch:ops.aten._scaled_dot_product_"
_AGENT = "torch.distributed.elastic.agent.server.local_elastic_agent:LocalElasticAgent."
_COMPILER = "torch._dynamo.callback:"
_RENDEZVOUS = "torch.distributed.elastic.rendezvous.dynamic_rendezvous:"

PRIVATE: Final[dict[Feature, Private]] = {
    "processes": Private(
        "starting and restarting processes",
        (
            *_in(_AGENT, "_rendezvous", "_start_workers", "_monitor_workers", "_stop_workers"),
            *_in(_AGENT, "_pcontext", "_remaining_restarts"),
            "torch.distributed.elastic.multiprocessing.api:SubprocessContext.subprocess_handlers",
            "torch.distributed.elastic.multiprocessing.subprocess_handler:SubprocessHandler.proc",
            *_in(f"{_RENDEZVOUS}DynamicRendezvousHandler.", "_state_holder", "_this_node", "_stop_heartbeats"),
            *_in(_RENDEZVOUS, "DynamicRendezvousHandler._op_executor", "_RendezvousExitOp", "_RendezvousOpExecutor.run"),
            *_in(f"{_RENDEZVOUS}_RendezvousState.", "closed", "complete", "participants"),
            f"{_RENDEZVOUS}_RendezvousStateHolder.state",
        ),
        "start the same command with torchrun",
    ),
    "train": Private("training", ("torch:_foreach_mul_", "torch:_foreach_add_"), ""),
    "compile": Private(
        "train.compile",
        (
            "torch._functorch.config:activation_memory_budget", "torch._inductor.config:emulate_precision_casts",
            *_in(f"{_COMPILER}callback_handler.", "register_start_callback", "register_end_callback"),
            *_in(f"{_COMPILER}callback_handler.", "remove_start_callback", "remove_end_callback"),
            f"{_COMPILER}CallbackArgs",
        ),
        "set train.compile to false",
    ),
    "selective": Private(
        "train.activation_checkpointing selective",
        _in(
            _ATTENTION, "flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention"
        ),
        "set train.activation_checkpointing to full",
    ),
    "ring": Private(
        "parallel.cp_method ring",
        (
            *_in(_RING, "_templated_ring_attention", "_templated_ring_attention_backward"),
            *_in(_RING, "_cp_options.rotate_method", "_cp_options.enable_load_balance", "_RotateMethod.ALL_TO_ALL"),
            *_in(_ATTENTION, "flash_attention", "flash_attention_backward"),
            *_in(_ATTENTION, "flash_attention_for_cpu", "flash_attention_for_cpu_backward"),
        ),
        "set parallel.cp_method to allgather or ulysses",
    ),
    "v_schedule": Private(
        "parallel.pp_schedule zbv and dualpipev",
        ("torch.distributed.pipelining:PipelineStage._get_init_p2p_neighbors_ops",),
        "set parallel.pp_schedule to interleaved_1f1b",
        optional=True,  # overridden for 2.11; only torch's own code calls it
        seen=TESTED[:-1],
    ),
    "bitwise_shards": Private(
        "train.repro bitwise with parallel.dp_shard",
        ("torch.distributed.fsdp:FSDPModule.set_custom_reduce_scatter",),
        "set parallel.dp_shard to 1, or train.repro to fast",
    ),
    "hf": Private(
        "model.family hf",
        _in("torch.nn:Module.", "_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"),
        "set model.family to one of shoal's own",
    ),
    "products": Private("float32 products by oneDNN on AMD's CPUs", ("torch:ops.mkldnn._linear_pointwise",), "", optional=True),
    "kernel": Private("the line that names the attention kernel", ("torch:_fused_sdp_choice",), "", optional=True),
    "timeouts": Private(
        "launch.timeout_seconds of groups that torch opens by itself",
        _in("torch.distributed.distributed_c10d:", "default_pg_timeout", "default_pg_nccl_timeout"),
        "",
        optional=True,
    ),
    "memory_snapshot": Private(
        "the snapshot of a GPU's memory in shoal profile",
        _in("torch.cuda.memory:", "_record_memory_history", "_snapshot"),
        "",
        optional=True,
    ),
    "trace": Private(
        "counting memory with fake tensors",
        (
            "torch._subclasses.fake_tensor:FakeTensorMode", "torch.testing._internal.distributed.fake_pg:FakeStore",
            "torch:UntypedStorage._cdata", "torch.utils._pytree:tree_iter",
            *_in("torch.utils._python_dispatch:", "TorchDispatchMode", "_disable_current_modes"),
            *_in("torch.nn:Module.", "_parameters", "_buffers"),
        ),
        "plan without --trace",
    ),
}  # fmt: skip


def torch_version() -> str:
    """Return the installed version of torch without its build suffix, as "2.13.0". Does not import torch."""
    return importlib.metadata.version("torch").partition("+")[0]


def minor(version: str) -> tuple[int, int]:
    """Return (2, 13) for "2.13.0", "2.13.0a0" and "2.13.0.dev20260101"."""
    found = re.match(r"(\d+)\.(\d+)", version)
    assert found, version
    return int(found[1]), int(found[2])


def is_tested(version: str) -> bool:
    """Return whether a release of the same minor version was tested."""
    return minor(version) in {minor(tested) for tested in TESTED}


def tested_range() -> str:
    """Return the tested range, as "2.11 to 2.15"."""
    first, last = (".".join(map(str, minor(version))) for version in (TESTED[0], TESTED[-1]))
    return f"{first} to {last}"


def version_notes() -> list[str]:
    """Return a note to print before a run if the installed torch was not tested."""
    version = torch_version()
    if is_tested(version):
        return []
    return [
        f"torch {version} was not tested with this version of shoal (tested: {tested_range()}); run shoal verify on your config"
    ]


def require(feature: Feature) -> None:
    """Raise `LaunchError` if this torch lacks a private name that `feature` needs. Imports torch."""
    needed = PRIVATE[feature]
    if missing := [name for name in needed.names if not exists(name)]:
        instead = f"{needed.instead}, or " if needed.instead else ""
        raise LaunchError(
            f"{needed.feature} uses {', '.join(name.replace(':', '.') for name in missing)}, which torch {torch_version()} does "
            f"not have; {instead}install torch {tested_range()}"
        )


def exists(name: str) -> bool:
    """Return whether torch has "module:object.attribute". Attributes that only instances get count too."""
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except ImportError:
        return False
    for part in path.split("."):
        if isinstance(found, type) and not hasattr(found, part):
            return part in _set_by(found)
        try:
            found = getattr(found, part)
        except (AttributeError, RuntimeError):
            return False
    return True


def _set_by(kind: type) -> set[str]:
    """Return the names that `kind` and its bases annotate or mention in `__init__`, which may be a wrapper."""
    declared = {name for base in kind.__mro__ for name in vars(base).get("__annotations__", {})}
    codes = [
        vars(base)["__init__"].__code__ for base in kind.__mro__ if hasattr(vars(base).get("__init__"), "__code__")
    ]
    return declared | {name for code in codes for name in _mentioned(code)}


def _mentioned(code: CodeType) -> set[str]:
    return {*code.co_names, *(constant for constant in code.co_consts if isinstance(constant, str))}
