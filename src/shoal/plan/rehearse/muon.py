"""A step of Muon (`optim/muon.py`), rehearsed: in rounds, matrices are gathered on their owners, orthogonalized and sent back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from shoal.config.layout import Layout
from shoal.config.owners import assign_owners
from shoal.plan.rehearse.families import Shape
from shoal.plan.rehearse.layers import FLOAT32, Layers
from shoal.plan.rehearse.tape import Space
from shoal.plan.rehearse.work import Op

NEWTON_SCHULZ: Final = 5  # iterations


def orthogonalize(layers: Layers, layout: Layout, shapes: Sequence[Shape]) -> None:
    """
    Count the memory, products and messages of the first rank, which owns the most expensive matrix of each round.

    shapes: of all matrices that the ranks of a pipeline's stage hold together.
    """
    width = 2 if layers.kernels.cuda else FLOAT32
    team = layout.world_size // layout.pp
    holders = layout.dp_shard * layout.cp * layout.tp  # of the parts of a matrix
    for rows, row in shapes:
        short, long = sorted((rows, row))
        for sizes in ((short, long, short), (short, short, short), (short, short, long)):
            layers.work.once[Op("linear", sizes)] += NEWTON_SCHULZ / team  # type: ignore[assignment]  # a fraction
    for owners in assign_owners(shapes, min(team, len(shapes))):  # more ranks would own nothing
        sizes_of = {i: shapes[i][0] * shapes[i][1] for i in owners}
        mine = [i for i, owner in owners.items() if owner == 0]
        own, every = width * sum(sizes_of[i] for i in mine), width * sum(sizes_of.values())
        if team > 1:
            axis = _axis(layout)
            layers.work.messages["exchange", axis, every // holders] += 1  # results
            layers.work.messages["exchange", axis, every // team] += holders > 1  # what to orthogonalize
        largest = max(sizes_of[i] for i in mine)
        gram = width * max(min(shapes[i]) ** 2 for i in mine)
        # what moves, and a part's change
        sent, received, change = own * (team - 1) // holders, (every - own) // holders, FLOAT32 * largest // holders
        for spaces in ((own, width * largest, gram, gram), (own, sent, received, change)):
            held = [Space(layers.tape.memory, "temporary", size) for size in spaces]
            del held


def _axis(layout: Layout) -> str:
    """Return an axis along which parts of the matrices travel; the first of several."""
    sizes = {"shard": layout.dp_shard * layout.cp, "batch": layout.dp_replicate * layout.cp, "tp": layout.tp}
    return next(name for name, size in sizes.items() if size > 1)
