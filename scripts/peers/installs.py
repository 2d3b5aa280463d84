"""
The peers, their pinned versions, and an environment for each: `build/peers/NAME`.

All environments share the torch of the environment that runs the benchmark, so that every contender has the same kernels.
pip may not replace it: a peer that does not allow this torch does not install.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

INSTALLED: Final = "installed.json"  # pins and outcome of the last installation in an environment


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A peer. pins: what pip installs beside torch."""

    title: str
    worker: str  # a module of scripts.peers
    pins: tuple[str, ...]
    path: str  # the training path that its worker takes


_TRANSFORMERS: Final = "transformers==5.23.0"

PEERS: Final[dict[str, Peer]] = {
    "trainer": Peer(
        title="transformers.Trainer",
        worker="with_trainer",
        pins=(_TRANSFORMERS, "accelerate==1.15.0"),
        path="`Trainer.train` with transformers' Llama",
    ),
    "accelerate": Peer(
        title="accelerate",
        worker="with_accelerate",
        pins=("accelerate==1.15.0", _TRANSFORMERS),
        path="`prepare`, `accumulate`, `backward`, `clip_grad_norm_`, with transformers' Llama",
    ),
    "litgpt": Peer(
        title="litgpt",
        worker="with_litgpt",
        pins=("litgpt==0.5.13", "lightning==2.6.6"),
        path="litgpt's `GPT` and cross entropy in Fabric's loop, as `litgpt pretrain` does, without its `torch.compile`",
    ),
    "torchtitan": Peer(
        title="torchtitan",
        worker="with_torchtitan",
        pins=("torchtitan==0.3.0", "triton==3.7.1"),  # imports triton, which a CPU build of torch does not bring
        path="its Llama 3 model, attention module, loss, optimizer container and clipping in the order of its `train_step`: "
        "its `Trainer` needs a GPU",
    ),
    "fabric": Peer(
        title="lightning-fabric",
        worker="with_fabric",
        pins=("lightning-fabric==2.6.6", _TRANSFORMERS),
        path="`setup`, `backward`, `clip_gradients`, with transformers' Llama",
    ),
    "torch": Peer(
        title="plain torch loop",
        worker="with_torch",
        pins=("numpy==2.4.6",),
        path="a compact Llama in one file, as nanoGPT's `train.py`",
    ),
}


def install(names: Iterable[str], folder: Path) -> dict[str, str]:
    """
    Install each peer that is not installed with its present pins; return the errors of those that do not install.

    folder: holds the environments. A failed installation is not tried again until its folder is deleted.
    """
    shared = share_torch(folder / "shared-torch")
    errors = {}
    for name in names:
        known = _outcome(folder / name)
        if known is None:
            print(f"installing {name}: {', '.join(PEERS[name].pins)}", file=sys.stderr, flush=True)
            known = _install(folder / name, PEERS[name].pins, shared)
        if known:
            print(f"{PEERS[name].title} does not install: {known}", file=sys.stderr, flush=True)
            errors[name] = known
    return errors


def python_of(name: str, folder: Path) -> Path:
    """Return the interpreter of a peer's environment."""
    return folder / name / "bin" / "python"


def share_torch(folder: Path) -> Path:
    """Link this environment's torch, and nothing else of it, into `folder`; return it."""
    distribution = importlib.metadata.distribution("torch")
    folder.mkdir(parents=True, exist_ok=True)
    tops = {file.parts[0] for file in distribution.files or [] if file.parts[0] != ".."}
    for top in tops:
        link, target = folder / top, Path(str(distribution.locate_file(top)))
        if link.is_symlink() and link.readlink() != target:
            link.unlink()
        if target.exists() and not link.is_symlink():
            link.symlink_to(target)
    return folder


def _outcome(environment: Path) -> str | None:
    """Return the error of the last installation, empty if it succeeded; None if there is none with the present pins."""
    try:
        said = json.loads((environment / INSTALLED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return str(said["error"]) if said["pins"] == _pins(PEERS[environment.name].pins) else None


def _pins(pins: Iterable[str]) -> list[str]:
    return [f"torch=={importlib.metadata.version('torch')}", *pins]


def _install(environment: Path, pins: Iterable[str], shared: Path) -> str:
    """
    Make an environment and install `pins`; return pip's last line of error, empty if it succeeded.

    torch is named too: pip finds the shared one, and installs what it needs.
    """
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(environment)], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = environment / "lib" / version / "site-packages"
    (packages / "shared_torch.pth").write_text(f"{shared}\n", encoding="utf-8")
    wanted = _pins(pins)
    command = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet", *wanted]
    quiet = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    done = subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    error = "" if done.returncode == 0 else (said or ["pip failed silently"])[-1].removeprefix("ERROR: ")
    (environment / INSTALLED).write_text(json.dumps({"pins": wanted, "error": error}), encoding="utf-8")
    return error
