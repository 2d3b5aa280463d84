"""The options of a run's checkpoints, recovery, records and processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shoal.config.option import opt


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When the state is saved, and which checkpoints are kept."""

    every: int = opt(
        100,
        "interval between checkpoints; 0: only at the end",
        unit="steps",
        alias=("save_steps", "save_interval", "ckpt_interval", "save_every"),
        ge=0,
    )
    keep: int = opt(
        2,
        "number of latest checkpoints to keep, in addition to the best",
        unit="checkpoints",
        alias=("save_total_limit", "keep_last", "keep_latest_k"),
        ge=1,
    )
    keep_every: int = opt(0, "also keep every Nth step's checkpoint permanently; 0 disables this", unit="steps", ge=0)
    keep_best: bool = opt(True, "also keep the checkpoint with the lowest validation loss")
    background: bool = opt(
        True,
        "write checkpoints while training continues; takes memory to copy the tensors that each process writes",
        alias=("async_save", "async", "async_mode"),
    )
    fast: str | None = opt(
        None,
        "folder in memory or on a local disk (/dev/shm/x) for further checkpoints that need not outlive the "
        "machine; null disables them",
    )
    fast_every: int = opt(1, "interval between checkpoints in checkpoint.fast", unit="steps", ge=1)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """The response to NaN, Inf, loss spikes, stragglers and diverging replicas."""

    max_skipped: int = opt(
        3,
        "maximum consecutive steps skipped for NaN, Inf or a loss spike; one more, and the run rolls back to the "
        "last checkpoint and skips the samples of all these steps",
        unit="steps",
        ge=0,
    )
    spike_zscore: float | None = opt(
        None,
        "skip a step whose loss is this many robust standard deviations above recent losses; 6 to 10 are usual; "
        "null disables this",
        gt=0,
    )
    straggler_factor: float | None = opt(
        1.3,
        "report a rank that takes longer than this multiple of its peers' median time in a phase of a step, for several "
        "steps in a row; null disables this",
        gt=1,
    )
    max_rollbacks: int = opt(3, "maximum rollbacks without progress before the run ends", ge=0)
    check_replicas_every: int = opt(
        100,
        "interval between bitwise comparisons of the replicas, also made before each checkpoint; 0: never",
        unit="steps",
        ge=0,
    )


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What a run records and reports."""

    every: int = opt(
        1,
        "interval between lines in metrics.jsonl",
        unit="steps",
        alias=("log_interval", "logging_steps", "log_every", "log_freq", "log_every_n_steps"),
        ge=1,
    )
    console_every: int | None = opt(
        None,
        "interval between console lines, in steps that metrics.every records; null: the smallest of 1, 2, 5, 10, ... "
        "that gives at most about 40 lines, in addition to the first 3 steps and the last",
        unit="steps",
        ge=1,
    )
    split_every: int = opt(
        10,
        "interval between measurements of the time split (data, forward, backward, reduce, optimizer)",
        unit="steps",
        ge=1,
    )
    mfu_attention: Literal["causal", "full"] = opt(
        "causal", "attention FLOPs that MFU counts. causal: the half that a causal mask needs; full: all"
    )
    peak_tflops: float | None = opt(
        None,
        "the device's peak throughput, for MFU; null: from the data sheet of a known GPU, and no MFU on other devices",
        unit="TFLOP/s",
        gt=0,
    )
    report: bool = opt(True, "write report.html into the run's folder when the run ends")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The processes of a run and its folder."""

    name: str | None = opt(None, "name of the run; null: the recipe's file name", alias=("run_name", "experiment_name"))
    runs: str = opt("runs", "folder of all runs", alias=("output_dir", "save_dir", "dump_folder", "out_dir"))
    processes: int | None = opt(
        None,
        "processes on this node; null: one per GPU, or up to 2 on a CPU; more if the layout needs them",
        alias=("nproc_per_node", "gpus_per_node", "num_processes", "devices", "gpus", "nproc"),
        akin=("world_size",),
        ge=1,
    )
    threads: int | None = opt(
        None,
        "CPU threads per process; null: cores / processes, fewer if other programs use the cores; a resumed run "
        "keeps its number of threads",
        alias=("num_threads", "omp_num_threads"),
        ge=1,
    )
    auto_seconds: float = opt(
        60.0,
        "with parallel auto or train.micro_batch auto: maximum duration of the trials before the first step; 0: choose by the "
        "plan alone",
        unit="seconds",
        ge=0,
    )
    nodes: int = opt(
        1,
        "nodes, each of which runs the same command; with launch.min_nodes, the maximum",
        alias=("nnodes", "num_nodes"),
        unit="nodes",
        ge=1,
    )
    min_nodes: int | None = opt(
        None,
        "minimum nodes: the run continues with this many if others fail, and grows again when nodes join; null: "
        "launch.nodes",
        unit="nodes",
        ge=1,
    )
    rendezvous: str | None = opt(
        None,
        "HOST:PORT where the nodes meet: one of them, or a machine that runs shoal rendezvous HOST:PORT",
        alias=("rdzv_endpoint",),
        akin=("master_addr",),
    )
    join_seconds: float = opt(
        5.0, "how long to wait for further nodes after launch.min_nodes nodes have joined", unit="seconds", gt=0
    )
    port: int = opt(
        0,
        "TCP port where the processes of one node meet; 0: any free port",
        alias=("master_port", "rdzv_port"),
        ge=0,
        le=65535,
    )
    max_restarts: int | None = opt(
        None,
        "maximum restarts of workers that die or hang; null: no limit while the run makes progress",
        unit="restarts",
        ge=0,
    )
    max_crashes: int = opt(
        3, "number of crashes without progress, whatever their cause, after which the run ends", unit="crashes", ge=1
    )
    timeout_seconds: float = opt(
        600.0,
        "maximum duration of a collective, of startup, of a few evaluation batches and of a worker's save; "
        "a process that exceeds it ends",
        unit="seconds",
        gt=0,
    )
    hang_seconds: float | None = opt(
        None,
        "maximum duration of a step; beyond it the workers are restarted. null: ten times the slowest recent "
        "step, at least 20 seconds, and on a CPU only once the late process is idle",
        unit="seconds",
        gt=0,
    )
    time_limit_minutes: float | None = opt(
        None,
        "the run saves and ends before this limit, with exit code 85; null: the time left of the Slurm job, if the run is in one",
        unit="minutes",
        akin=("max_time", "time_limit", "max_run_duration"),
        gt=0,
    )

    @property
    def fewest_nodes(self) -> int:
        """The minimum number of nodes; with fewer, the run waits for more, up to `timeout_seconds`."""
        return self.min_nodes or self.nodes
