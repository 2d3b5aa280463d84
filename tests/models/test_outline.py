"""The outline of a model: each parameter once, equal blocks together."""

from __future__ import annotations

from torch import nn

from shoal.models.outline import outline


def test_equal_blocks_share_their_lines() -> None:
    block = [nn.Sequential(nn.Linear(4, 3), nn.ReLU()) for _ in range(3)]
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "blocks": nn.ModuleList([*block, nn.Linear(4, 3, bias=False)])})
    assert outline(model).splitlines() == [
        "ModuleDict: 77 parameters",
        "  embed: Embedding  weight 5 x 4",
        "  blocks: ModuleList",
        "    0 to 2: 3 x Sequential",
        "      0: Linear  weight 3 x 4  bias 3",
        "      1: ReLU",
        "    3: Linear  weight 3 x 4",
    ]


def test_neighbors_with_names_keep_them() -> None:
    assert outline(nn.ModuleDict({"q": nn.Linear(2, 2), "k": nn.Linear(2, 2)})).count("Linear") == 2
