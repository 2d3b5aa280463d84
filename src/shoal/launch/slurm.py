"""The batch script of a Slurm job that trains a run, as text for people to read and edit. No torch."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shoal.errors import LaunchError
from shoal.launch.site import Site
from shoal.run.events import read_json_lines
from shoal.run.records import read_metrics
from shoal.system.output import on_one_line

SCRIPT: Final = "job.sbatch"  # in RUN/jobs
RECIPE: Final = "recipe.yaml"  # the recipe as submitted, in RUN/jobs
FINISHED: Final = "finished"  # in RUN; its existence stops a chain of jobs
_DEFAULT_LEAD: Final = 300
_MOST_LEAD: Final = 65535  # seconds, Slurm's maximum
_CLEARING_SECONDS: Final = 60  # to remove the staged data
_RECENT: Final = 20  # saves, and records of steps
TASK: Final = "{task}"  # in a flag's value: the index of an array's task


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a job asks of Slurm, and what it runs."""

    name: str  # of the run
    run: Path  # the run's folder, absolute; with an array, its name has `TASK`
    directory: Path  # working directory, absolute
    shoal: str  # the shoal command on the nodes, absolute
    command: str  # the command line that wrote this script
    flags: Sequence[str]  # of shoal train, besides those that this script sets itself
    nodes: int
    spare_nodes: int = 0
    min_nodes: int | None = None
    processes: int | None = None
    gpus: int = 0  # per node
    minutes: float | None = None
    signal_seconds: int = 300  # before the limit
    max_requeues: int = 50
    requeue: bool = True  # else further jobs continue the run
    array: str | None = None
    dependency: str | None = None
    stage: Path | None = None  # folder of prepared tokens to copy to each node's own disk
    rendezvous: str | None = None  # chosen by the user, else on the job's first node

    @property
    def total_nodes(self) -> int:
        return self.nodes + self.spare_nodes

    @property
    def survives_a_node(self) -> bool:
        """Whether the job continues if one of its nodes fails."""
        return self.spare_nodes > 0 or (self.min_nodes or self.nodes) < self.nodes


def script(job: Job, site: Site) -> str:
    """Return the text of the batch script. Raises `LaunchError` for a folder that it cannot name."""
    for path in (job.run, job.directory):
        if set('\n"') & set(str(path)):
            raise LaunchError(
                f"{on_one_line(path)} has a quote or a line feed in its name, which #SBATCH lines cannot have"
            )
    parts = [_head(job, site), _requests(job, site), _environment(job, site), _beginning(job), _staging(job, site)]
    parts += [_training(job, site), _ending(job)]
    return "\n\n".join("\n".join(lines) for part in parts if (lines := list(part))) + "\n"


def signal_lead(run: Path, minutes: float | None) -> int:
    """
    Return how long before the job's limit Slurm signals it, in seconds: two saves, three steps, and half a minute.

    Both are the slowest recent ones of the run; before its first save, 300 seconds are assumed, or a quarter of a shorter limit.
    Slurm may send the signal up to a minute earlier, never later. Raises `LaunchError` if the job would end before it had saved.

    minutes: the job's limit; None: unknown.
    """
    events = read_json_lines(run / "events.jsonl")
    saves = [float(e["seconds"]) for e in events if e.get("event") == "saved" and "seconds" in e]
    if not saves:
        return _DEFAULT_LEAD if minutes is None else round(min(_DEFAULT_LEAD, 15 * minutes))
    steps = [record.step_seconds for record in read_metrics(run / "metrics.jsonl").steps[-_RECENT:]]
    needed = min(_MOST_LEAD, max(60, round(2 * max(saves[-_RECENT:]) + 3 * max(steps, default=0.0) + 30)))
    if minutes is not None and needed > 0.8 * 60 * minutes:
        raise LaunchError(
            f"the time limit of {minutes:g} minutes is too short: a save of this run takes up to {max(saves[-_RECENT:]):.0f} s, so "
            f"the job would be signaled {needed} s before its limit; set a --time of at least {slurm_time(needed / 24)}"
        )
    return needed


def slurm_time(minutes: float) -> str:
    """Return a duration in Slurm's form, D-HH:MM:SS, without empty days."""
    seconds = max(60, round(60 * minutes))
    days, rest = divmod(seconds, 86400)
    clock = f"{rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{days}-{clock}" if days else clock


def _head(job: Job, site: Site) -> Iterator[str]:
    spares = f" and {job.spare_nodes} spare" if job.spare_nodes else ""
    each = f", {job.processes} process{'es' * (job.processes > 1)} on each" if job.processes else ""
    yield "#!/bin/bash" + " -l" * bool(site.modules)  # a login shell has the command module
    yield f"# Trains {job.name} on {job.nodes} node{'s' * (job.nodes > 1)}{spares}{each}. Written by"
    yield f"#   {on_one_line(job.command)}"
    yield f"# Submit it with: sbatch {shlex.quote(str(_in_bash_text(job) / 'jobs' / SCRIPT))}"


def _in_bash_text(job: Job) -> Path:
    return Path(str(job.run).replace(TASK, "0"))


def _requests(job: Job, site: Site) -> Iterator[str]:
    """Yield the #SBATCH lines, each with a comment if its reason is not obvious."""

    def ask(option: str, why: str = "") -> str:
        line = f"#SBATCH {option}"
        return f"{line:<47} # {why}" if why else line

    output = f"{job.run / 'jobs'}/".replace("%", "%%").replace(TASK, "%a") + "%j.log"
    yield ask(f"--job-name={_quoted(job.name.replace(TASK, ''))}")
    yield ask(
        f"--nodes={job.total_nodes}",
        f"{job.nodes} train, the others wait to replace one that fails" * (job.spare_nodes > 0),
    )
    yield ask("--ntasks-per-node=1", "one launcher; it starts the node's processes")
    if job.gpus:
        yield ask(f"--gres=gpu:{f'{site.gpu_type}:' if site.gpu_type else ''}{job.gpus}", "GPUs of each node")
    if site.cpus_per_node:
        yield ask(f"--cpus-per-task={site.cpus_per_node}")
    else:
        yield ask("--exclusive", "whole nodes, with all their cores")
    if site.memory_per_node or not site.cpus_per_node:
        yield ask(f"--mem={site.memory_per_node or 0}", "all memory of the node" * (not site.memory_per_node))
    if job.minutes is not None:
        yield ask(f"--time={slurm_time(job.minutes)}")
    for name in ("partition", "account", "qos", "constraint", "reservation"):
        if value := getattr(site, name):
            yield ask(f"--{name}={_quoted(value)}")
    lead = min(_MOST_LEAD, job.signal_seconds + (_CLEARING_SECONDS if job.stage else 0))
    yield ask(f"--signal=B:USR2@{lead}", "seconds before the limit: see the trap below")
    yield ask(
        "--requeue" if job.requeue else "--no-requeue", "Slurm may start it again after a node failure" * job.requeue
    )
    if job.survives_a_node:
        yield ask("--no-kill", "a failed node does not end the job")
    if job.array:
        yield ask(f"--array={_quoted(job.array)}")
    if job.dependency:
        yield ask(f"--dependency={_quoted(job.dependency)}")
    yield ask(f"--chdir={_quoted(str(job.directory))}")
    yield ask(f"--output={_quoted(output)}")
    yield ask("--open-mode=append", "a requeued job keeps its log")
    for option in site.sbatch:
        yield ask(option)


def _environment(job: Job, site: Site) -> Iterator[str]:
    for module in site.modules:
        yield f"module load {shlex.quote(module)} || exit"
    yield from site.setup
    for name, value in variables(site).items():
        yield f"export {name}={shlex.quote(value)}"
    yield "unset RANK WORLD_SIZE MASTER_ADDR MASTER_PORT  # of another launcher, where the job was submitted"
    yield "# All of the job's cores on a node: srun would give a launcher only one. The variable's form is 16(x2),8."
    yield "export SRUN_CPUS_PER_TASK=${SLURM_JOB_CPUS_PER_NODE%%[(,]*}"


def variables(site: Site) -> dict[str, str]:
    """Return the environment variables for the site's network, and the site's own, which win."""
    found: dict[str, str] = {}
    match site.fabric:
        case "ethernet":
            found["NCCL_IB_DISABLE"] = "1"
        case "infiniband":
            found["NCCL_IB_DISABLE"] = "0"
        case "efa":
            found |= {"FI_PROVIDER": "efa", "FI_EFA_USE_DEVICE_RDMA": "1"}
    if site.interface:
        found |= {"GLOO_SOCKET_IFNAME": site.interface, "NCCL_SOCKET_IFNAME": site.interface}
    return found | dict(site.environment)


def _beginning(job: Job) -> Iterator[str]:
    yield f"shoal={shlex.quote(job.shoal)}"
    yield f"run={_in_script(str(job.run))}"
    yield f'[ -e "$run/{FINISHED}" ] && {{ echo "the run has finished: nothing to do"; exit 0; }}'
    yield ""
    yield "# Before the limit Slurm sends USR2 to this script. srun passes USR1 to the launchers, which save and end with code 85."
    yield "# It is repeated because srun drops it while it starts the launchers."
    yield "signal=none again=yes step="
    yield 'to_launchers() { while [ "$step" ] && kill -USR1 "$step" 2>/dev/null; do sleep 5; done; }'
    yield "trap 'signal=USR2 again=yes; to_launchers &' USR2"
    yield "trap 'signal=TERM again=yes' TERM  # the job is over: cancelled, preempted or beyond its limit"
    yield ""
    began = f'"$shoal" launch began "$run" --max-requeues {job.max_requeues}'
    if job.nodes == 1:
        yield "# Record this job, and end it if the jobs before it made no progress."
        yield f"{began} || exit"
        return
    yield "# Record this job, and end it if the jobs before it made no progress. This prints where the launchers meet: the name of"
    yield "# the first node, or its address if the name leads to a loopback address, and a port that depends on the job's number."
    yield f"rendezvous=$({began}) || exit"


def _in_script(text: str) -> str:
    """Quote `text` for bash, with the task's index where it has `TASK`."""
    return '"$SLURM_ARRAY_TASK_ID"'.join(shlex.quote(part) if part else "" for part in text.split(TASK))


def _staging(job: Job, site: Site) -> Iterator[str]:
    if job.stage is None:
        return
    scratch = shlex.quote(site.scratch) if site.scratch else '"${SLURM_TMPDIR:-/tmp}"'
    yield "# Copy the prepared tokens to each node's own disk. A copy that an earlier start left may be incomplete."
    yield f"scratch={scratch}/shoal-$SLURM_JOB_ID"
    copy = f'rm -rf "$1" && mkdir -p "$1" && cp -rL {shlex.quote(str(job.stage))}/. "$1"'
    yield "# shellcheck disable=SC2016  # each node's bash expands $1"
    yield f'srun --ntasks-per-node=1 bash -c {shlex.quote(copy)} - "$scratch" || exit'


def _training(job: Job, site: Site) -> Iterator[str]:
    wait = 0
    if job.survives_a_node or job.nodes == 1:
        yield "# One launcher on each node. One that ends does not end the others, which save or continue without it."
    else:
        wait = max(60, job.signal_seconds)
        yield f"# One launcher on each node. If one ends, the others have {wait} s to end too: they cannot continue without it."
    srun = ["srun", "--ntasks-per-node=1", "--kill-on-bad-exit=0", f"--wait={wait}"]
    srun += ["--no-kill"] * job.survives_a_node + ["--label"] * (job.total_nodes > 1)
    shoal = '"$shoal"' if site.container is None else shlex.quote(site.container_shoal)
    lines = [" ".join([*srun, *_container(job, site)]), f'{shoal} train "$run/jobs/{RECIPE}"', *_flags(job)]
    yield " \\\n  ".join(lines) + " &"
    yield "step=$!"
    if job.survives_a_node:
        yield "# srun would wait forever for a node that failed and came back. This ends it when nothing trains the run any more."
        yield '"$shoal" launch watch "$run" --srun "$step" &'


def _flags(job: Job) -> Iterator[str]:
    """Yield the flags of shoal train, quoted for bash."""
    yield f"--launch.name={_in_script(job.name)}"
    yield f"--launch.runs={_in_script(str(job.run.parent))}"
    yield from (_in_script(flag) for flag in job.flags)
    if job.processes:
        yield f"--launch.processes={job.processes}"
    if job.stage:
        yield '--data.folder="$scratch"'
    if job.nodes > 1:
        yield f"--launch.nodes={job.nodes}"
        yield (
            f"--launch.rendezvous={shlex.quote(job.rendezvous)}"
            if job.rendezvous
            else '--launch.rendezvous="$rendezvous"'
        )


def _container(job: Job, site: Site) -> list[str]:
    """Return the words that start the container: options of srun for pyxis, else a command."""
    if site.container is None:
        return []
    mounts = [f"{job.directory}:{job.directory}", f"{job.run.parent}:{job.run.parent}", *site.container_mounts]
    joined = shlex.quote(",".join(dict.fromkeys(mounts))) + ',"$scratch:$scratch"' * (job.stage is not None)
    image = shlex.quote(site.container)
    if site.container_runtime == "pyxis":
        return [
            f"--container-image={image}",
            f"--container-mounts={joined}",
            f"--container-workdir={shlex.quote(str(job.directory))}",
        ]
    gpu = ["--nv"] if job.gpus else []
    return [site.container_runtime, "exec", *gpu, f"--bind={joined}", f"--pwd={shlex.quote(str(job.directory))}", image]


def _ending(job: Job) -> Iterator[str]:
    yield '[ "$signal" = USR2 ] && to_launchers &  # signaled before they were started'
    yield "# A signal ends wait early. After TERM there is little time: the launchers have it too, and save on their own."
    yield 'code=143; while [ "$again" = yes ] && [ "$signal" != TERM ]; do again=no; wait "$step"; code=$?; done'
    yield ""
    if job.stage is not None:
        yield f'[ "$signal" = TERM ] || timeout {_CLEARING_SECONDS} srun --ntasks-per-node=1 rm -rf "$scratch"'
        yield ""
    yield "trap '' USR2 TERM  # they would end the last command, which inherits no other trap"
    how = " --no-requeue" * (not job.requeue)
    yield "# Let another job continue the run until it is finished, as long as it makes progress: by requeuing this job, or else by"
    yield "# submitting this script again."
    yield f'exec "$shoal" launch ended "$run" --code "$code" --signal "$signal" --max-requeues {job.max_requeues}{how}'


def _quoted(text: str) -> str:
    """Quote a value of an #SBATCH line, which is not read by a shell."""
    return f'"{text}"' if any(c in " \t#\\'" for c in text) else text
