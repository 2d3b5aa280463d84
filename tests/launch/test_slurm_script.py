"""The batch script: its requests, and its run under bash with commands that play Slurm."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shoal.errors import ConfigError, LaunchError
from shoal.launch.jobs import RunJobs
from shoal.launch.slurm import signal_lead, slurm_time
from tests.launch.fake_slurm import FakeSlurm, event, save


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(tmp_path, monkeypatch)


def written(slurm: FakeSlurm, *flags: str, run: str = "recipe") -> str:
    assert slurm.run("slurm", "recipe.yaml", *flags) == 0
    return (slurm.folder / "runs" / run / "jobs" / "job.sbatch").read_text()


def requests(script: str) -> dict[str, str]:
    """Return the options of the #SBATCH lines, parsed as Slurm does: quotes, and comments after #."""
    found = re.findall(r'^#SBATCH --([\w-]+)(?:=("[^"]*"|[^\s#]*))?', script, re.MULTILINE)
    return {name: value.strip('"') for name, value in found}


def test_what_the_job_asks_for(slurm: FakeSlurm) -> None:
    script = written(
        slurm,
        "--nodes",
        "2",
        "--processes",
        "2",
        "--time",
        "1-12",
        "--partition",
        "big",
        "--dependency",
        "afterok:7",
        "--exclude",
        "n7",
    )
    asked = requests(script)
    folder = slurm.folder / "runs" / "recipe" / "jobs"
    assert asked == {
        "job-name": "recipe", "nodes": "2", "ntasks-per-node": "1", "exclusive": "", "mem": "0", "time": "1-12:00:00",
        "partition": "big", "signal": "B:USR2@300", "requeue": "", "exclude": "n7", "dependency": "afterok:7", "chdir": str(slurm.folder),
        "output": f"{folder}/%j.log", "open-mode": "append",
    }  # fmt: skip
    assert (folder / "recipe.yaml").read_text() == (slurm.folder / "recipe.yaml").read_text()


def test_gpus_and_shared_nodes(slurm: FakeSlurm) -> None:
    (slurm.folder / "cluster.yaml").write_text(
        "gpu_type: a100\ngpus_per_node: 8\ncpus_per_node: 96\nmemory_per_node: 900G\n"
    )
    asked = requests(written(slurm, "--nodes", "2", "--device", "cuda", "--global_batch", "64"))
    assert (asked["gres"], asked["cpus-per-task"], asked["mem"]) == ("gpu:a100:8", "96", "900G")
    assert "exclusive" not in asked
    script = written(slurm, "--nodes", "2", "--device", "cuda", "--gpus-per-node", "4")
    assert requests(script)["gres"] == "gpu:a100:4"
    assert "--launch.processes=4 \\\n" in script


def test_spare_nodes_outlast_a_failed_one(slurm: FakeSlurm) -> None:
    script = written(slurm, "--nodes", "2", "--processes", "2", "--spare-nodes", "1")
    assert requests(script)["nodes"] == "3"
    assert "no-kill" in requests(script)
    assert "--wait=0 --no-kill --label" in script
    assert 'launch watch "$run" --srun "$step" &' in script
    assert "--launch.nodes=2 \\\n" in script
    script = written(slurm, "--nodes", "2", "--processes", "2", "--launch.min_nodes", "1")
    assert "no-kill" in requests(script)


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parents[2].glob("recipes/learn/*.yaml"))[:3], ids=lambda p: p.stem
)
def test_recipes_of_one_node(slurm: FakeSlurm, path: Path) -> None:
    assert slurm.run("slurm", str(path), "--device", "cpu") == 0
    script = (slurm.folder / "runs" / path.stem / "jobs" / "job.sbatch").read_text()
    assert "rendezvous" not in script
    assert "launch.nodes" not in script


def test_a_site_with_everything(slurm: FakeSlurm) -> None:
    (slurm.folder / "cluster.yaml").write_text(
        """
partition: gpu
account: 1234
qos: long
constraint: a100&nvlink
reservation: mine
modules: [cuda/12.4, "gcc/13"]
setup: conda activate shoal
interface: ib0
fabric: efa
environment: {NCCL_DEBUG: INFO, COUNT: 3}
scratch: /scratch
sbatch: [--mail-type=END]
"""
    )
    (slurm.folder / "data").mkdir()
    script = written(slurm, "--nodes", "2", "--processes", "2", "--stage", "--qos", "short")
    asked = requests(script)
    names = ("partition", "account", "qos", "constraint", "reservation", "mail-type")
    assert [asked[name] for name in names] == ["gpu", "1234", "short", "a100&nvlink", "mine", "END"]
    assert script.startswith("#!/bin/bash -l\n")
    for line in (
        "module load cuda/12.4 || exit", "module load gcc/13 || exit", "conda activate shoal", "export FI_PROVIDER=efa",
        "export GLOO_SOCKET_IFNAME=ib0", "export NCCL_SOCKET_IFNAME=ib0", "export NCCL_DEBUG=INFO", "export COUNT=3",
        "scratch=/scratch/shoal-$SLURM_JOB_ID",
    ):  # fmt: skip
        assert f"\n{line}\n" in script
    assert f"cp -rL {slurm.folder}/data/. " in script
    assert '--data.folder="$scratch"' in script


@pytest.mark.parametrize(
    ("runtime", "words"),
    [
        (
            "pyxis",
            "srun --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=300 --label --container-image=a/b.sqsh --container-mounts=",
        ),
        ("apptainer", "--label apptainer exec --bind="),
        ("singularity", "--label singularity exec --bind="),
    ],
)
def test_a_container(slurm: FakeSlurm, runtime: str, words: str) -> None:
    text = f"container: a/b.sqsh\ncontainer_runtime: {runtime}\ncontainer_mounts: ['/data:/data']\n"
    (slurm.folder / "cluster.yaml").write_text(text)
    script = written(slurm, "--nodes", "2", "--processes", "2")
    assert words in script
    assert f"{slurm.folder}:{slurm.folder},{slurm.folder}/runs:{slurm.folder}/runs,/data:/data" in script
    assert '\n  shoal train "$run/jobs/recipe.yaml" \\\n' in script  # the image's own
    assert re.search(r'"\$shoal" launch ended "\$run"', script)  # outside: where scontrol is


@pytest.mark.parametrize(
    "flags", [[], ["--chain", "3"], ["--spare-nodes", "1"], ["--stage"], ["--array", "0-3", "--seed", "{task}"]]
)
def test_the_script_is_valid_bash(slurm: FakeSlurm, flags: list[str]) -> None:
    (slurm.folder / "data").mkdir()
    run = "a run's-0" if "--array" in flags else "a run's"
    script = written(slurm, "--nodes", "2", "--processes", "2", "--name", "a run's", *flags, run=run)
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    check = Path(sys.executable).with_name("shellcheck")  # the pinned one: others warn of other things
    done = subprocess.run([check, "-"], input=script, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout
    assert max(map(len, script.splitlines())) < 170 + len(str(slurm.folder))


def test_the_script_runs_one_launcher_a_node(slurm: FakeSlurm) -> None:
    written(slurm, "--nodes", "2", "--time", "60", "--lr", "1e-3", "--name", "a b", run="a b")
    process = slurm.batch(
        "a b", 'printf "<%s>" "$@" > "$here/words"; echo "$SRUN_CPUS_PER_TASK" > "$here/cores"; exit 0'
    )
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert (slurm.here / "cores").read_text() == "3\n"
    words = re.findall(r"<([^>]*)>", (slurm.here / "words").read_text())
    shoal = next(n for n, word in enumerate(words) if word.endswith("/shoal"))
    assert words[:shoal] == ["--ntasks-per-node=1", "--kill-on-bad-exit=0", "--wait=300", "--label"]
    run = slurm.folder / "runs" / "a b"
    assert words[shoal + 1 : -1] == [
        "train", f"{run}/jobs/recipe.yaml", "--launch.name=a b", f"--launch.runs={run.parent}", "--optim.lr=1e-3",
        "--launch.time_limit_minutes=null", "--launch.nodes=2",
    ]  # fmt: skip
    head, _, port = words[-1].removeprefix("--launch.rendezvous=").rpartition(":")
    assert port == str(10000 + 100)
    assert f'"rendezvous":"{head}:{port}"' in (run / "jobs.jsonl").read_text()
    assert head
    assert not head.startswith("127.")
    assert "=== job 100, restart 0, on" in output
    assert (run / "finished").is_file()
    process = slurm.batch("a b", "exit 1")
    assert process.communicate(timeout=60)[0] == "the run has finished: nothing to do\n"
    assert process.returncode == 0


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.01)


def test_a_signal_before_the_limit_reaches_the_launchers_and_requeues_the_job(slurm: FakeSlurm) -> None:
    written(slurm, "--nodes", "2", "--time", "60")
    run = slurm.folder / "runs" / "recipe"
    save(run, 3)
    save(run / "late", 9)
    stops = f'trap "mv {run}/late/checkpoints/* {run}/checkpoints; exit 85" USR1'
    process = slurm.batch("recipe", f'{stops}; touch "$here/up"; while :; do sleep 0.05; done')
    wait_for(slurm.here / "up", process)
    process.send_signal(signal.SIGUSR2)
    output, _ = process.communicate(timeout=60)
    assert "the job was signaled before its limit after step 9; requeuing job 100" in output
    assert process.returncode == 85
    assert slurm.calls("scontrol requeue") == ["scontrol requeue 100"]


def test_a_signal_while_the_end_is_recorded_changes_nothing(slurm: FakeSlurm) -> None:
    written(slurm, "--nodes", "2", "--time", "60")
    slurm.command("scontrol", 'kill -USR2 $PPID; kill -TERM $PPID; cat "$here/job"')  # its parent is the last command
    process = slurm.batch("recipe", "exit 85")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 85, output
    assert "requeuing job 100" in output
    assert slurm.calls("scontrol requeue") == ["scontrol requeue 100"]


def test_a_cancelled_job_does_not_wait_for_its_launchers(slurm: FakeSlurm) -> None:
    written(slurm, "--nodes", "2", "--time", "60")
    slurm.answer("job", "JobId=100 JobState=COMPLETING Reason=None BatchFlag=1\n")
    process = slurm.batch("recipe", 'echo $$ > "$here/up"; exec sleep 60')
    wait_for(slurm.here / "up", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    jobs = RunJobs(slurm.folder / "runs" / "recipe")
    assert jobs.stop_reason() == "the job was cancelled"
    subprocess.run(["kill", (slurm.here / "up").read_text().strip()], check=True)
    assert process.stdout is not None
    assert "the run does not continue: the job was cancelled" in process.stdout.read()


@pytest.mark.parametrize("code", [0, 1, 2, 85, 137])
def test_the_scripts_exit_code(slurm: FakeSlurm, code: int) -> None:
    written(slurm, "--nodes", "2", "--time", "60", "--chain", "2")
    process = slurm.batch("recipe", f"exit {code}")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == (85 if code == 137 else code), output
    assert bool(slurm.calls("sbatch")) == (code in (85, 137))


def test_the_lead_of_the_signal_is_measured(tmp_path: Path) -> None:
    assert signal_lead(tmp_path, None) == 300
    assert signal_lead(tmp_path, 600) == 300
    assert signal_lead(tmp_path, 4) == 60
    for seconds in (100.0, 130.0, 90.0):
        event(tmp_path, "saved", step=1, seconds=seconds)
    line = '{"step":%d,"tokens":1,"loss":1.0,"lr":0.1,"grad_norm":1.0,"tokens_per_second":1.0,"step_seconds":%f}\n'
    (tmp_path / "metrics.jsonl").write_text(line % (1, 2.0) + line % (2, 8.0))
    assert signal_lead(tmp_path, 600) == 2 * 130 + 3 * 8 + 30
    with pytest.raises(LaunchError, match=r"limit of 5 minutes is too short: a save of this run takes up to 130 s"):
        signal_lead(tmp_path, 5)


@pytest.mark.parametrize(
    ("minutes", "text"),
    [(90, "01:30:00"), (1440, "1-00:00:00"), (0.1, "00:01:00"), (2.5, "00:02:30"), (3661, "2-13:01:00")],
)
def test_times_in_slurms_form(minutes: float, text: str) -> None:
    assert slurm_time(minutes) == text


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("partitionn: gpu", "partitionn is not a key of cluster.yaml; did you mean partition?"),
        ("gpus_per_node: many", "gpus_per_node is 'many', not an integer of at least 1"),
        ("modules: {a: 1}", "modules is {'a': 1}, not a list of texts of one line each"),
        ("fabric: infinband", "fabric is 'infinband', not one of ethernet, infiniband, efa"),
        ("environment: {a-b: 1}", "environment is {'a-b': 1}, not a mapping"),
        ("partition: [", "is not valid YAML"),
        ("- partition", "is not a mapping of keys"),
        ("account: true", "account is True, not a text"),
    ],
)
def test_a_wrong_site_file(slurm: FakeSlurm, text: str, problem: str) -> None:
    (slurm.folder / "site.yaml").write_text(text)
    with pytest.raises((ConfigError, LaunchError), match=re.escape(problem)):
        slurm.run("slurm", "recipe.yaml", "--site", "site.yaml")


def test_the_site_file_of_the_folder_comes_before_that_of_the_user(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = slurm.folder / "home"
    (home / ".config/shoal").mkdir(parents=True)
    (home / ".config/shoal/cluster.yaml").write_text("partition: users\n")
    monkeypatch.setenv("HOME", str(home))
    assert requests(written(slurm))["partition"] == "users"
    (slurm.folder / "cluster.yaml").write_text("partition: folders\n")
    assert requests(written(slurm))["partition"] == "folders"


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--time", "soon"], "--time 'soon' is not a time"),
        (["--site", "none.yaml"], "there is no such file"),
        (["--device", "auto"], "how many GPUs each node has"),
        (["--spare-nodes", "1"], "--spare-nodes needs a run of several nodes"),
        (["--array", "0-3"], "would train the same run"),
        (["--array", "a", "--seed", "{task}"], "is not a list of indexes"),
        (["--seed", "{task}"], "needs --array"),
        (["--array", "0-3", "--seed", "{task}", "--chain", "2"], "--chain continues one run"),
        (["--stage"], "does not exist yet; prepare the data first with shoal prepare"),
        (["--nodes", "4", "--processes", "8"], "with 4 nodes of 8 processes"),
    ],
)
def test_bad_input(slurm: FakeSlurm, flags: list[str], problem: str) -> None:
    with pytest.raises((ConfigError, LaunchError), match=re.escape(problem)):
        slurm.run("slurm", "recipe.yaml", *flags)
    assert not (slurm.folder / "runs").exists()
