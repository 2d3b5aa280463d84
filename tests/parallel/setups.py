"""The layouts of the matrix, of at most 8 processes, in groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shoal.config.layout import Layout, find_layout
from shoal.config.options import Parallel


@dataclass(frozen=True)
class Setup:
    """A layout: its number of processes, and the options that differ from those of `config_of`."""

    processes: int
    options: dict[str, Any]

    @property
    def bitwise(self) -> bool:
        return self.options.get("train__repro") == "bitwise"

    @property
    def alone(self) -> dict[str, Any]:
        """Return the options that one process needs to compute the same: all but those of the layout and `train.repro`."""
        return {k: v for k, v in self.options.items() if not k.startswith(("parallel__", "train__repro"))}

    @property
    def same_bits(self) -> Setup:
        """Return the setup whose bits `train.repro: bitwise` promises: one process, or as few as `cp` and `tp` need."""
        kept = {f"parallel__{key}" for key in ("cp", "cp_method", "tp")}
        options = {k: v for k, v in self.options.items() if k in kept or not k.startswith("parallel__")}
        return Setup(options.get("parallel__cp", 1) * options.get("parallel__tp", 1), options)

    @property
    def features(self) -> frozenset[str]:
        """Return the features of the layout, without their sizes: all that a test of it covers."""
        options = {k.removeprefix("parallel__"): v for k, v in self.options.items() if k.startswith("parallel__")}
        parallel = Parallel(**options)
        layout = find_layout(parallel, self.processes)
        assert isinstance(layout, Layout), layout
        copies, cut = layout.dp_replicate > 1, layout.dp_shard > 1
        found = {
            "ddp": copies and not cut,
            "fsdp": cut and not copies,
            "hsdp": cut and copies,
            "offload": parallel.cpu_offload,
            "reshard never": parallel.reshard_after_forward == "never",
            "reshard over a number": isinstance(parallel.reshard_after_forward, int),
            "tp": layout.tp > 1,
            parallel.cp_method: layout.cp > 1,
            parallel.pp_schedule: layout.pp > 1,
            "bitwise": self.bitwise,
        }
        return frozenset(name for name, there in found.items() if there)


def on(processes: int, *, layers: int = 4, documents: bool = True, bitwise: bool = False, **parallel: Any) -> Setup:
    """
    Return the setup of a layout.

    layers: number of blocks, at least one per pipeline stage. documents: whether to use a document mask, which ring does not
    support. bitwise: whether to set `train.repro: bitwise`. parallel: options of the section `parallel`.
    """
    options = {f"parallel__{key}": value for key, value in parallel.items()}
    if layers != 4:
        options["model__num_layers"] = layers
    if not documents:
        options["data__document_mask"] = False
    if bitwise:
        options["train__repro"] = "bitwise"
    return Setup(processes, options)


NEVER: dict[str, Any] = {"reshard_after_forward": "never"}
OVER_2: dict[str, Any] = {"reshard_after_forward": 2}
OFFLOAD: dict[str, Any] = {"cpu_offload": True}
GROUPS: dict[str, dict[str, Setup]] = {
    "Data parallel": {
        "ddp 2": on(2),
        "ddp 3": on(3),
        "ddp 4": on(4),
        "fsdp 2": on(2, dp_shard=2),
        "fsdp 3": on(3, dp_shard=3),
        "fsdp 4": on(4, dp_shard=4),
        "fsdp 2, never": on(2, dp_shard=2, **NEVER),
        "fsdp 4, over 2": on(4, dp_shard=4, **OVER_2),
        "fsdp 2, offload": on(2, dp_shard=2, **OFFLOAD),
        "hsdp 2x2": on(4, dp_replicate=2, dp_shard=2),
    },
    "Data parallel, bitwise": {
        "bitwise ddp 2": on(2, bitwise=True),
        "bitwise ddp 3": on(3, bitwise=True),
        "bitwise ddp 4": on(4, bitwise=True),
        "bitwise fsdp 2": on(2, bitwise=True, dp_shard=2),
        "bitwise fsdp 3": on(3, bitwise=True, dp_shard=3),
        "bitwise fsdp 4, never": on(4, bitwise=True, dp_shard=4, **NEVER),
        "bitwise hsdp 2x2": on(4, bitwise=True, dp_replicate=2, dp_shard=2),
    },
    "Tensor parallel": {
        "tp 2": on(2, tp=2),
        "tp 4": on(4, tp=4),
        "ddp 2 x tp 2": on(4, tp=2),
        "fsdp 2 x tp 2": on(4, dp_shard=2, tp=2),
        "hsdp 2x2 x tp 2": on(8, dp_replicate=2, dp_shard=2, tp=2),
        "tp 3": on(3, tp=3),
    },
    "Context parallel": {
        "cp 2": on(2, cp=2),
        "cp 4": on(4, cp=4),
        "ulysses 2": on(2, cp=2, cp_method="ulysses"),
        "ulysses 4": on(4, cp=4, cp_method="ulysses"),
        "ring 2": on(2, documents=False, cp=2, cp_method="ring"),
        "ring 4": on(4, documents=False, cp=4, cp_method="ring"),
        "ring 2, documents": on(2, cp=2, cp_method="ring"),
        "ddp 2 x cp 2": on(4, cp=2),
        "fsdp 2 x cp 2": on(4, dp_shard=2, cp=2),
        "fsdp 2 x ulysses 2": on(4, dp_shard=2, cp=2, cp_method="ulysses"),
        "fsdp 2 x ring 2": on(4, documents=False, dp_shard=2, cp=2, cp_method="ring"),
        "cp 2 x tp 2": on(4, cp=2, tp=2),
        "ulysses 2 x tp 2": on(4, cp=2, tp=2, cp_method="ulysses"),
        "ring 2 x tp 2": on(4, documents=False, cp=2, tp=2, cp_method="ring"),
        "ulysses 2 x tp 4": on(8, cp=2, tp=4, cp_method="ulysses"),
        "fsdp 2 x cp 2 x tp 2": on(8, dp_shard=2, cp=2, tp=2),
    },
    "Pipeline": {
        "gpipe 2": on(2, pp=2, pp_schedule="gpipe"),
        "gpipe 4": on(4, pp=4, pp_schedule="gpipe"),
        "1f1b 2": on(2, pp=2),
        "1f1b 4": on(4, pp=4),
        "interleaved 2": on(2, pp=2, pp_schedule="interleaved_1f1b"),
        "interleaved 4": on(4, layers=8, pp=4, pp_schedule="interleaved_1f1b"),
        "interleaved 4, 4 blocks": on(4, pp=4, pp_schedule="interleaved_1f1b"),
        "zbv 2": on(2, pp=2, pp_schedule="zbv"),
        "zbv 4": on(4, layers=8, pp=4, pp_schedule="zbv"),
        "dualpipev 2": on(2, pp=2, pp_schedule="dualpipev"),
        "dualpipev 4": on(4, layers=8, pp=4, pp_schedule="dualpipev"),
        "1f1b 2 x ddp 2": on(4, pp=2),
        "1f1b 2 x fsdp 2": on(4, pp=2, dp_shard=2),
        "interleaved 2 x fsdp 2": on(4, pp=2, dp_shard=2, pp_schedule="interleaved_1f1b"),
        "zbv 2 x fsdp 2": on(4, pp=2, dp_shard=2, pp_schedule="zbv"),
        "bitwise 1f1b 2 x fsdp 2": on(4, bitwise=True, pp=2, dp_shard=2),
        "1f1b 2 x tp 2": on(4, pp=2, tp=2),
        "zbv 2 x tp 2": on(4, pp=2, tp=2, pp_schedule="zbv"),
        "1f1b 2 x cp 2": on(4, pp=2, cp=2),
        "1f1b 2 x fsdp 2 x tp 2": on(8, pp=2, dp_shard=2, tp=2),
        "1f1b 2 x cp 2 x tp 2": on(8, pp=2, cp=2, tp=2),
    },
    "Features together": {
        "ddp 2 x ulysses 2": on(4, cp=2, cp_method="ulysses"),
        "ddp 2 x ring 2": on(4, documents=False, cp=2, cp_method="ring"),
        "fsdp 2 x cp 2, over 2": on(4, dp_shard=2, cp=2, **OVER_2),
        "fsdp 2 x ring 2, never": on(4, documents=False, dp_shard=2, cp=2, cp_method="ring", **NEVER),
        "fsdp 2 x tp 2, never, offload": on(4, dp_shard=2, tp=2, **NEVER, **OFFLOAD),
        "fsdp 4 x ulysses 2, over 2, offload": on(8, dp_shard=4, cp=2, cp_method="ulysses", **OVER_2, **OFFLOAD),
        "fsdp 4 x tp 2, over 2": on(8, dp_shard=4, tp=2, **OVER_2),
        "hsdp 2x2 x cp 2, never, offload": on(8, dp_replicate=2, dp_shard=2, cp=2, **NEVER, **OFFLOAD),
        "hsdp 2x2 x ulysses 2, never": on(8, dp_replicate=2, dp_shard=2, cp=2, cp_method="ulysses", **NEVER),
        "hsdp 2x2 x ring 2, over 2, offload": on(
            8, documents=False, dp_replicate=2, dp_shard=2, cp=2, cp_method="ring", **OVER_2, **OFFLOAD
        ),
        "bitwise fsdp 4, over 2, offload": on(4, bitwise=True, dp_shard=4, **OVER_2, **OFFLOAD),
        "bitwise ddp 2 x tp 2": on(4, bitwise=True, tp=2),
        "bitwise ddp 2 x cp 2": on(4, bitwise=True, cp=2),
        "bitwise fsdp 2 x ulysses 2": on(4, bitwise=True, dp_shard=2, cp=2, cp_method="ulysses"),
        "bitwise fsdp 2 x ring 2": on(4, bitwise=True, documents=False, dp_shard=2, cp=2, cp_method="ring"),
        "1f1b 2 x hsdp 2x2, never, offload": on(8, pp=2, dp_replicate=2, dp_shard=2, **NEVER, **OFFLOAD),
        "1f1b 2 x ulysses 2": on(4, pp=2, cp=2, cp_method="ulysses"),
        "1f1b 2 x ring 2": on(4, documents=False, pp=2, cp=2, cp_method="ring"),
        "1f1b 2 x fsdp 2 x cp 2, over 2": on(8, pp=2, dp_shard=2, cp=2, **OVER_2),
        "bitwise 1f1b 2 x ddp 2": on(4, bitwise=True, pp=2),
        "gpipe 2 x fsdp 2 x tp 2": on(8, pp=2, pp_schedule="gpipe", dp_shard=2, tp=2),
        "gpipe 2 x hsdp 2x2, never, offload": on(
            8, pp=2, pp_schedule="gpipe", dp_replicate=2, dp_shard=2, **NEVER, **OFFLOAD
        ),
        "gpipe 2 x ddp 2 x cp 2": on(8, pp=2, pp_schedule="gpipe", cp=2),
        "gpipe 2 x ulysses 2": on(4, pp=2, pp_schedule="gpipe", cp=2, cp_method="ulysses"),
        "gpipe 2 x ring 2": on(4, documents=False, pp=2, pp_schedule="gpipe", cp=2, cp_method="ring"),
        "bitwise gpipe 2 x ddp 2": on(4, bitwise=True, pp=2, pp_schedule="gpipe"),
        "interleaved 2 x tp 2": on(4, pp=2, pp_schedule="interleaved_1f1b", tp=2),
        "interleaved 2 x hsdp 2x2, never, offload": on(
            8, pp=2, pp_schedule="interleaved_1f1b", dp_replicate=2, dp_shard=2, **NEVER, **OFFLOAD
        ),
        "interleaved 2 x ddp 2 x cp 2": on(8, pp=2, pp_schedule="interleaved_1f1b", cp=2),
        "interleaved 2 x ulysses 2": on(4, pp=2, pp_schedule="interleaved_1f1b", cp=2, cp_method="ulysses"),
        "interleaved 2 x ring 2": on(4, documents=False, pp=2, pp_schedule="interleaved_1f1b", cp=2, cp_method="ring"),
        "bitwise interleaved 2 x ddp 2": on(4, bitwise=True, pp=2, pp_schedule="interleaved_1f1b"),
        "zbv 2 x hsdp 2x2, never, offload": on(
            8, pp=2, pp_schedule="zbv", dp_replicate=2, dp_shard=2, **NEVER, **OFFLOAD
        ),
        "zbv 2 x ddp 2 x cp 2": on(8, pp=2, pp_schedule="zbv", cp=2),
        "zbv 2 x ulysses 2": on(4, pp=2, pp_schedule="zbv", cp=2, cp_method="ulysses"),
        "zbv 2 x ring 2": on(4, documents=False, pp=2, pp_schedule="zbv", cp=2, cp_method="ring"),
        "bitwise zbv 2 x ddp 2": on(4, bitwise=True, pp=2, pp_schedule="zbv"),
        "dualpipev 2 x fsdp 2 x tp 2, never, offload": on(
            8, pp=2, pp_schedule="dualpipev", dp_shard=2, tp=2, **NEVER, **OFFLOAD
        ),
        "dualpipev 2 x hsdp 2x2": on(8, pp=2, pp_schedule="dualpipev", dp_replicate=2, dp_shard=2),
        "dualpipev 2 x ddp 2 x cp 2": on(8, pp=2, pp_schedule="dualpipev", cp=2),
        "dualpipev 2 x ulysses 2": on(4, pp=2, pp_schedule="dualpipev", cp=2, cp_method="ulysses"),
        "dualpipev 2 x ring 2": on(4, documents=False, pp=2, pp_schedule="dualpipev", cp=2, cp_method="ring"),
        "bitwise dualpipev 2 x ddp 2": on(4, bitwise=True, pp=2, pp_schedule="dualpipev"),
    },
}
TOGETHER = "Features together"  # a layout for each pair of features that no layout above has; only plain cells are used
LAYOUTS: dict[str, Setup] = {name: setup for group in GROUPS.values() for name, setup in group.items()}
