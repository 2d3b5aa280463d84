"""Digests of a checkpoint's tensors, to compare the weights of two runs bitwise. No torch."""

from __future__ import annotations

import hashlib
from pathlib import Path

from safetensors import safe_open


def weights(folder: Path) -> dict[str, str]:
    """Return a digest of every tensor in a checkpoint, however many processes wrote it."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), framework="np") as file:
            for name in file.keys():  # noqa: SIM118
                found[name] = hashlib.sha256(file.get_tensor(name).tobytes()).hexdigest()
    return found
