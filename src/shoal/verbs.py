"""What each verb of the command line does: it delegates and prints. Heavy imports wait until they are needed."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.errors import EXIT_LOST_PEER, EXIT_REQUEUE, ModelError, RunError, ShoalError

if TYPE_CHECKING:
    from shoal.config import Config
    from shoal.infer.load import Wanted
    from shoal.runs import RunFolder

Override = tuple[str, str, str]

VERIFIED = "verify-"  # before the name of a run: where its certificate is kept


def _resolve(args: argparse.Namespace, overrides: list[Override]) -> Config:
    from shoal.resolve import resolve

    for gone in _run_of(args.recipe, overrides).stand_in():
        _tell([f"{gone} is gone: going on with what the run keeps of it"])
    resolved = resolve(args.recipe, overrides)
    _tell(resolved.notes)
    if resolved.config.launch.name is None and args.recipe is not None:
        return resolved.config.replace("launch", name=args.recipe.stem)
    return resolved.config


def _run_of(recipe: Path | None, overrides: list[Override]) -> RunFolder:
    """The folder of the run that is asked for, found before the config is judged: it may keep what that needs."""
    from shoal.resolve import peek
    from shoal.runs import RunFolder

    said = peek(recipe, overrides, ("launch.runs", "launch.name"))
    return RunFolder(Path(said["launch.runs"]) / (said["launch.name"] or (recipe.stem if recipe else "run")))


def _tell(notes: Sequence[str], *, on_stderr: bool = False) -> None:
    """What a person should act on, once for all processes of a run."""
    from shoal.launch.place import speaks_first

    if notes and speaks_first():
        from shoal.metrics.console import Console

        console = Console(on_stderr=on_stderr)
        for note in notes:
            console.warn(note)


def train(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from shoal.output import outlast

    outlast()
    config = _resolve(args, overrides)
    from shoal.launch.place import is_worker, read_place
    from shoal.launch.torchrun import count_gpus, fit_to_place, launch, plan_processes
    from shoal.runs import RunFolder

    before = RunFolder.of(config).begun()
    if is_worker():
        return _work(fit_to_place(config, read_place(), before))
    from shoal.fault.limit import start_clock
    from shoal.launch.stops import leave_when_asked
    from shoal.metrics.console import Console

    start_clock()
    leave_when_asked()
    config = plan_processes(config, count_gpus(), before=before, say=Console().warn)
    folder = RunFolder.of(config)
    folder.agree(config)
    folder.lock(config.launch.rendezvous)
    from shoal.data.open import open_data

    open_data(config.data, Console(), rows=config.model.vocab_size)
    return launch(config, [*argv, *_settled(config)])


def _work(config: Config, *, verify: bool = False) -> int:
    """One of the processes of a run, or of a verification."""
    from shoal.fault.heartbeat import Heartbeat, leave_stacks_when_asked
    from shoal.fault.signals import die_with_parent, hold_signals

    die_with_parent()
    leave_stacks_when_asked()
    if verify:
        Heartbeat.open(config.launch).rest()  # its steps are of many kinds; a collective's timeout watches it
    else:
        hold_signals()
    from shoal.parallel.mesh import is_lost_peer

    try:
        if verify:
            from shoal.bench.parity import verify_here

            verify_here(config)
            return 0
        from shoal.train.loop import train

        stopped = train(config)
    except RuntimeError as error:
        if is_lost_peer(error):
            _say_unless_launched(f"lost another process of this run: {str(error).splitlines()[0]}")
            return EXIT_LOST_PEER
        raise
    return EXIT_REQUEUE if stopped else 0


def _say_unless_launched(text: str) -> None:
    """Our own launcher says which one was lost and why; others do not."""
    from shoal.launch.place import LOCKED_BY
    from shoal.launch.stops import tell

    if os.environ.get(LOCKED_BY) != str(os.getppid()):
        tell(text)


def verify(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    config = _resolve(args, overrides)
    from shoal.launch.place import is_worker, read_place
    from shoal.launch.torchrun import count_gpus, fit_to_place, launch, plan_processes

    name = config.launch.name
    config = config.replace("launch", name=f"{VERIFIED}{name}", max_restarts=0)
    if is_worker():
        return _work(fit_to_place(config, read_place()), verify=True)
    from shoal.metrics.console import Console
    from shoal.runs import RunFolder

    config = plan_processes(config, count_gpus(), say=Console().warn)
    folder = RunFolder.of(config)
    folder.lock(config.launch.rendezvous)
    certificate = folder.path / "certificate.json"
    certificate.unlink(missing_ok=True)
    from shoal.data.open import open_data

    open_data(config.data, Console(), rows=config.model.vocab_size)
    code = launch(config, [*argv, *_settled(config)])
    if code != 0 or not certificate.is_file():
        return code or 1
    print(f"{certificate} holds versions, device, layout and all that was compared")
    return 0 if json.loads(certificate.read_text())["passed"] else 1


def _settled(config: Config) -> list[str]:
    """What the launcher decided, for its workers."""
    return [f"--launch.processes={config.launch.processes}", f"--launch.threads={config.launch.threads}"]


def prepare(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from shoal.data.open import open_data
    from shoal.metrics.console import Console

    console = Console()
    prepared = open_data(_resolve(args, overrides).data, console)
    for split, counts in prepared.counts.items():
        console.say(
            f"{split}: {counts.documents:,} documents, {counts.text_bytes:,} bytes, {counts.tokens:,} tokens "
            f"({counts.text_bytes / max(counts.tokens, 1):.2f} bytes a token)"
        )
    console.say(f"in {prepared.folder}")
    return 0


def fetch(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from contextlib import nullcontext

    from shoal.hub.fetch import fetch_model, no_progress
    from shoal.metrics.console import Console

    console = Console()
    bar = console.progress("fetching") if console.is_terminal else nullcontext(no_progress)
    with bar as progress:
        fetch_model(
            args.name, to=_expanded(args.to), revision=args.revision, force=args.force, verify=args.verify,
            tell=console.say, progress=progress,
        )  # fmt: skip
    return 0


def _expanded(to: Path | None) -> Path | None:
    """With `~` as shells have it, which leave it alone in --to=~/x."""
    try:
        return to and to.expanduser()
    except RuntimeError as error:
        raise ModelError(f"there is no {to}: {error} Set --to to a folder that can be written") from error


def eval(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    _needs(args, "text", ("context", "stride"))
    _needs(args, "tasks", ("include_path", "limit", "num_fewshot"))
    _set_threads(args)
    wanted = _wanted(args)
    from shoal.infer.commands import TextOptions, evaluate_model
    from shoal.infer.harness import Tasks

    text = None if args.text is None else TextOptions(args.text, args.context, args.stride)
    tasks = None
    if args.tasks is not None:
        names = tuple(name.strip() for name in args.tasks.split(",") if name.strip())
        tasks = Tasks(names, args.include_path, args.limit, args.num_fewshot)
    evaluate_model(wanted, text=text, tasks=tasks, as_json=args.json)
    return 0


def generate(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    _needs(args, "chat", ("system",))
    if bool(args.prompt) == args.chat:
        raise ShoalError("shoal generate needs --prompt TEXT, or --chat for a conversation, and not both")
    _set_threads(args)
    wanted = _wanted(args)
    from shoal.infer.commands import generate_text, talk
    from shoal.infer.generate import Sampling

    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    if args.chat:
        talk(wanted, system=args.system, max_new_tokens=args.tokens, sampling=sampling)
    else:
        generate_text(wanted, prompts=args.prompt, max_new_tokens=args.tokens, sampling=sampling)
    return 0


def _set_threads(args: argparse.Namespace) -> None:
    """CPU threads of this process, before torch is imported: those asked for, or as the machine has room for."""
    from shoal.launch.torchrun import choose_threads
    from shoal.metrics.console import Console

    asked: int | None = args.threads
    if asked is not None and asked < 1:
        raise ShoalError(f"--threads is {asked}: give 1 or more")
    if asked is None and "OMP_NUM_THREADS" in os.environ:
        return  # a person's own
    os.environ["OMP_NUM_THREADS"] = str(choose_threads(asked, say=Console(on_stderr=True).warn))


def _wanted(args: argparse.Namespace) -> Wanted:
    from shoal.infer.load import Wanted

    return Wanted(
        Path(args.runs), args.target, folder=args.model_from, family=args.model_family, step=args.step,
        device=args.device, dtype=args.dtype,
    )  # fmt: skip


def _needs(args: argparse.Namespace, owner: str, options: tuple[str, ...]) -> None:
    """Nothing that was asked for is left aside: `options` mean something beside `owner` only."""
    for option in options:
        if getattr(args, option) is not None and not getattr(args, owner):
            raise ShoalError(
                f"--{option.replace('_', '-')} does nothing without --{owner}; set that too, or leave it out"
            )


def export(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from shoal.infer.export import export_run
    from shoal.metrics.console import Console

    console = Console()
    out = export_run(
        Path(args.runs), args.target, step=args.step, out=args.out, dtype=args.dtype, license=args.license,
        force=args.force, console=console,
    )  # fmt: skip
    console.say(f"{out} is whole: README.md in it says what it is")
    return 0


def config(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from shoal.resolve import resolve, schema, to_yaml

    if args.schema:
        print(json.dumps(schema(), indent=2))
        return 0
    if args.recipe is None:
        raise ShoalError("shoal config needs a RECIPE.yaml, or --schema")
    resolved = resolve(args.recipe, overrides)
    _tell(resolved.notes, on_stderr=True)
    print(to_yaml(resolved.config, resolved.sources), end="")
    return 0


def bench(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from shoal.bench.speed import bench_speed

    bench_speed(args.recipe, overrides, peers=args.peers, repeats=args.repeats, as_json=args.json)
    return 0


def goodput(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from shoal.metrics.goodput import account, table

    found = account(_record(args, "time.jsonl"))
    print(json.dumps(found.as_json(), indent=2) if args.json else "\n".join(table(found)))
    return 0


def ledger(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from shoal.data.ledger import audit, describe

    found = audit(_record(args, "ledger.jsonl"))
    print(json.dumps(found.as_json(), indent=2) if args.json else "\n".join(describe(found)))
    return 0 if found.passed else 1


def _record(args: argparse.Namespace, name: str) -> Path:
    """The file `name` in the folder of the run that is asked for. Raises `RunError`."""
    from shoal.runs import RunFolder

    target = Path(args.target)
    folder = RunFolder(target if (target / "config.yaml").is_file() else Path(args.runs) / target)
    folder.load_config()
    if not (folder.path / name).is_file():
        raise RunError(f"{folder.path} has no {name}: an older shoal trained it; the next steps taken will be in it")
    return folder.path / name


def rendezvous(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from shoal.address import read_address
    from shoal.errors import LaunchError

    if args.while_used and os.fork():
        os._exit(0)  # nobody's child: a launcher that ends, or passes a signal on, leaves it alone
    from shoal.launch.meeting import serve

    address = read_address(args.address)
    if address is None:
        raise LaunchError(f"{args.address!r} is no HOST:PORT, such as node0:29400")
    serve(*address, while_used=args.while_used, ready=lambda: print(f"machines may meet at {args.address}", flush=True))
    return 0


def env(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from shoal.bench.environment import describe

    print(describe())
    return 0
