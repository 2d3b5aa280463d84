"""Every rule that rejects a layout: its message, and that following its advice removes the problem."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from shoal.config.options import Config
from shoal.resolve.layout_checks import refusals
from tests.parallel.layouts import config_of

RULES: list[tuple[str, int, dict[str, Any], set[str]]] = [
    # (part of the message, number of processes, options of the run, options that the message must name)
    ("needs a multiple of 3 processes", 4, {"parallel__pp": 3}, {"parallel.pp", "launch.processes"}),
    ("fewer than the 3 data-parallel", 3, {"train__global_batch": 2}, {"train.global_batch", "train.micro_batch"}),
    ("whole heads", 3, {"parallel__tp": 3}, {"parallel.tp", "model.num_heads"}),
    ("whole heads", 4, {"parallel__tp": 4, "model__num_kv_heads": 2}, {"parallel.tp", "model.num_kv_heads"}),
    ("without a part of model.ffn_dim", 4, {"parallel__tp": 4, "model__ffn_dim": 5}, {"parallel.tp", "model.ffn_dim"}),
    ("does not divide data.seq_len", 2, {"parallel__tp": 2, "data__seq_len": 47}, {"parallel.tp", "data.seq_len"}),
    ("other dropout masks", 2, {"family": "gpt2", "parallel__tp": 2, "model__dropout": 0.1}, {"parallel.tp", "model.dropout"}),
    ("other dropout masks", 2, {"family": "gpt2", "parallel__cp": 2, "model__dropout": 0.1}, {"parallel.cp", "model.dropout"}),
    ("equal pieces", 2, {"parallel__cp": 2, "data__seq_len": 46}, {"parallel.cp", "data.seq_len"}),
    ("equal pieces", 4, {"parallel__cp": 2, "parallel__tp": 2, "data__seq_len": 44}, {"parallel.cp", "parallel.tp"}),
    ("whole heads", 3, {"parallel__cp": 3, "parallel__cp_method": "ulysses"}, {"parallel.cp_method", "model.num_heads"}),
    ("does not support data.document_mask", 2, {"parallel__cp": 2, "parallel__cp_method": "ring"}, {"parallel.cp_method", "data.document_mask"}),
    ("stages of at least one block", 6, {"parallel__pp": 6, "parallel__pp_schedule": "gpipe"}, {"parallel.pp", "model.num_layers"}),
    ("stages of at least one block", 4, {"parallel__pp": 4, "parallel__pp_schedule": "zbv"}, {"parallel.pp_schedule", "model.num_layers"}),
    ("one stage", 2, {"parallel__pp": 2, "parallel__pp_stages": 2}, {"parallel.pp_schedule", "parallel.pp_stages"}),
    ("two stages", 2, {"parallel__pp": 2, "parallel__pp_schedule": "zbv", "parallel__pp_stages": 1}, {"parallel.pp_schedule", "parallel.pp_stages"}),
    ("needs a pipeline", 1, {"parallel__pp_stages": 2}, {"parallel.pp", "parallel.pp_stages"}),
    ("splits backward", 2, {"parallel__pp": 2, "parallel__pp_schedule": "zbv", "train__compile": True}, {"parallel.pp_schedule", "train.compile"}),
    ("recompute its whole block", 2, {"parallel__pp": 2, "parallel__pp_schedule": "zbv", "train__activation_checkpointing": "full"}, {"parallel.pp_schedule", "train.activation_checkpointing"}),
    ("micro-batches", 4, {"parallel__pp": 4, "train__global_batch": 3}, {"parallel.pp_schedule", "train.global_batch"}),
    ("order of sums", 4, {"parallel__pp": 2, "parallel__dp_shard": 2, "train__repro": "bitwise", "model__tie_embeddings": False}, {"train.repro", "parallel.pp", "parallel.dp_shard"}),
    ("tied embedding", 2, {"parallel__pp": 2, "train__repro": "bitwise"}, {"train.repro", "parallel.pp", "model.tie_embeddings"}),
    ("one thread", 2, {"train__repro": "bitwise", "launch__threads": 2}, {"train.repro", "launch.threads"}),
    ("has no effect", 2, {"parallel__reshard_after_forward": "never"}, {"parallel.reshard_after_forward", "parallel.dp_shard"}),
    ("has no effect", 2, {"parallel__cpu_offload": True}, {"parallel.cpu_offload", "parallel.dp_shard"}),
    ("has no effect", 2, {"parallel__cp_method": "ulysses"}, {"parallel.cp_method", "parallel.cp"}),
    ("has no effect", 2, {"parallel__pp_schedule": "zbv"}, {"parallel.pp_schedule", "parallel.pp"}),
    ("does not divide", 4, {"parallel__dp_shard": 4, "parallel__reshard_after_forward": 3}, {"parallel.reshard_after_forward", "parallel.dp_shard"}),
    ("deadlock", 8, {"parallel__dp_shard": 4, "parallel__tp": 2, "parallel__reshard_after_forward": 2}, {"parallel.reshard_after_forward", "parallel.tp"}),
    ("deadlock", 8, {"parallel__dp_shard": 4, "parallel__pp": 2, "parallel__reshard_after_forward": 2}, {"parallel.reshard_after_forward", "parallel.pp"}),
    ("deadlock", 8, {"parallel__dp_shard": 4, "parallel__dp_replicate": 2, "train__repro": "bitwise", "parallel__reshard_after_forward": 2}, {"parallel.reshard_after_forward", "parallel.dp_replicate"}),
    ("needs the compiler", 1, {"train__activation_checkpointing": "budget"}, {"train.activation_checkpointing", "train.compile"}),
    ("has no effect", 1, {"train__activation_budget": 0.3, "train__activation_checkpointing": "full"}, {"train.activation_checkpointing", "train.activation_budget"}),
    ("has no effect", 1, {"optim__muon_momentum": 0.5}, {"optim.name", "optim.muon_momentum"}),
    ("needs CUDA", 1, {"train__dtype": "float16", "train__device": "cpu"}, {"train.dtype", "train.device"}),
    ("into the stages", 2, {"model__family": "hf", "parallel__pp": 2}, {"model.family", "parallel.pp"}),
    ("its own attention", 2, {"model__family": "hf", "parallel__cp": 2}, {"model.family", "parallel.cp"}),
    ("separate matrices", 1, {"model__family": "hf", "optim__name": "muon"}, {"model.family", "optim.name"}),
    ("the collectives", 2, {"model__family": "hf", "parallel__tp": 2, "train__compile": True}, {"model.family", "parallel.tp", "train.compile"}),
    ("whole heads", 3, {"model__family": "hf", "parallel__tp": 3}, {"parallel.tp", "model.num_heads"}),
    ("overflow in float16", 1, {"train__dtype": "float16", "optim__name": "muon"}, {"train.dtype", "optim.name"}),
]  # fmt: skip


def _advice(text: str) -> list[tuple[str, str]]:
    """Return (option, value) of each suggestion in a sentence: "set a.b to 1 or 2, or c.d to e"; "remove a.b"."""
    _, _, ways = text.partition("; ")
    found = []
    for option, values in re.findall(r"(\w+\.\w+) (?:to|may be) ([\w.-]+(?: or [\w.-]+(?!\.))*)", ways):
        found += [(option, value) for value in values.split(" or ") if "." not in value]
    found += [(option, "") for option in re.findall(r"remove (\w+\.\w+)", ways)]
    return found


def _taken(config: Config, processes: int, option: str, value: str) -> tuple[Config, int | None]:
    section, _, key = option.partition(".")
    if option == "launch.processes":
        return config, int(value)
    default = getattr(getattr(Config(), section), key)
    parsed: Any = {"true": True, "false": False, "": default}.get(value, int(value) if value.isdigit() else value)
    return config.replace(section, **{key: parsed}), None if section == "parallel" else processes


@pytest.mark.parametrize(("words", "processes", "options", "named"), RULES)
def test_a_refusal_names_the_options_and_what_would_do(
    tmp_path: Path, words: str, processes: int, options: dict[str, Any], named: set[str]
) -> None:
    config = config_of(tmp_path, "refused", **options)
    found = [text for text in refusals(config, processes) if words in text]
    assert any(all(option in text for option in named) for text in found), list(refusals(config, processes))
    for text in found:
        advice = _advice(text)
        assert advice, text
        for option, value in advice:
            after, left = _taken(config, processes, option, value)
            head, _, _ = re.sub(r"\d+", "N", text).partition(";")
            still = [other for other in refusals(after, left) if re.sub(r"\d+", "N", other).startswith(head)]
            assert still == [], (option, value)


@pytest.mark.parametrize("options", [{}, {"parallel__dp_shard": 2, "parallel__tp": 2}, {"parallel__pp": 4}])
def test_what_can_be_is_not_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    assert list(refusals(config_of(tmp_path, "fine", **options), 4)) == []
