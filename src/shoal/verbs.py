"""What each verb of the command line does: it delegates and prints. Heavy imports wait until they are needed."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.errors import (
    EXIT_LOST_PEER,
    EXIT_REQUEUE,
    LaunchError,
    MemoryProblem,
    ModelError,
    RunError,
    ShoalError,
    spelled,
)
from shoal.system.output import on_one_line

if TYPE_CHECKING:
    from shoal.config.options import Config
    from shoal.data.prepare import Prepared
    from shoal.infer.asked import Wanted
    from shoal.run.console import Console
    from shoal.run.folder import RunFolder
    from shoal.run.narrator import Narrator

Override = tuple[str, str, str]

VERIFIED = "verify-"  # before the name of a run: where its certificate is kept


def _resolve(args: argparse.Namespace, overrides: list[Override]) -> Config:
    from shoal.resolve.checks import why_no_name
    from shoal.resolve.resolve import resolve

    kept = _run_of(args.recipe and _recipe(args, overrides), overrides).kept()
    for gone in kept:
        _tell([f"{gone} is gone: going on with what the run keeps of it"])
    recipe = _recipe(args, overrides)
    resolved = resolve(recipe, overrides, kept)
    told = ["without a recipe, what is not typed is as shoal init writes it"] if args.recipe is None else []
    _tell([*told, *resolved.notes])
    if resolved.config.launch.name is None and args.recipe is not None:
        if why := why_no_name(recipe.stem):
            raise ShoalError(f"a run is called as its recipe, and {why}; or give --name")
        return resolved.config.replace("launch", name=recipe.stem)
    return resolved.config


def _recipe(args: argparse.Namespace, overrides: list[Override]) -> Path:
    """The recipe that is asked for; where a model or data are typed without one, that which `shoal init` writes."""
    from shoal.resolve.recipe import START, find_recipe

    if args.recipe is not None:
        return find_recipe(args.recipe)
    if not any(key.startswith(("model.", "data.")) for key, _, _ in overrides):
        raise ShoalError(
            f"shoal {args.verb} needs a recipe: shoal {args.verb} quickstart takes one of shoal's own, shoal init mine.yaml "
            f"writes one to start from, and shoal {args.verb} --model.preset tiny --data.paths FOLDER needs none"
        )
    return START


def init(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from shoal.resolve.recipe import START

    try:
        with args.file.open("x", encoding="utf-8") as file:
            file.write(START.read_text(encoding="utf-8"))
    except FileExistsError as error:
        raise ShoalError(f"{args.file} is there already, and is left as it is; choose another name") from error
    except (OSError, ValueError) as error:
        raise ShoalError(f"{args.file} cannot be written: {error}") from error
    file = on_one_line(args.file)
    print(f"{file} is a recipe to change; shoal train {shlex.quote(file)} trains it as it is")
    return 0


def _run_of(recipe: Path | None, overrides: list[Override]) -> RunFolder:
    """The folder of the run that is asked for, found before the config is judged: it may keep what that needs."""
    from shoal.resolve.resolve import peek
    from shoal.run.folder import RunFolder

    said = peek(recipe, overrides, ("launch.runs", "launch.name"))
    return RunFolder(Path(said["launch.runs"]) / (said["launch.name"] or (recipe.stem if recipe else "run")))


def _tell(notes: Sequence[str], *, on_stderr: bool = False) -> None:
    """What a person should act on, once for all processes of a run."""
    from shoal.mesh.place import speaks_first

    if notes and speaks_first():
        from shoal.run.console import Console

        console = Console(on_stderr=on_stderr)
        for note in notes:
            console.warn(note)


def _tell_of_torch() -> None:
    """One line, where this torch was not tested."""
    from shoal.system.torch_private import version_notes

    _tell(version_notes())


def train(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from shoal.system.output import outlast

    outlast()
    config = _resolve(args, overrides)
    _tell_of_torch()
    from shoal.launch.torchrun import launch, plan_processes
    from shoal.mesh.place import is_worker
    from shoal.run.folder import RunFolder

    before = RunFolder.of(config).begun()
    if is_worker():
        return _work(_in_place(config, before))
    _say_where(config)
    from shoal.fault.limit import start_clock
    from shoal.run.console import Console
    from shoal.system.signals import ends_when_asked

    start_clock()
    with ends_when_asked(EXIT_REQUEUE):
        config = plan_processes(config, _count_gpus(), before=before, say=Console().warn)
        folder = RunFolder.of(config)
        folder.agree(config)
        folder.lock(config.launch.rendezvous)
        from shoal.data.prepare import open_data

        console = Console()
        prepared = open_data(config.data, console, rows=config.model.vocab_size)
        if folder.config_file.is_file() and _is_finished(config, folder, prepared, console):
            return 0
    return launch(config, [*argv, *_settled(config)])


def _count_gpus() -> int:
    """CUDA devices; says so where that takes long, since torch is imported for it."""
    from shoal.launch.torchrun import count_gpus
    from shoal.run.console import Console
    from shoal.run.narrator import Narrator

    with contextlib.closing(Narrator.of(Console())) as narrator, narrator.phase("looking for GPUs"):
        return count_gpus()


def _in_place(config: Config, before: Config | None = None) -> Config:
    """The config of a worker; where another program started the workers, the first says what it was told."""
    from shoal.launch.torchrun import fit_to_place
    from shoal.mesh.place import describe_place, read_place, speaks_first

    if speaks_first():
        print(describe_place(), flush=True)
    return fit_to_place(config, read_place(), before)


def _say_where(config: Config) -> None:
    """What another launcher's variables mean here, where they make no worker of this process. Raises `LaunchError`."""
    from shoal.mesh.place import unused_claims

    _tell(unused_claims(config.launch.nodes))


def _is_finished(config: Config, folder: RunFolder, prepared: Prepared, console: Console) -> bool:
    """Whether all steps of this run are taken; then its result is said again."""
    from shoal.run.narrator import Narrator
    from shoal.training.last_words import finished, say_result_again

    with contextlib.closing(Narrator.of(console)) as narrator, narrator.phase("checking the last checkpoint"):
        result = finished(config, folder, prepared)
    if result is not None:
        say_result_again(config, folder, result, console)
    return result is not None


def _work(config: Config, *, verify: bool = False) -> int:
    """One of the processes of a run, or of a verification."""
    from shoal.elastic.heartbeat import Heartbeat, leave_stacks_when_asked
    from shoal.elastic.stops import tell
    from shoal.mesh.place import is_launched, read_place
    from shoal.run.console import Console
    from shoal.run.narrator import Narrator
    from shoal.system.signals import StopRequest, die_with_parent

    die_with_parent()
    leave_stacks_when_asked()
    narrator = Narrator(Console(speaks=read_place().rank == 0).note)
    if not is_launched():
        narrator.watch()
    heartbeat = Heartbeat.open(config.launch, narrator.begin)
    if verify:
        heartbeat.rest()  # its steps are of many kinds; a collective's timeout watches it
    else:
        stop = StopRequest()
        if not is_launched():
            stop.end_early(tell if read_place().rank == 0 else lambda text: None)
    heartbeat.outside("importing torch")
    from shoal.mesh.mesh import is_lost_peer
    from shoal.models.attention import not_deterministic
    from shoal.plan.fit import what_ran_out, what_would_fit
    from shoal.run.folder import RunFolder

    try:
        if verify:
            from shoal.bench.parity import verify_here

            verify_here(config, heartbeat)
            return 0
        from shoal.training.loop import train

        stopped = train(config, stop, heartbeat)
    except (RuntimeError, MemoryError, OSError) as error:
        if said := what_ran_out(error):
            fits = what_would_fit(RunFolder.of(config).settled(config), read_place().world_size)
            problem = MemoryProblem(f"out of memory: {said}. {fits}")
            if heartbeat.taken <= 1:
                raise problem from error
            tell(str(problem))  # it fitted before, and may again: a crash like any other
            return 1
        if isinstance(error, RuntimeError) and is_lost_peer(error):
            _say_unless_launched(f"lost another process of this run: {str(error).splitlines()[0]}")
            return EXIT_LOST_PEER
        if isinstance(error, RuntimeError) and (operator := not_deterministic(error)):
            advice = "" if verify else "; set train.repro to fast"
            raise LaunchError(f"{operator} has no deterministic kernel on this device{advice}") from error
        raise
    return EXIT_REQUEUE if stopped else 0


def _say_unless_launched(text: str) -> None:
    """Our own launcher says which one was lost and why; others do not."""
    from shoal.elastic.stops import tell
    from shoal.mesh.place import is_launched

    if not is_launched():
        tell(text)


def verify(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    config = _resolve(args, overrides)
    _tell_of_torch()
    from shoal.launch.torchrun import launch, plan_processes
    from shoal.mesh.place import is_worker

    name = config.launch.name
    config = config.replace("launch", name=f"{VERIFIED}{name}", max_restarts=0)
    if is_worker():
        return _work(_in_place(config), verify=True)
    _say_where(config)
    from shoal.run.console import Console
    from shoal.run.folder import RunFolder
    from shoal.system.signals import ends_when_asked

    with ends_when_asked(EXIT_REQUEUE):
        config = plan_processes(config, _count_gpus(), say=Console().warn)
        folder = RunFolder.of(config)
        folder.lock(config.launch.rendezvous)
        certificate = folder.path / "certificate.json"
        certificate.unlink(missing_ok=True)
        from shoal.data.prepare import open_data

        open_data(config.data, Console(), rows=config.model.vocab_size)
    code = launch(config, [*argv, *_settled(config)])
    if code != 0 or not certificate.is_file():
        return code or 1
    print(f"{on_one_line(certificate)} holds versions, device, layout and all that was compared")
    return 0 if json.loads(certificate.read_text())["passed"] else 1


def _settled(config: Config) -> list[str]:
    """What the launcher decided, for its workers."""
    return [f"--launch.processes={config.launch.processes}", f"--launch.threads={config.launch.threads}"]


def prepare(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from shoal.run.console import Console
    from shoal.system.signals import ends_when_asked

    console = Console()
    config = _resolve(args, overrides)
    with ends_when_asked(EXIT_REQUEUE):
        from shoal.data.prepare import open_data

        prepared = open_data(config.data, console)
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
    from shoal.run.console import Console

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
    from shoal.infer.asked import Tasks, Text

    wanted = _wanted(args)
    wanted.check()
    if wanted.folder is not None and args.text is None and args.tasks is None:
        raise ShoalError(f"{wanted.folder} has no held-out text of its own: set --text FILE, or --tasks NAME,...")
    text = None if args.text is None else Text.read(args.text, args.context, args.stride)
    tasks = None
    if args.tasks is not None:
        names = tuple(name.strip() for name in args.tasks.split(",") if name.strip())
        tasks = Tasks(names, args.include_path, args.limit, args.num_fewshot)
    set_threads(args)
    with _told(speaks=not args.json) as narrator:
        from shoal.infer.commands import evaluate_model

        evaluate_model(wanted, text=text, tasks=tasks, as_json=args.json, narrator=narrator)
    return 0


def generate(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    _needs(args, "chat", ("system",))
    if bool(args.prompt) == args.chat:
        raise ShoalError("shoal generate needs --prompt TEXT, or --chat for a conversation, and not both")
    from shoal.models.sampling import CHAT_TOKENS, FLAGS, PROMPT_TOKENS, Sampling, check_options, check_prompts

    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    limit = args.tokens if args.tokens is not None else CHAT_TOKENS if args.chat else PROMPT_TOKENS
    with spelled(FLAGS):
        check_options(sampling, limit)
    check_prompts(args.prompt or [], args.system)
    wanted = _wanted(args)
    wanted.check()
    set_threads(args)
    with _told() as narrator:
        from shoal.infer.commands import generate_text, open_chat

        if args.chat:
            chat = open_chat(wanted, system=args.system, max_new_tokens=limit, sampling=sampling, narrator=narrator)
        else:
            generate_text(wanted, prompts=args.prompt, max_new_tokens=limit, sampling=sampling, narrator=narrator)
    if args.chat:  # in which Ctrl-C ends an answer only
        from shoal.infer.chat import chat_in_terminal

        chat_in_terminal(chat, sys.stdin, sys.stdout)
    return 0


@contextlib.contextmanager
def _told(code: int | None = None, *, speaks: bool = True) -> Iterator[Narrator]:
    """A command with nothing to save: tells on standard error what takes long, and ends when asked to, with `code`."""
    from shoal.run.console import Console
    from shoal.run.narrator import Narrator
    from shoal.system.signals import ends_when_asked

    narrator = Narrator.of(Console(speaks=speaks, on_stderr=True))
    with ends_when_asked(code), contextlib.closing(narrator):
        narrator.begin("importing torch")
        try:
            yield narrator
        except (RuntimeError, MemoryError, OSError) as error:
            from shoal.plan.fit import what_ran_out

            if said := what_ran_out(error):
                raise MemoryProblem(f"out of memory: {said}") from error
            raise


def set_threads(args: argparse.Namespace) -> None:
    """CPU threads of this process, before torch is imported: those asked for, or as the machine has room for."""
    from shoal.launch.torchrun import choose_threads
    from shoal.run.console import Console

    asked: int | None = args.threads
    if asked is not None and asked < 1:
        raise ShoalError(f"--threads is {asked}: give 1 or more")
    if asked is None and "OMP_NUM_THREADS" in os.environ:
        return  # a person's own
    os.environ["OMP_NUM_THREADS"] = str(choose_threads(asked, say=Console(on_stderr=True).warn))


def _wanted(args: argparse.Namespace) -> Wanted:
    from shoal.infer.asked import Wanted

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
    from shoal.infer.out_folder import OutFolder
    from shoal.infer.target import find_checkpoint
    from shoal.run.console import Console

    find_checkpoint(Path(args.runs), args.target, args.step)
    OutFolder(args.out, args.force)
    console = Console()
    with _told() as narrator:
        from shoal.infer.export import export_run

        narrator.begin(None)
        out = export_run(
            Path(args.runs), args.target, step=args.step, out=args.out, dtype=args.dtype, license=args.license,
            force=args.force, console=console,
        )  # fmt: skip
    console.say(f"{out} is whole: README.md in it says what it is")
    return 0


def config(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from shoal.report.amounts import amounts
    from shoal.resolve.recipe import to_text
    from shoal.resolve.resolve import resolve, schema, to_yaml

    if args.schema:
        print(json.dumps(schema(), indent=2))
        return 0
    resolved = resolve(_recipe(args, overrides), overrides)
    _tell(resolved.notes, on_stderr=True)
    lost = {
        key: f"{resolved.sources[key]}, not {to_text(s.value)} at {s.where}" for key, s in resolved.replaced.items()
    }
    print(to_yaml(resolved.config, {**resolved.sources, **lost}), end="")
    for line in amounts(resolved.config):
        print(f"# {line}")
    return 0


def bench(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from shoal.bench.speed import bench_speed
    from shoal.resolve.recipe import find_recipe

    recipe = args.recipe and find_recipe(args.recipe)
    with _told(speaks=not args.json) as narrator:
        narrator.begin(None)
        bench_speed(recipe, overrides, peers=args.peers, repeats=args.repeats, as_json=args.json, narrator=narrator)
    return 0


def goodput(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from shoal.run.goodput import account, table

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
    from shoal.run.folder import RunFolder

    target = Path(args.target)
    folder = RunFolder(target if (target / "config.yaml").is_file() else Path(args.runs) / target)
    folder.load_config()
    if not (folder.path / name).is_file():
        raise RunError(f"{folder.path} has no {name}: an older shoal trained it; the next steps taken will be in it")
    return folder.path / name


def rendezvous(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from shoal.system.network import read_address

    if args.while_used and os.fork():
        os._exit(0)  # nobody's child: a launcher that ends, or passes a signal on, leaves it alone
    from shoal.elastic.rendezvous import serve

    address = read_address(args.address)
    if address is None:
        raise LaunchError(f"{args.address!r} is no HOST:PORT, such as node0:29400")
    serve(*address, while_used=args.while_used, ready=lambda: print(f"machines may meet at {args.address}", flush=True))
    return 0


def env(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from shoal.bench.environment import describe

    print(describe())
    return 0
