"""A model's modules as text: a line for each, with the shapes of its own parameters."""

from __future__ import annotations

from itertools import groupby

from torch import nn


def outline(model: nn.Module) -> str:
    """Return the modules of `model`, one per line and indented; equal neighbors with numbers as names share their lines."""
    total = sum(p.numel() for p in model.parameters())
    return f"{type(model).__name__}: {total:,} parameters\n" + "".join(f"{line}\n" for line in _inside(model))


def _inside(module: nn.Module) -> list[str]:
    """Return the lines of the modules inside `module`."""
    lines = []
    children = [(name, _described(child)) for name, child in module.named_children()]
    for (_, described), group in groupby(children, lambda each: ("" if each[0].isdecimal() else each[0], each[1])):
        names = [name for name, _ in group]
        first, *rest = described
        count = f"{len(names)} x " if len(names) > 1 else ""
        called = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        lines += [f"  {called}: {count}{first}", *(f"  {line}" for line in rest)]
    return lines


def _described(module: nn.Module) -> list[str]:
    """Return the line of a module, and the lines of those inside it."""
    own = [f"{name} {' x '.join(map(str, p.shape))}" for name, p in module.named_parameters(recurse=False)]
    return ["  ".join([type(module).__name__, *own]), *_inside(module)]
