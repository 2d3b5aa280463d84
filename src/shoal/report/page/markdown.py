"""A report of runs as Markdown: the facts and tables of the page, without its curves. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shoal.report.curves.curves import Curves
from shoal.report.page.content import named_folders, run_view, runs_view
from shoal.run.console import duration


def report_markdown(folders: Sequence[Path]) -> bytes:
    """Return a report of these runs. Raises `OSError` if a run cannot be read."""
    runs = named_folders(list(folders))
    curves = {name: Curves.open(folder.path) for name, folder in runs.items()}
    view = runs_view(runs, curves)
    lines = ["# Report", "", *_overview(view["runs"])]
    if len(runs) > 1:
        lines += ["", "## What differs in the configs", "", *_differences(view)]
    for each in view["runs"]:
        lines += _about(each, run_view(runs[each["id"]], curves[each["id"]], reads_data=True))
    return ("\n".join(lines) + "\n").encode()


def _overview(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    header = ["run", "state", "step", "loss (nats/token)", "best held-out loss (nats/token)", "tokens", "tokens/s"]
    return _table(
        header,
        [
            [
                each["name"],
                each["state"],
                f"{each['step']:,}" + (f" of {each['total_steps']:,}" if each["total_steps"] else ""),
                _number(each["loss"], "{:.4f}"),
                _number(each["best_val_loss"], "{:.4f}"),
                _number(each["tokens"], "{:,.0f}"),
                _number(each["tokens_per_second"], "{:,.0f}"),
            ]
            for each in runs
        ],
    )


def _differences(view: Mapping[str, Any]) -> list[str]:
    if not view["differences"]:
        return ["The configs do not differ."]
    names = [each["id"] for each in view["runs"]]
    rows = [[d["option"], *(d["values"].get(name, "–") for name in names)] for d in view["differences"]]
    return _table(["option", *names], rows)


def _about(run: Mapping[str, Any], view: Mapping[str, Any]) -> list[str]:
    lines = ["", f"## {_cell(run['name'])}"]
    started = view["started_event"] or {}
    git, command = started.get("git"), started.get("command")
    if git:
        dirty = ", with changes that are not committed" if git.get("dirty") else ""
        lines += ["", f"git: {_cell(git.get('commit'))}{dirty}"]
    if command:
        lines += ["", "Command:", "", f"    {' '.join(map(_cell, command))}"]
    if account := view["account"]:
        lines += ["", f"Goodput {100 * account['goodput']:.1f}% of {duration(account['total_seconds'])}:", ""]
        spent = sorted(account["seconds"].items(), key=lambda item: -item[1])
        lines += _table(["category", "time", "meaning"], [[c, duration(s), view["meanings"][c]] for c, s in spent if s])
    if view["spikes"]:
        lines += ["", "Spikes of the loss:", ""]
        rows = [
            [f"{s['step']:,}", _number(s["loss"], "{:.4f}"), "; ".join([*s["documents"], s["command"]])]
            for s in view["spikes"]
        ]
        lines += _table(["step", "loss (nats/token)", "documents"], rows)
    if view["events"]:
        lines += ["", "Events:", ""]
        rows = [[_number(e["step"], "{:,}"), e["event"], e["text"]] for e in view["events"] if e["event"] != "saved"]
        lines += _table(["step", "event", "facts"], rows)
    for sample in view["samples"]:
        lines += ["", f"Sample {_cell(sample['name'])}:", "", *(f"    {line}" for line in sample["text"].splitlines())]
    return lines


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _cell(value: object) -> str:
    """Return text that stays in its cell: on one line, without the characters that Markdown or HTML read."""
    text = " ".join(str(value).split())
    for letter in "\\|`*_[]<>":
        text = text.replace(letter, f"&#{ord(letter)};")
    return text


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = [header, ["---"] * len(header), *([_cell(value) for value in row] for row in rows)]
    return [f"| {' | '.join(map(str, line))} |" for line in lines]
