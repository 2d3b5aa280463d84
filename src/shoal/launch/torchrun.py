"""
`shoal train` starts its own workers, through torch's elastic agent.

The launcher holds the run's lock, passes signals on, and starts the workers anew when one dies or hangs. It imports
torch only when the config is known to be good.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

from shoal.config.layout import find_layout
from shoal.config.options import FLOAT16_ON_CPU, Config
from shoal.elastic.stops import PassOn
from shoal.errors import EXIT_REQUEUE, LaunchError
from shoal.mesh.place import LOCKED_BY, Place
from shoal.resolve.layout_checks import refusals, refusals_of_machines
from shoal.run.console import Console
from shoal.run.narrator import Narrator
from shoal.system.cpu import count_cores, free_cores
from shoal.system.signals import ends_when_asked
from shoal.system.torch_private import require

WAIT_POLICY = "OMP_WAIT_POLICY"


def plan_processes(
    config: Config, gpus: int, *, before: Config | None = None, say: Callable[[str], None] = lambda text: None
) -> Config:
    """
    Settle `launch.processes` and `launch.threads` for this machine. Raises `LaunchError`.

    before: the config of the run that goes on. say: told where other programs use the cores.
    """
    use_cpu = config.train.device == "cpu" or (config.train.device == "auto" and gpus == 0)
    cores = count_cores()
    processes = config.launch.processes or _processes_for(config, min(2, cores) if use_cpu else gpus, grow=not use_cpu)
    if not use_cpu and gpus == 0:
        raise LaunchError(
            "train.device is cuda, but there is no CUDA device; set train.device to cpu, or see shoal env"
        )
    if not use_cpu and processes > gpus:
        raise LaunchError(
            f"{processes} processes need as many GPUs, and there are {gpus}; set launch.processes to {gpus} or less"
        )
    if use_cpu and config.train.dtype == "float16":
        raise LaunchError(FLOAT16_ON_CPU, option="train.dtype")
    if use_cpu and processes > 4 * cores:
        raise LaunchError(
            f"{processes} processes on {cores} CPU cores would only wait for each other; set launch.processes to {cores} or less"
        )
    _refuse(refusals_of_machines(config, processes))
    config = config.replace("launch", processes=processes)
    threads = choose_threads(settled_threads(config, cores // processes, before), processes, say=say)
    return config.replace("launch", threads=threads)


def _processes_for(config: Config, usual: int, *, grow: bool) -> int:
    """As many processes as the layout needs; where an axis takes what remains, on GPUs as many as there are."""
    layout = find_layout(config.parallel, None)
    if isinstance(layout, str):
        raise LaunchError(layout)
    fixed = layout.world_size
    if isinstance(find_layout(config.parallel, 2 * fixed), str):
        return fixed  # no axis takes what remains
    return max(1, usual // fixed) * fixed if grow or fixed == 1 else fixed


def settled_threads(config: Config, share: int, before: Config | None) -> int | None:
    """
    Return the CPU threads of a process where they are not free to choose: typed, one for bitwise, or those of the run.

    Another number of threads adds in another order: a run keeps its own as long as `share`, the cores of a process, has
    room for them.
    """
    if config.launch.threads or config.train.repro == "bitwise" or share <= 1:
        return config.launch.threads or 1
    kept = before.launch.threads if before and before.launch.processes == config.launch.processes else None
    return kept if kept and kept <= share else None


def choose_threads(settled: int | None, processes: int = 1, *, say: Callable[[str], None]) -> int:
    """
    Return the CPU threads of a process: the `settled` ones, or its share of the cores that other programs leave free.

    Where there are fewer free cores than threads, `say` is told, and threads without work will sleep. Elsewhere they spin
    for some milliseconds, as OpenMP has it: that is faster, but where another program has the core of one thread, the
    others burn theirs, and all take ten to fifty times as long. To be called before torch is imported.
    """
    cores = count_cores()
    share = max(1, cores // processes)
    if settled == 1 or (settled is None and share == 1):
        return 1
    free = free_cores()
    room = max(1, int(free / processes + 0.5))
    threads = settled or min(room, share)
    if room < max(threads, share):
        os.environ.setdefault(WAIT_POLICY, "PASSIVE")
        what = f"{threads} CPU thread{'s' * (threads > 1)} a process"
        if room < share:
            why = f"other programs use {cores - free:.1f} of {cores} cores"
        else:  # more threads were asked for than there are cores, whatever others do
            why = f"{processes} process{'es' * (processes > 1)} on {cores} core{'s' * (cores > 1)}"
        say(f"{why}: {what}" + (f" instead of {share}" if settled is None else ", asleep while they wait"))
    return threads


def _refuse(sentences: Iterable[str]) -> None:
    """Raise `LaunchError` with all of them, if there is one."""
    if found := list(sentences):
        raise LaunchError("\n".join(found))


def fit_to_place(config: Config, place: Place, before: Config | None = None) -> Config:
    """
    The config of a worker that torchrun or srun started, checked against what they started; threads are settled.

    before: the config of the run that goes on.

    Raises `LaunchError`. Sets the environment of `worker_environment`, which torch reads when it is imported.
    """
    if config.launch.processes not in (None, place.local_world_size):
        raise LaunchError(
            f"launch.processes is {config.launch.processes}, but {place.local_world_size} were started on this machine; "
            "leave it out here: the launcher decides"
        )
    _refuse(refusals(config, place.world_size))
    share = max(1, count_cores() // place.local_world_size)
    # the load is not looked at: it would be that of the other workers, which start too
    threads = settled_threads(config, share, before) or share
    set_environment(threads)
    return config.replace("launch", threads=threads)


def count_gpus() -> int:
    """CUDA devices that torch will see here. Imports torch only where a driver is loaded."""
    if os.path.exists("/proc/driver/nvidia/version") or os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/dxg"):
        import torch

        return torch.cuda.device_count()
    return 0


def worker_environment(threads: int) -> dict[str, str]:
    """What each worker's environment gets, unless the person set it already."""
    return {
        "OMP_NUM_THREADS": str(threads),
        # glibc gives large blocks back to the kernel at once and asks for them again, zeroed, at the next use: keep them
        "MALLOC_MMAP_THRESHOLD_": str(4 * 2**30),
        "MALLOC_TRIM_THRESHOLD_": str(16 * 2**30),
        # copies of more than this leave the cache alone: staging a checkpoint is nearly twice as fast
        "GLIBC_TUNABLES": f"glibc.cpu.x86_non_temporal_threshold={4 * 2**20}",
        # cuBLAS chooses the same kernels every time only with a workspace of its own
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        # a prefix of the store for each attempt: without it a restart with gloo meets the dead worker's address
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }


def set_environment(threads: int) -> None:
    """`worker_environment` for this process, before torch is imported."""
    for name, value in worker_environment(threads).items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def _quiet_torch() -> Iterator[None]:
    """While torch is imported: a store that has gone costs one line of ours, and not a stack of C++ for each attempt."""
    name = "TORCH_CPP_LOG_LEVEL"
    chosen = os.environ.get(name)
    os.environ.setdefault(name, "FATAL")
    yield
    if chosen is None:
        del os.environ[name]  # workers have their own to say


def launch(config: Config, argv: Sequence[str]) -> int:
    """
    Run `shoal ARGV` in `launch.processes` workers on this machine, one of `launch.nodes`, until they end; the exit code.

    0 when they finished, 85 when somebody asked them, or one of them, to stop before the end (they saved where they
    could), 2 when a worker met bad input (what it left is said here, once), 1 when workers died more often than
    `launch.max_restarts` or `launch.max_crashes` allow. On several machines all end with the same code.
    """
    assert config.launch.processes
    assert config.launch.threads
    set_environment(config.launch.threads)
    os.environ[LOCKED_BY] = str(os.getpid())
    # The agent would raise in the middle of its work on these; we pass them on and let the workers end.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    console = Console()
    narrator = Narrator.of(console)
    with ends_when_asked(EXIT_REQUEUE), _quiet_torch():
        narrator.begin("importing torch")
        require("processes")
        from shoal.elastic.agent import run_workers

        stop = PassOn()
    narrator.close()
    logging.getLogger("torch").setLevel(logging.CRITICAL)  # the agent tells each death in forty lines; we in one
    count = config.launch.processes
    console.say(f"starting {count} process{'es' * (count > 1)}")
    return run_workers(config, argv, stop)
