"""What a budget buys, prices, and the choice written into a recipe."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import yaml

from shoal.config.data_options import Data
from shoal.config.options import Config, Model, Train
from shoal.config.presets import resolve_shape, shape_problems
from shoal.errors import ShoalError
from shoal.plan.choice.budget import ALPHA, BETA, A, B, Budget, budget_lines, predicted_loss, read_budget, shape, sizes
from shoal.plan.choice.choose import Choice, choose
from shoal.plan.choice.devices import prices_of
from shoal.plan.choice.price import Price, read_price
from shoal.plan.estimate import flops_per_token
from shoal.plan.machine import find_machine
from shoal.resolve.recipe_text import with_options
from tests.plan.test_choose import plan

CONFIG = Config(
    model=Model(vocab_size=4096),
    data=Data(seq_len=256),
    train=Train(global_batch=8, micro_batch=2, dtype="float32", steps=1),
)
PRICE = Price(2.5, "USD")


def optimal_parameters(flops: float) -> float:
    """Return the number of parameters with the least loss for 6 N D = `flops`, by the derivative of the law."""
    ratio = math.pow(ALPHA * A / (BETA * B), 1 / (ALPHA + BETA))
    return ratio * math.pow(flops / 6, BETA / (ALPHA + BETA))


def test_what_a_budget_says() -> None:
    assert read_budget("3h", None, 8) == Budget(10_800.0, None)
    assert read_budget("90 min", None, 8) == Budget(5400.0, None)
    assert read_budget("1e18flop", None, 8) == Budget(None, 1e18)
    assert read_budget("200usd", PRICE, 8) == Budget(200 / 2.5 / 8 * 3600, None)
    assert read_price("2.49usd") == Price(2.49, "USD")
    assert read_price("3 €/h") == Price(3.0, "€")


@pytest.mark.parametrize(
    ("text", "price", "words"),
    [
        ("200usd", None, "needs the price of a device's hour, such as --price 2.49usd"),
        ("200eur", PRICE, "different currencies; give both in USD"),
        ("5parsec", PRICE, "parsec is not a unit of time, money or FLOPs"),
        ("soon", None, "give a time, money or FLOPs"),
        ("0h", None, "give a time, money or FLOPs"),
        ("200", PRICE, "give a time, money or FLOPs"),
    ],
)
def test_budgets_that_are_none(text: str, price: Price | None, words: str) -> None:
    with pytest.raises(ShoalError) as error:
        read_budget(text, price, 1)
    assert words in str(error.value)


def test_the_law_s_best_size_is_where_its_loss_is_least() -> None:
    """The closed form, against the losses of sizes around it; and the published ratio of about 20 tokens for each parameter."""
    flops = 5.76e23  # Gopher's and Chinchilla's
    best = optimal_parameters(flops)
    losses = [predicted_loss(n, flops / 6 / n) for n in (best / 1.1, best, 1.1 * best)]
    assert min(losses) == losses[1]
    assert 10 < flops / 6 / best**2 < 40


def test_flops_buy_the_size_that_the_law_asks_for() -> None:
    found = sizes(CONFIG, Budget(None, 1e19), lambda config: None)
    best = min(found, key=lambda size: size.loss)
    assert 0.5 < best.parameters / optimal_parameters(1e19) < 2
    assert best.tokens == pytest.approx(1e19 / flops_per_token(best.config.model, 256))
    assert "fits nowhere" in budget_lines(found)[2]


def test_time_buys_what_the_devices_train() -> None:
    machine = find_machine("2xcpu-8GB", 1)

    def best_layout(config: Config) -> Choice | None:
        return next(iter(choose(config, machine).fitting), None)

    short, long = (sizes(CONFIG, Budget(seconds, None), best_layout) for seconds in (3600.0, 36_000.0))
    best = [min(found, key=lambda size: size.loss) for found in (short, long)]
    assert best[0].parameters < best[1].parameters
    for size in best:
        assert size.choice is not None
        assert size.tokens * size.choice.seconds.middle == pytest.approx(
            size.choice.need.config.train.global_batch * 256 * (3600 if size is best[0] else 36_000)
        )
    with pytest.raises(ShoalError, match="too small"):
        sizes(CONFIG, Budget(0.5, None), best_layout)


@pytest.mark.parametrize("dim", [64, 1280, 2048, 4096, 16384])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_shapes_are_models(dim: int, family: str) -> None:
    model = shape(CONFIG.replace("model", family=family), dim).model
    assert not list(shape_problems(model))
    assert model == resolve_shape(model)
    assert dataclasses.replace(model, dim=dim) == model


def test_a_budget_on_the_command_line() -> None:
    done = plan("quickstart", "--devices", "2xcpu-8GB", "--budget", "1h")
    assert done.returncode == 0
    assert "Its flags: --model.dim" in done.stdout
    assert "Besiroglu" in done.stdout
    done = plan("quickstart", "--devices", "2xcpu-8GB", "--price", "3")
    assert done.returncode == 2
    assert "with its currency, such as 2.49usd" in done.stderr
    assert "Traceback" not in done.stderr


def test_devices_side_by_side(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("data: {seq_len: 256}\ntrain: {steps: 500, global_batch: 32, micro_batch: 4}\n")
    done = plan(str(recipe), "--devices", "8xH100-80GB,1xL4,2xcpu-0.01GB", "--price", "2.5usd,0.7usd,0.1usd")
    assert done.returncode == 0, done.stderr
    head, fast, slow, small = done.stdout.splitlines()[:4]
    assert head.split() == ["devices", "layout", "GiB", "seconds/step", "tokens/s", "MFU", "all", "steps", "USD"]
    assert fast.startswith("8 x H100-80GB")
    assert slow.startswith("1 x L4-24GB")
    assert "does not fit" in small
    assert len(plan(str(recipe), "--devices", "1xL4,1xA10").stdout.splitlines()) == 5  # without prices
    assert prices_of("1usd", 2) == [Price(1.0, "USD")] * 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--calibrate", "--train.dtype", "int8"], "a calibration measures float32"),
        (["--calibrate", "--launch.processes", "two"], "a positive number of seconds and of processes"),
        (["--calibrate", "-3"], "positive number"),
        (["quickstart", "--devices", "1xL4,1xA10", "--price", "1usd,2usd,3usd"], "one for each of the 2 kinds"),
        (["quickstart", "--devices", "1xL4,1xA10", "--price", "1usd,2eur"], "give all prices in one currency"),
        (["quickstart"], "give the devices that the plan is for"),
        (["quickstart", "--devices", "2xcpu-1GB", "--calibration", "nothing.json"], "nothing.json does not exist"),
        (["quickstart", "--devices", "2xcpu-1GB", "--budget", "1s"], "the budget is too small"),
        (
            ["quickstart", "--devices", "2xcpu-1GB", "--budget", "1h", "--write"],
            "--budget and --write cannot be given together",
        ),
        (["quickstart", "--devices", "1xL4,1xA10", "--json"], "several kinds of --devices and --json cannot be given"),
        (["--report", "--json"], "--report and --json cannot be given together"),
    ],
)
def test_bad_input(arguments: list[str], words: str) -> None:
    done = plan(*arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


# --- the choice in a recipe


@pytest.mark.parametrize(
    "text",
    [
        "model: {dim: 64}  # small\n", "model: {dim: 64}", "", "parallel: {tp: 2}  # two\ntrain: {steps: 3}\n",
        "parallel:  # mine\n  # why\n  tp: 2  # two\n  cp_method: ulysses\n\ntrain:\n  steps: 3  # few\n",
        "parallel:\n    pp: 4\n", "parallel: null\ntrain: {steps: 3}\n", "parallel: {tp: 2,\n  pp: 4}\ntrain: {steps: 3}\n",
    ],
)  # fmt: skip
def test_a_recipe_gets_its_layout_and_keeps_all_else(text: str) -> None:
    changed = with_options(text, "parallel", {"dp_shard": 4}, frozenset({"tp", "pp"}))
    before, after = yaml.safe_load(text) or {}, yaml.safe_load(changed)
    kept = {k: v for k, v in (before.pop("parallel", None) or {}).items() if k not in ("tp", "pp")}
    assert after.pop("parallel") == {**kept, "dp_shard": 4}
    assert after == before
    for comment in ("# small", "# mine", "# why", "# few", "# two" if "{tp: 2}" in text else ""):
        assert (comment in changed) == (comment in text)


def test_a_recipe_that_cannot_be_changed_is_left_alone() -> None:
    with pytest.raises(ShoalError, match=r"cannot change; set \{pp: 4\} in it"):
        with_options("{parallel: {tp: 2}}", "parallel", {"pp": 4})


def test_the_choice_is_written(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "model: {dim: 256, num_layers: 4, num_heads: 4}\n"
        "data: {seq_len: 256}\ntrain: {steps: 5, global_batch: 8, micro_batch: 4, dtype: float32}\n"
    )
    done = plan(str(recipe), "--devices", "2xcpu-0.2GB", "--write")
    assert done.returncode == 0, done.stderr
    written = yaml.safe_load(recipe.read_text())
    assert written["launch"] == {"processes": 2}
    assert f"wrote {next(iter(written['parallel']))} 2 to" in done.stdout
    refused = plan("quickstart", "--devices", "2xcpu-1GB", "--write")
    assert refused.returncode == 2
    assert "shoal init writes one" in refused.stderr
