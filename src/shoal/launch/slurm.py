"""The batch script of a Slurm job that trains a run, as text for people to read and edit. No torch."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shoal.launch.site import Site

SCRIPT: Final = "job.sbatch"  # in RUN/jobs
RECIPE: Final = "recipe.yaml"  # the recipe as submitted, in RUN/jobs
FINISHED: Final = "finished"  # in RUN; its existence stops a chain of jobs
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
    requeue: bool = True  # else only a chain of jobs continues the run
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
    """Return the text of the batch script."""
    parts = [_head(job), _requests(job, site), _environment(job, site), _beginning(job), _staging(job, site)]
    parts += [_training(job, site), _ending(job)]
    return "\n\n".join("\n".join(lines) for part in parts if (lines := list(part))) + "\n"


def signal_lead(save_seconds: float | None, step_seconds: float | None) -> int:
    """
    Return how long before the job's limit Slurm signals it, in seconds: two saves, three steps, and half a minute.

    save_seconds, step_seconds: the slowest that the run has measured; None if it has not. Without a save: 300 seconds. Slurm may
    send the signal up to a minute earlier, never later.
    """
    if save_seconds is None:
        return 300
    return min(65535, max(60, round(2 * save_seconds + 3 * (step_seconds or 0.0) + 30)))


def slurm_time(minutes: float) -> str:
    """Return a duration in Slurm's form, D-HH:MM:SS, without empty days."""
    seconds = max(60, round(60 * minutes))
    days, rest = divmod(seconds, 86400)
    clock = f"{rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{days}-{clock}" if days else clock


def _head(job: Job) -> Iterator[str]:
    spares = f" and {job.spare_nodes} spare" if job.spare_nodes else ""
    each = f", {job.processes} processes on each" if job.processes else ""
    yield "#!/bin/bash"
    yield f"# Trains {job.name} on {job.nodes} node{'s' * (job.nodes > 1)}{spares}{each}. Written by"
    yield f"#   {job.command}"
    yield f"# Submit it with: sbatch {shlex.quote(str(_in_bash_text(job) / 'jobs' / SCRIPT))}"


def _in_bash_text(job: Job) -> Path:
    return Path(str(job.run).replace(TASK, "0"))


def _requests(job: Job, site: Site) -> Iterator[str]:
    """Yield the #SBATCH lines, each with a comment if its reason is not obvious."""

    def ask(option: str, why: str = "") -> str:
        line = f"#SBATCH {option}"
        return f"{line:<47} # {why}" if why else line

    output = str(job.run / "jobs" / "%j.log").replace(TASK, "%a")
    yield ask(f"--job-name={_quoted(job.name.replace(TASK, ''))}")
    yield ask(f"--nodes={job.total_nodes}", f"{job.nodes} train, the others wait to replace one that fails" * (job.spare_nodes > 0))
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
    yield ask(f"--signal=B:USR2@{job.signal_seconds}", "seconds before the limit: see the trap below")
    yield ask("--requeue" if job.requeue else "--no-requeue", "Slurm may start it again after a node failure" * job.requeue)
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
        yield f"module load {shlex.quote(module)}"
    yield from site.setup
    for name, value in variables(site).items():
        yield f"export {name}={shlex.quote(value)}"
    yield "unset RANK WORLD_SIZE MASTER_ADDR MASTER_PORT  # of another launcher, where the job was submitted"
    yield "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_ON_NODE  # all of the job's cores: srun would give a launcher only one"


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
    yield "# Record this job, and end it if the jobs before it made no progress. Prints the address where the nodes meet:"
    yield "# this node's name, or its address if the name leads to a loopback address."
    yield f'head=$("$shoal" launch began "$run" --max-requeues {job.max_requeues}) || exit'
    yield "port=$((10000 + SLURM_JOB_ID % 20000))  # another one for each job"


def _in_script(text: str) -> str:
    """Quote `text` for bash, with the task's index where it has `TASK`."""
    return '"$SLURM_ARRAY_TASK_ID"'.join(shlex.quote(part) if part else "" for part in text.split(TASK))


def _staging(job: Job, site: Site) -> Iterator[str]:
    if job.stage is None:
        return
    scratch = shlex.quote(site.scratch) if site.scratch else '"${SLURM_TMPDIR:-/tmp}"'
    yield "# Copy the prepared tokens to each node's own disk."
    yield f"scratch={scratch}/shoal-$SLURM_JOB_ID"
    yield f"srun --ntasks-per-node=1 bash -c 'mkdir -p \"$1\" && cp -r {shlex.quote(str(job.stage))}/. \"$1\"' - \"$scratch\" || exit"


def _training(job: Job, site: Site) -> Iterator[str]:
    flags = [f"--launch.nodes={job.nodes}"] if job.nodes > 1 else []
    if job.processes:
        flags.append(f"--launch.processes={job.processes}")
    quoted = [_in_script(flag) for flag in [*job.flags, *flags]]
    if job.nodes > 1:
        quoted.append(f"--launch.rendezvous={shlex.quote(job.rendezvous)}" if job.rendezvous else '--launch.rendezvous="$head:$port"')
    if job.stage:
        quoted.append('--data.folder="$scratch"')
    command = ['"$shoal"'] if site.container is None else [shlex.quote(site.container_shoal)]
    command += ["train", f'"$run/jobs/{RECIPE}"', f"--launch.name={_in_script(job.name)}", f"--launch.runs={_in_script(str(job.run.parent))}"]
    yield "# One launcher on each node. One that ends does not end the others, which save or continue without it."
    srun = ["srun", "--ntasks-per-node=1", "--kill-on-bad-exit=0", "--wait=0"]
    if job.survives_a_node:
        srun.append("--no-kill")
    if job.total_nodes > 1:
        srun.append("--label")
    inside = _container(job, site)
    yield " ".join([*srun, *inside]) + " \\"
    yield f"  {' '.join(command)} \\"
    for flag in quoted[:-1]:
        yield f"  {flag} \\"
    yield f"  {quoted[-1]} &" if quoted else "  &"
    yield "step=$!"


def _container(job: Job, site: Site) -> list[str]:
    """Return the words that start the container: options of srun for pyxis, else a command."""
    if site.container is None:
        return []
    mounts = [f"{job.directory}:{job.directory}", f"{job.run.parent}:{job.run.parent}", *site.container_mounts]
    joined = shlex.quote(",".join(dict.fromkeys(mounts)))
    image = shlex.quote(site.container)
    if site.container_runtime == "pyxis":
        return [f"--container-image={image}", f"--container-mounts={joined}", f"--container-workdir={shlex.quote(str(job.directory))}"]
    gpu = ["--nv"] if job.gpus else []
    return [site.container_runtime, "exec", *gpu, f"--bind={joined}", f"--pwd={shlex.quote(str(job.directory))}", image]


def _ending(job: Job) -> Iterator[str]:
    yield "# Before the limit Slurm sends USR2 to this script. srun passes USR1 to the launchers, which save and end with code 85."
    yield "signal=none interrupted=no"
    yield "trap 'signal=USR2 interrupted=yes; kill -USR1 \"$step\" 2>/dev/null' USR2"
    yield "trap 'signal=TERM interrupted=yes' TERM  # the job is cancelled or preempted: Slurm signals the launchers itself"
    yield 'wait "$step"; code=$?'
    yield 'while [ "$interrupted" = yes ]; do interrupted=no; wait "$step"; code=$?; done  # a signal ends wait too early'
    yield ""
    chain = "" if job.requeue else " --chain"
    yield "# Requeue this job until the run is finished, as long as it makes progress."
    yield f'exec "$shoal" launch ended "$run" --code "$code" --signal "$signal" --max-requeues {job.max_requeues}{chain}'


def _quoted(text: str) -> str:
    """Quote a value of an #SBATCH line, which is not read by a shell."""
    return f'"{text}"' if any(c in " \t#\\'" for c in text) else text
