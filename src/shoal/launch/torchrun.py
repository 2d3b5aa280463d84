"""
The launcher of `shoal train`, which starts its own workers through torch's elastic agent.

It holds the run's lock, forwards signals, and restarts the workers if one dies or hangs. It imports torch only after the
config has been checked.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

from shoal.config.layout import find_layout
from shoal.config.options import FLOAT16_ON_CPU, Config
from shoal.elastic.stops import SignalForwarder
from shoal.elastic.store_process import start_early
from shoal.errors import EXIT_REQUEUE, LaunchError
from shoal.mesh.place import LOCKED_BY, Place
from shoal.resolve.layout_checks import refusals, refusals_of_machines
from shoal.run.console import Console
from shoal.run.narrator import Narrator
from shoal.system.cpu import count_cores, free_cores
from shoal.system.signals import ends_when_asked
from shoal.system.torch_private import require
from shoal.trackers.alerts import FAILED, STOPPED, watched

WAIT_POLICY = "OMP_WAIT_POLICY"
HOW_IT_ENDED = {0: "the run finished", EXIT_REQUEUE: STOPPED}  # by exit code


def plan_processes(
    config: Config,
    gpus: int,
    *,
    before: Config | None = None,
    say: Callable[[str], None] = lambda text: None,
    has_sizes: bool = True,
) -> Config:
    """
    Return `config` with `launch.processes` and `launch.threads` chosen for this machine.

    Raises `LaunchError` if this machine cannot run the config.

    before: the config of the run to resume; None for a new run. say: a function called with a message if too few cores are free.
    has_sizes: whether the layout and the micro-batch are known, and checked; else they are chosen later, for these processes.
    """
    processes = count_processes(config, gpus)
    if has_sizes:
        _reject(refusals_of_machines(config, processes))
    config = config.replace("launch", processes=processes)
    threads = choose_threads(fixed_threads(config, count_cores() // processes, before), processes, say=say)
    return config.replace("launch", threads=threads)


def uses_cpu(config: Config, gpus: int) -> bool:
    """Return whether `config` trains on CPUs on a machine with this many GPUs."""
    return config.train.device == "cpu" or (config.train.device == "auto" and gpus == 0)


def count_processes(config: Config, gpus: int) -> int:
    """Return the number of processes of `config` on this machine. Raises `LaunchError` if it has no device for them."""
    use_cpu, cores = uses_cpu(config, gpus), count_cores()
    processes = config.launch.processes or _processes_for(config, min(2, cores) if use_cpu else gpus, grow=not use_cpu)
    if not use_cpu and gpus == 0:
        raise LaunchError(
            "train.device is cuda, but there is no CUDA device; set train.device to cpu, or check shoal env"
        )
    if not use_cpu and processes > gpus:
        raise LaunchError(
            f"{processes} processes need {processes} GPUs, but there are {gpus}; set launch.processes to {gpus} or less"
        )
    if use_cpu and config.train.dtype == "float16":
        raise LaunchError(FLOAT16_ON_CPU, option="train.dtype")
    if use_cpu and processes > 4 * cores:
        raise LaunchError(
            f"{processes} processes are too many for {cores} CPU cores; set launch.processes to {cores} or less"
        )
    return processes


def _processes_for(config: Config, usual: int, *, grow: bool) -> int:
    """
    Return the number of processes that the layout needs, or a multiple of it up to `usual` if an axis takes the remainder.

    usual: this machine's default number of processes. grow: whether to use a multiple even if the layout needs several processes.
    """
    layout = find_layout(config.parallel, None)
    if isinstance(layout, str):
        raise LaunchError(layout)
    fixed = layout.world_size
    if isinstance(find_layout(config.parallel, 2 * fixed), str):
        return fixed  # no axis takes the remainder
    return max(1, usual // fixed) * fixed if grow or fixed == 1 else fixed


def fixed_threads(config: Config, share: int, before: Config | None) -> int | None:
    """
    Return the CPU threads of a process if they are fixed, else None.

    They are fixed by the user, by `repro: bitwise` or a share of one core (one thread), or by the run to resume, whose config is
    `before`. The thread count changes the order of float additions, so a run with as many processes as before keeps its count
    while it fits in `share`, the cores per process.
    """
    if config.launch.threads or config.train.repro == "bitwise" or share <= 1:
        return config.launch.threads or 1
    kept = before.launch.threads if before and before.launch.processes == config.launch.processes else None
    return kept if kept and kept <= share else None


def choose_threads(fixed: int | None, processes: int = 1, *, say: Callable[[str], None]) -> int:
    """
    Return the CPU threads of a process: `fixed`, or its share of the cores that other programs leave free.

    If there are fewer free cores than threads or than cores in the share, this calls `say` and makes idle threads sleep. By
    default OpenMP's idle threads spin for some milliseconds. Spinning is faster on free cores. But if another program uses one
    thread's core, the other threads spin while they wait for it, and everything takes ten to fifty times as long. Call this
    before torch is imported.
    """
    cores = count_cores()
    share = max(1, cores // processes)
    if fixed == 1 or (fixed is None and share == 1):
        return 1
    free = free_cores()
    room = max(1, int(free / processes + 0.5))
    threads = fixed or min(room, share)
    if room < max(threads, share):
        os.environ.setdefault(WAIT_POLICY, "PASSIVE")
        what = f"{threads} CPU thread{'s' * (threads > 1)} per process"
        if room < share:
            why = f"other programs use {cores - free:.1f} of {cores} cores"
        else:  # the user asked for more threads than there are cores
            why = f"{processes} process{'es' * (processes > 1)} on {cores} core{'s' * (cores > 1)}"
        say(f"{why}: {what}" + (f" instead of {share}" if fixed is None else "; idle threads sleep"))
    return threads


def _reject(sentences: Iterable[str]) -> None:
    """Raise one `LaunchError` with all sentences, if there are any."""
    if found := list(sentences):
        raise LaunchError("\n".join(found))


def fit_to_place(config: Config, place: Place, before: Config | None = None) -> Config:
    """
    Return the config of a worker started by torchrun or srun: checked against `place`, with its threads chosen.

    Sets the variables of `worker_environment`, which torch reads on import. Raises `LaunchError` if the
    config does not fit the processes that were started.

    before: the config of the run to resume; None for a new run.
    """
    if config.launch.processes not in (None, place.local_world_size):
        raise LaunchError(
            f"launch.processes is {config.launch.processes}, but the launcher started {place.local_world_size} on this node; "
            "unset launch.processes here: the launcher decides"
        )
    _reject(refusals(config, place.world_size))
    share = max(1, count_cores() // place.local_world_size)
    # the machine's load is not measured: it would be that of the other workers, which start now too
    threads = fixed_threads(config, share, before) or share
    set_environment(threads)
    return config.replace("launch", threads=threads)


def count_gpus() -> int:
    """Return the number of CUDA devices that torch sees. Imports torch only if a driver is loaded."""
    if os.path.exists("/proc/driver/nvidia/version") or os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/dxg"):
        import torch

        return torch.cuda.device_count()
    return 0


def worker_environment(threads: int) -> dict[str, str]:
    """Return the variables that each worker's environment gets, unless the user has set them."""
    return {
        "OMP_NUM_THREADS": str(threads),
        # glibc returns large blocks to the kernel and gets them back zeroed at the next use: keep them instead
        "MALLOC_MMAP_THRESHOLD_": str(4 * 2**30),
        "MALLOC_TRIM_THRESHOLD_": str(16 * 2**30),
        # larger copies bypass the cache, which makes staging a checkpoint nearly twice as fast; and memory in huge pages, of
        # which the processor remembers the places of more: up to 1.5 times as fast in a virtual machine
        "GLIBC_TUNABLES": f"glibc.cpu.x86_non_temporal_threshold={4 * 2**20}:glibc.malloc.hugetlb=1",
        # cuBLAS is deterministic only with a fixed workspace
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        # one store prefix per attempt: otherwise a restart with gloo finds the dead worker's address
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }


def set_environment(threads: int) -> None:
    """Set the variables of `worker_environment` in this process. Call before torch is imported."""
    for name, value in worker_environment(threads).items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def _quiet_torch() -> Iterator[None]:
    """Turn off the C++ log of a torch imported in this block: a lost store then costs one line, not a C++ stack per attempt."""
    name = "TORCH_CPP_LOG_LEVEL"
    chosen = os.environ.get(name)
    os.environ.setdefault(name, "FATAL")
    yield
    if chosen is None:
        del os.environ[name]  # workers keep torch's own logging


def launch(config: Config, argv: Sequence[str]) -> int:
    """
    Run `shoal ARGV` in `launch.processes` workers on this node, one of `launch.nodes`; return the exit code.

    0: the run finished. 85: it was asked to stop before the end, and saved if it could; or it lost the rendezvous or too many
    nodes. 2: a worker found bad input, or the model does not fit in memory; the message is printed here once. 1: workers died
    more often than `launch.max_restarts` or `launch.max_crashes` allow, or too few nodes ever joined. Nodes that end together
    end with the same code.
    """
    console = Console()
    with watched(config, console) as ends:
        code = _launch(config, argv, console)
        here = " on this node" if config.launch.nodes > 1 else ""  # it may continue on the others
        ends(HOW_IT_ENDED.get(code, FAILED) + here)
    return code


def _launch(config: Config, argv: Sequence[str], console: Console) -> int:
    assert config.launch.processes
    assert config.launch.threads
    set_environment(config.launch.threads)
    os.environ[LOCKED_BY] = str(os.getpid())
    # The agent would raise in the middle of its work on other signals; we forward them and let the workers end.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    store_started = start_early(config.launch.rendezvous)
    narrator = Narrator.of(console)
    with ends_when_asked(EXIT_REQUEUE), _quiet_torch():
        narrator.begin("importing torch")
        require("processes")
        from shoal.elastic.supervise import run_workers

        stop = SignalForwarder()
    narrator.close()
    logging.getLogger("torch").setLevel(logging.CRITICAL)  # the agent logs forty lines per death; we print one
    count = config.launch.processes
    console.say(f"starting {count} process{'es' * (count > 1)}")
    return run_workers(config, argv, stop, store_started=store_started)
