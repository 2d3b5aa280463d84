"""
The size of a model and the number of its tokens that a budget buys, so that the predicted loss is least. No torch.

The law is that of Hoffmann et al. 2022 (arXiv:2203.15556, section 3.3), L = E + A / N^a + B / D^b for N parameters and D tokens,
with the coefficients that Besiroglu et al. 2024 (arXiv:2404.10102, table 1) fitted to the same runs: the published ones fit them
badly, and their intervals were too narrow. It holds for 44M to 16B parameters, one epoch, and the authors' text; what it says of
the loss is for comparing sizes, not for this corpus.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from shoal.config.options import Config
from shoal.config.presets import resolve_shape
from shoal.errors import ShoalError
from shoal.plan.choice.choose import Choice
from shoal.plan.choice.price import CURRENCY, Price
from shoal.plan.estimate import flops_per_token, parameter_count
from shoal.system.output import aligned

# nats; see above
E, A, B, ALPHA, BETA = 1.8172, 482.01, 2085.43, 0.3478, 0.3658
FITTED: Final = (44e6, 16e9)  # parameters of the runs behind the law
HEAD_DIM: Final = 64
DIMS: Final = (
    64, 128, 192, 256, 320, 384, 512, 640, 768, 1024, 1280, 1536, 2048, 2560, 3072, 4096, 5120, 6144, 8192, 10240, 12288, 16384,
)  # fmt: skip
FEWEST_STEPS: Final = 100  # below which nothing is learned
UNITS: Final = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True)
class Budget:
    """Seconds on all devices, or FLOPs of the model's own arithmetic."""

    seconds: float | None
    flops: float | None


@dataclass(frozen=True)
class Size:
    """A model that the budget buys, trained on `tokens` in a layout that fits; None if FLOPs are the budget and no layout fits."""

    config: Config
    parameters: int
    tokens: float
    loss: float
    choice: Choice | None


def read_budget(text: str, price: Price | None, devices: int) -> Budget:
    """Read "3h", "200usd" or "1e18flop". Raises `ShoalError` if it is none, or is money without `price`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*([a-zA-Z$€£]+)", text.strip(), re.IGNORECASE)
    if found is None or not float(found[1]):
        raise ShoalError(f"--budget {text}: give a time, money or FLOPs, such as 3h, 200usd or 1e18flop")
    amount, unit = float(found[1]), found[2]
    if unit.lower() in ("flop", "flops"):
        return Budget(None, amount)
    if unit.lower() in UNITS:
        return Budget(amount * UNITS[unit.lower()], None)
    if not re.fullmatch(CURRENCY, unit):
        raise ShoalError(f"--budget {text}: {unit} is not a unit of time, money or FLOPs; give 3h, 200usd or 1e18flop")
    if price is None:
        raise ShoalError(f"--budget {text} needs the price of a device's hour, such as --price 2.49{unit.lower()}")
    if price.currency != unit.upper():
        raise ShoalError(f"--budget {text} and the price are in different currencies; give both in {price.currency}")
    return Budget(amount / (price.amount * devices) * 3600, None)


def predicted_loss(parameters: float, tokens: float) -> float:
    """Return the law's loss, nats per token."""
    return E + A / math.pow(parameters, ALPHA) + B / math.pow(tokens, BETA)


def shape(config: Config, dim: int) -> Config:
    """Return the config with a model of this width, in the proportions of GPT-2 and Llama: 64 to 128 of width for each block."""
    layers = max(2, round(dim / (64 if dim <= 1024 else 64 + 64 * min(1.0, math.log2(dim / 1024) / 2))))
    heads = dim // (HEAD_DIM if dim < 4096 else 2 * HEAD_DIM)
    grouped = (
        {"num_kv_heads": None} if config.model.family == "gpt2" or heads < 16 or heads % 8 else {"num_kv_heads": 8}
    )
    wide = dataclasses.replace(
        config.model, preset=None, dim=dim, num_layers=layers, num_heads=heads, head_dim=None, ffn_dim=None, **grouped
    )  # fmt: skip
    return dataclasses.replace(config, model=resolve_shape(wide))


def sizes(config: Config, budget: Budget, best_layout: Callable[[Config], Choice | None]) -> list[Size]:
    """
    Return the sizes around the best one, the smallest first. Raises `ShoalError` if the budget does not train the smallest.

    best_layout: a function that returns the fastest layout of a config that fits; None if none does.
    """
    found: list[Size] = []
    for dim in DIMS:
        size = _bought(shape(config, dim), budget, best_layout)
        if size is None:
            if found:
                break
            continue
        found.append(size)
        if len(found) > 2 and found[-3].loss < found[-2].loss < found[-1].loss:
            break  # past the best one
    if not found:
        raise ShoalError(
            f"the budget is too small: with it even a model of width {DIMS[0]} takes fewer than {FEWEST_STEPS} steps of "
            f"{config.train.global_batch * config.data.seq_len:,} tokens, or does not fit; raise it, or lower train.global_batch"
        )
    at = min(range(len(found)), key=lambda n: found[n].loss)
    return found[max(0, at - 2) : at + 3]


def _bought(config: Config, budget: Budget, best_layout: Callable[[Config], Choice | None]) -> Size | None:
    """Return how many tokens the budget gives a model; None if it does not fit, or takes too few steps."""
    per_step = config.train.global_batch * config.data.seq_len
    choice = best_layout(config)
    if budget.flops is not None:
        tokens = budget.flops / flops_per_token(config.model, config.data.seq_len, config.metrics.mfu_attention)
    elif choice is None:
        return None
    else:
        assert budget.seconds is not None
        tokens = budget.seconds / choice.seconds.middle * per_step
    if tokens < FEWEST_STEPS * per_step:
        return None
    parameters = parameter_count(config.model)
    return Size(config, parameters, tokens, predicted_loss(parameters, tokens), choice)


def budget_lines(found: Sequence[Size]) -> list[str]:
    """Return the sizes as text, the best one with its flags."""
    best = min(found, key=lambda size: size.loss)
    rows = [["parameters", "width", "blocks", "tokens", "each", "step", "layout", "law's loss"]]
    rows.append(["", "", "", "", "parameter", "seconds", "", "nats/token"])
    for size in found:
        model, choice = size.config.model, size.choice
        rows.append([
            f"{size.parameters:,}", str(model.dim), str(model.num_layers), f"{size.tokens:,.3g}",
            f"{size.tokens / size.parameters:,.3g}", f"{choice.seconds.middle:.3g}" if choice else "", str(choice.need.layout) if choice
            else "fits nowhere", f"{size.loss:.3f}" + (" *" if size is best else "  "),
        ])  # fmt: skip
    model = best.config.model
    names = [
        "dim",
        "num_layers",
        "num_heads",
        *(["num_kv_heads", "head_dim", "ffn_dim"] if model.family == "llama" else []),
    ]
    flags = " ".join(f"--model.{name} {getattr(model, name)}" for name in names)
    said = [
        *aligned(rows),
        "",
        f"* best: {best.parameters:,} parameters on {best.tokens:,.3g} tokens. Its flags: {flags} --train.tokens "
        f"{best.tokens:.3g}",
        "the law: Hoffmann et al. 2022 with the coefficients of Besiroglu et al. 2024; it compares sizes, and is not the loss on your text",
    ]
    low, high = FITTED
    if not low <= best.parameters <= high:
        said.append(f"the law was fitted to {low / 1e6:.0f}M to {high / 1e9:.0f}B parameters, and is extended here")
    return said
