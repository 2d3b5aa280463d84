"""The options of a run's checkpoints, recovery, records and processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shoal.config.option import opt


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When the state is saved, and how much is kept."""

    every: int = opt(
        100,
        "save; 0: only at the end",
        unit="steps",
        alias=("save_steps", "save_interval", "ckpt_interval", "save_every"),
        ge=0,
    )
    keep: int = opt(
        2,
        "checkpoints kept: the last so many, beside the best",
        unit="checkpoints",
        alias=("save_total_limit", "keep_last", "keep_latest_k"),
        ge=1,
    )
    keep_every: int = opt(0, "keep those of each so many steps too, for ever; 0: none", unit="steps", ge=0)
    keep_best: bool = opt(True, "keep the one with the lowest validation loss too")
    background: bool = opt(
        True,
        "train on while a checkpoint is written; it takes memory for a copy of what each process writes",
        alias=("async_save", "async", "async_mode"),
    )
    fast: str | None = opt(
        None, "a folder in memory or on a local disk (/dev/shm/x) for checkpoints that need not outlive the machine"
    )
    fast_every: int = opt(1, "save there too", unit="steps", ge=1)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is done where numbers go wrong."""

    max_skipped: int = opt(
        3,
        "steps in a row that may be left out for a loss or gradient that is no number, or for a spike; one more, and the "
        "run goes back to the last checkpoint and passes over these samples",
        unit="steps",
        ge=0,
    )
    spike_zscore: float | None = opt(
        None,
        "leave a step out whose loss is so many robust deviations above the recent ones; 6 to 10 are usual; null: none",
        gt=0,
    )
    straggler_factor: float | None = opt(
        1.3,
        "name a rank that is busy so many times as long as the others in a phase of a step, for several steps in a row; null: "
        "nobody looks",
        gt=1,
    )
    max_rollbacks: int = opt(3, "how often a run goes back without coming further, before it ends", ge=0)
    check_replicas_every: int = opt(
        100, "compare what replicas hold, to the bit, and before each checkpoint; 0: never", unit="steps", ge=0
    )


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What a run says of itself."""

    every: int = opt(
        1,
        "a line in metrics.jsonl",
        unit="steps",
        alias=("log_interval", "logging_steps", "log_every", "log_freq", "log_every_n_steps"),
        ge=1,
    )
    console_every: int | None = opt(
        None,
        "a step's line on the console, of those that metrics.every records; null: the first 3, the last, and so many in "
        "between that a run has at most about 40 (1, 2, 5, 10, ... apart)",
        unit="steps",
        ge=1,
    )
    split_every: int = opt(
        10, "measure the time split (data, forward, backward, reduce, optimizer)", unit="steps", ge=1
    )
    mfu_attention: Literal["causal", "full"] = opt(
        "causal", "what MFU counts for attention: the half that a causal mask needs, or all (the field's older habit)"
    )
    peak_tflops: float | None = opt(
        None,
        "the device's peak, for MFU; null: from the data sheet of a known GPU; a CPU and any other GPU then have no MFU",
        unit="TFLOP/s",
        gt=0,
    )


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Processes, and where a run is kept."""

    name: str | None = opt(None, "the run; null: the recipe's file name", alias=("run_name", "experiment_name"))
    runs: str = opt("runs", "folder of all runs", alias=("output_dir", "save_dir", "dump_folder", "out_dir"))
    processes: int | None = opt(
        None,
        "on this machine; null: every GPU, or 2 on a CPU",
        alias=("nproc_per_node", "num_processes", "devices", "gpus", "nproc"),
        akin=("world_size",),
        ge=1,
    )
    threads: int | None = opt(
        None,
        "CPU threads of a process; null: cores / processes, fewer where other programs use the cores; a run keeps what it began with",
        alias=("num_threads", "omp_num_threads"),
        ge=1,
    )
    nodes: int = opt(
        1,
        "machines, each of which runs the same command; with launch.min_nodes at most so many",
        alias=("nnodes", "num_nodes"),
        unit="machines",
        ge=1,
    )
    min_nodes: int | None = opt(
        None,
        "the run goes on with so few machines when others die, and with more when they come; null: launch.nodes",
        unit="machines",
        ge=1,
    )
    rendezvous: str | None = opt(
        None,
        "HOST:PORT where the machines meet: one of them, or any that runs shoal rendezvous HOST:PORT",
        alias=("rdzv_endpoint",),
        akin=("master_addr",),
    )
    join_seconds: float = opt(
        5.0, "when launch.min_nodes machines have come, others have so long to come too", unit="seconds", gt=0
    )
    port: int = opt(
        0,
        "TCP port at which the processes of one machine meet; 0: any that is free",
        alias=("master_port", "rdzv_port"),
        ge=0,
        le=65535,
    )
    max_restarts: int | None = opt(
        None,
        "a worker that dies or hangs is restarted at most so often; null: as long as steps are taken",
        unit="restarts",
        ge=0,
    )
    max_crashes: int = opt(
        3, "so many crashes without a step further, whatever their cause, end the run", unit="crashes", ge=1
    )
    timeout_seconds: float = opt(
        600.0,
        "a collective that takes longer ends the process; so does the start, a few batches of an evaluation, or a save of a worker",
        unit="seconds",
        gt=0,
    )
    hang_seconds: float | None = opt(
        None,
        "a step that takes longer is a hang, and the workers are started anew; null: learned from the run's own steps, ten times "
        "the slowest recent one and at least 20 seconds, and no hang on a CPU while the process works",
        unit="seconds",
        gt=0,
    )
    time_limit_minutes: float | None = opt(
        None,
        "the run saves and ends in time, with code 85; null: what is left of a Slurm job, if it is one",
        unit="minutes",
        akin=("max_time", "time_limit", "max_run_duration"),
        gt=0,
    )

    @property
    def fewest_nodes(self) -> int:
        """Machines without which the run waits."""
        return self.min_nodes or self.nodes
