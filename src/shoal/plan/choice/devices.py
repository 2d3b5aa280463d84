"""The same recipe on several kinds of devices, side by side: the fastest layout of each, time and price. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.errors import ShoalError
from shoal.plan.choice.choose import Choice, Choices
from shoal.plan.choice.price import Price, read_price
from shoal.plan.choice.table import gib, label, mfu
from shoal.plan.length import given_steps
from shoal.plan.machine import Machine
from shoal.plan.speed.corrections import Interval
from shoal.run.console import duration
from shoal.system.output import aligned


def prices_of(text: str | None, devices: int) -> list[Price | None]:
    """
    Return the price of each kind of device: one for all, or one for each, separated by commas.

    Raises `ShoalError` if there is another number of them, or if they are in different currencies.
    """
    if text is None:
        return [None] * devices
    found = [read_price(each) for each in text.split(",")]
    if len(found) not in (1, devices):
        raise ShoalError(f"--price {text}: give one price, or one for each of the {devices} kinds of devices")
    if len({price.currency for price in found}) > 1:
        raise ShoalError(f"--price {text}: give all prices in one currency")
    return [*(found if len(found) > 1 else found * devices)]


@dataclass(frozen=True)
class Offer:
    """The fastest layout on one kind of device. whole: seconds of all steps; cost: of them; None if not known."""

    machine: Machine
    best: Choice
    whole: Interval | None
    cost: Interval | None


def offer(choices: Choices, price: Price | None) -> Offer | None:
    """Return the fastest layout that fits, with time and cost; None if none fits."""
    best = next(iter(choices.fitting), None)
    if best is None:
        return None
    steps = given_steps(choices.config.train, choices.config.data.seq_len)
    whole = best.seconds.scaled(steps) if steps else None
    cost = whole.scaled(choices.machine.world_size / 3600 * price.amount) if whole and price else None
    return Offer(choices.machine, best, whole, cost)


def comparison(found: Sequence[Choices], prices: Sequence[Price | None]) -> list[str]:
    """Return a row for each kind of device, and what the numbers in parentheses are."""
    config = found[0].config
    train = config.train
    steps = given_steps(train, config.data.seq_len)
    priced = steps is not None and any(prices)
    currency = next((price.currency for price in prices if price), "")
    rows = [["devices", "layout", "GiB", "seconds/step", "tokens/s", "MFU", "all steps", currency if priced else ""]]
    for choices, price in zip(found, prices, strict=True):
        machine, made = choices.machine, offer(choices, price)
        if made is None:
            rows.append([str(machine), "does not fit", gib(choices.found[0].need.total), *[""] * 5])
            continue
        best, whole, cost = made.best, made.whole, made.cost
        rate = train.global_batch * config.data.seq_len / best.seconds.middle
        rows.append([
            str(machine), label(best, choices), gib(best.need.total), f"{best.seconds.middle:.3g}", f"{rate:,.0f}",
            f"{mfu(best.need, machine, rate):.0%}" if machine.cuda else "",
            f"{duration(whole.middle)} ({duration(whole.low)} to {duration(whole.high)})" if whole else "",
            f"{cost.middle:,.2f} ({cost.low:,.2f} to {cost.high:,.2f})" if cost else "",
        ])  # fmt: skip
    shown = len(rows[0]) - (0 if priced else 1 if steps else 2)
    rows = [row[:shown] for row in rows]
    note = ["", "in parentheses: 90% intervals. Evaluations, saves and restarts are not in the times"] if steps else []
    return [*aligned(rows, left=(0, 1)), *note]
