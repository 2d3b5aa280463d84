"""The picture of time and cost has the numbers of the table that `shoal plan` prints."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.config.data_options import Data
from shoal.config.options import Config, Model, Train
from shoal.plan.choice.choose import choose
from shoal.plan.choice.devices import offer
from shoal.plan.choice.price import Price
from shoal.plan.machine import find_machine
from shoal.report.pictures.cost import draw_cost


def test_bars_are_hours_and_money() -> None:
    train = Train(steps=3600, global_batch=8, micro_batch=4, dtype="bfloat16")
    config = Config(model=Model(dim=64, num_layers=2, num_heads=4, vocab_size=256), data=Data(seq_len=64), train=train)
    found = [choose(config, find_machine(name, 1)) for name in ("2xL4", "1xA10")]
    offers = [made for choices in found if (made := offer(choices, Price(2.0, "USD")))]
    steps = [choices.fitting[0].seconds.middle for choices in found]  # as many hours as seconds: there are 3600
    for figure in draw_cost(offers, "USD", "a recipe"):
        axes: list[Any] = figure.axes
        time, cost = axes
        assert [bar.get_width() for bar in time.patches] == pytest.approx(steps)
        assert [bar.get_width() for bar in cost.patches] == pytest.approx([2 * 2.0 * steps[0], 1 * 2.0 * steps[1]])
        assert [label.get_text().partition("\n")[0] for label in time.get_yticklabels()] == [
            "2 x L4-24GB",
            "1 x A10-24GB",
        ]
