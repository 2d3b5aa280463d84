"""The `shoal` command: its start, its errors and its exit codes. `commands/` has the options and the code of each verb."""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from shoal.commands.flags import read_overrides
from shoal.commands.parser import build_parser
from shoal.errors import EXIT_BAD_INPUT, EXIT_REQUEUE, ShoalError
from shoal.system.output import Output, say_error
from shoal.system.secrets import secret_in
from shoal.system.signals import Asked

MODEL_TEXT = ("--prompt", "--system")  # options with text for the model: URLs in it are not checked for credentials
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE, as shells report it


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the `shoal` command and end the process, with exit code 2 for an error that the user can fix."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # Generated text may have characters that the terminal's encoding lacks
        sys.stdout.reconfigure(errors="replace")
    sys.stdout = stdout = Output(sys.stdout)
    code = 0
    try:
        code = _run(argv)
    except ShoalError as error:
        code = _say(str(error))
    except Asked as asked:
        if asked.code == EXIT_REQUEUE:
            print("shoal: stopped; run the same command to resume", file=sys.stderr)
        _leave(asked.code, at_once=True)
    except KeyboardInterrupt:
        print("shoal: interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        stdout.silence()
        code = EXIT_BROKEN_PIPE
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            code = _say(f"{str(error.filename)[:60]}...: {error.strerror}; give a shorter path")
        else:  # a bug in shoal: print the traceback, then end as cleanly as after any other error
            traceback.print_exc()
            code = 1
    _leave(code)


def _say(message: str) -> int:
    """Report an error, through the launcher if it started this process, so that it appears once; return the exit code."""
    from shoal.mesh.place import report_to_launcher

    if not report_to_launcher(message):
        say_error(message)
    return EXIT_BAD_INPUT


def _leave(code: int, *, at_once: bool = False) -> NoReturn:
    """
    End the process after flushing its output.

    If torch is loaded, or with `at_once`, skip Python's shutdown: it waits for threads, and a communication library's thread
    may abort the process during it.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_BROKEN_PIPE
    except ShoalError as error:
        say_error(str(error))
        code = code or EXIT_BAD_INPUT
    sys.stderr.flush()
    if at_once or "torch" in sys.modules:
        os._exit(code)
    sys.exit(code)


def _run(argv: list[str]) -> int:
    for before, item in zip(["shoal", *argv], argv, strict=False):
        if before not in MODEL_TEXT and (what := secret_in(item)):
            flag = item.partition("=")[0] if item.startswith("--") else before
            raise ShoalError(f"the value of {flag}: {what}")
    _reject_unreadable(argv)
    parser = build_parser(argv[0] if argv else None, argv[1] if len(argv) > 1 else None)
    args, rest = parser.parse_known_args(argv)
    if args.verb is None:
        parser.print_help()
        return 0
    overrides, stray = read_overrides(args, rest)
    if stray:
        named = [
            item.partition("=")[0] for item in stray if item.startswith("-")
        ] or stray  # print only the flags: their values may be secrets
        near = [n for n in map(args.verb_parser.near_flag, named) if n]
        hint = f"did you mean {' '.join(near)}?" if near else f"see shoal {args.verb} --help"
        raise ShoalError(f"shoal {args.verb} does not take {' '.join(named)}; {hint}")
    result: int = args.run(args, overrides, argv) or 0
    return result


def _reject_unreadable(argv: list[str]) -> None:
    """Raise `ShoalError` for an argument that is not valid text: neither a config nor a run's records could store it."""
    from shoal.resolve.recipe import not_text

    for before, item in zip(["shoal", *argv], argv, strict=False):
        if why := not_text(item):
            raise ShoalError(f"the argument after {before if not not_text(before) else 'another invalid one'}: {why}")
