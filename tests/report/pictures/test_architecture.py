"""The picture of an architecture against the model that torch builds, the planner's numbers and the layout."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

import pytest
import torch

from shoal.config.layout import Layout, find_layout
from shoal.config.options import Config, Model
from shoal.models.build import build_model
from shoal.plan.estimate import flops_per_token, parameter_count
from shoal.plan.fit import held_bytes
from shoal.report.amounts import with_vocab_size
from shoal.report.pictures.anatomy import anatomy
from shoal.report.pictures.architecture import Figures, draw_architecture, shown, what_axes_do
from shoal.resolve.resolve import resolve
from shoal.system.disk import gigabytes
from tests.models.shapes import SHAPES
from tests.report.pictures.seen import overlaps, texts

LAYOUTS = {
    "one": {},
    "dp": {"parallel.dp_replicate": "4"},
    "eight": {"parallel.pp": "2", "parallel.dp_shard": "2", "parallel.tp": "2", "model.num_layers": "8", "train.global_batch": "16", "train.micro_batch": "2"},
    "many": {
        "parallel.pp": "8", "parallel.dp_replicate": "2", "parallel.dp_shard": "16", "parallel.cp": "2", "parallel.tp": "4", "model.num_kv_heads": "4",
        "model.num_layers": "32", "parallel.pp_schedule": "interleaved_1f1b", "train.global_batch": "1024", "train.micro_batch": "1",
    },
}  # fmt: skip


def config_of(options: dict[str, str]) -> Config:
    given = [("model.preset", "tiny"), ("data.corpus", "dummy"), ("train.steps", "10"), *options.items()]
    return with_vocab_size(resolve(None, [(key, text, f"--{key}") for key, text in given]).config)


@pytest.mark.parametrize("name", SHAPES)
def test_weights_are_those_of_the_model(name: str) -> None:
    shape: Model = SHAPES[name]
    with torch.device("meta"):
        model = build_model(shape, compute_dtype=torch.float32)
    found = anatomy(shape)
    rows = [("", row) for row in (*found.before, *found.after)]
    rows += [(f"blocks.{block}.", row) for block in range(found.layers) for row in found.block]
    drawn = {prefix + w.name: w for prefix, row in rows for w in row}
    built: dict[str, dict[str, torch.nn.Parameter]] = {}
    for parameter, value in model.named_parameters():
        module, _, kind = parameter.rpartition(".")
        built.setdefault(module, {})[kind] = value
    assert drawn.keys() == built.keys()
    for module, weight in drawn.items():
        assert weight.shape == tuple(built[module]["weight"].shape), module
        assert weight.bias == (built[module]["bias"].numel() if "bias" in built[module] else 0), module
        styles = [
            s
            for pattern, s in model.TENSOR_PARALLEL.items()
            if fnmatchcase(module, pattern) and module.count(".") == pattern.count(".")
        ]
        assert weight.split == {"colwise": 0, "vocab_parallel": 0, "rowwise": 1}.get(styles[0]), module
    assert found.parameters == parameter_count(shape) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", [n if n == "many" else pytest.param(n, marks=pytest.mark.ci) for n in LAYOUTS])
def test_words_do_not_overlap_and_numbers_are_the_planners(name: str) -> None:
    config = config_of(LAYOUTS[name])
    layout = find_layout(config.parallel, None)
    assert isinstance(layout, Layout)
    for figure in draw_architecture(config, layout, name):
        assert list(overlaps(figure)) == []
        words = [each for each, _ in texts(figure)]
    assert f"parameters: {parameter_count(config.model):,}" in "\n".join(words)
    assert any(gigabytes(int(held_bytes(config, layout))) in each for each in words)
    assert Figures.of(config, layout).flops_per_token == flops_per_token(config.model, config.data.seq_len)
    ranks = [int(found[1]) for each in words if (found := re.fullmatch(r"rank (\d+)", each))]
    assert (min(ranks), max(ranks)) == (0, layout.world_size - 1)
    assert len(set(ranks)) == len(ranks)
    assert [axis for axis, _ in what_axes_do(config, layout)] == [
        a for a in ("pp", "dp_replicate", "dp_shard", "cp", "tp") if getattr(layout, a) > 1
    ]


def test_each_rank_stands_at_its_coordinates() -> None:
    """The label of its row and column on the picture are the coordinates that `Layout` gives."""
    config = config_of(LAYOUTS["eight"])
    layout = Layout(pp=2, dp_shard=2, tp=2)
    for figure in draw_architecture(config, layout, "eight"):
        found = texts(figure)
    middle = {words: ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2) for words, box in found}
    columns = {words: x for words, (x, _) in middle.items() if words.startswith("tp ") and words in ("tp 0", "tp 1")}
    rows = [((box.y0 + box.y1) / 2, words) for words, box in found if re.fullmatch(r"dp_shard \d", words)]
    frames = sorted(
        (y for words, (_, y) in middle.items() if words.startswith("pp ") and ", stage" in words), reverse=True
    )
    for rank in range(layout.world_size):
        x, y = middle[f"rank {rank}"]
        places = layout.coordinates(rank)
        assert columns[f"tp {places['tp']}"] == pytest.approx(x, abs=2)
        assert min(rows, key=lambda each: abs(each[0] - y))[1] == f"dp_shard {places['dp_shard']}"
        assert sum(y < top for top in frames) - 1 == places["pp"]


def test_long_rows_are_shortened() -> None:
    assert shown(6) == [0, 1, 2, 3, 4, 5]
    assert shown(1024) == [0, 1, 2, 3, None, 1023]
