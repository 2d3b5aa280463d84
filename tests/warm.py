"""
Commands forked from a process that has imported shoal: importing torch is most of a short command's work.

    process = Popen(shoal("train", "recipe.yaml"), cwd=folder, env=environment)     # like subprocess.Popen

A command is forked only if its environment equals the server's, apart from variables that are read after the import;
otherwise a fresh interpreter starts. `popen_of` also starts the first command of each verb fresh. The workers of a
forked launcher are forked too. Forked processes share the seed of Python's hashes; fresh ones do not.

A forked process is a child of the process that requested it. The server forks twice, and the intermediate process ends at
once; meanwhile the requesting process adopts orphans (PR_SET_CHILD_SUBREAPER, Linux).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import inspect
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

LINUX: Final = sys.platform == "linux"
SHOAL: Final = [sys.executable, "-m", "shoal"]
NAME: Final = "shoal-server"  # a server's process name: it is a child of its launcher, but not a worker
# Verbs that import torch; the others start in a tenth of a second.
VERBS: Final = {"train", "eval", "generate", "export", "verify", "bench", "profile"}
IMPORTED: Final = ("shoal.elastic.agent", "shoal.training.loop", "shoal.bench.parity", "shoal.infer.commands")
LAUNCHERS: Final = {"train", "verify", "profile"}
THREADS: Final = "--threads"  # an option that sets variables that torch reads when it is imported
READ_LATER: Final = re.compile(
    r"(SHOAL|TORCHELASTIC|PYTEST|MASTER|LOCAL|GROUP|ROLE|WANDB|COMET|MLFLOW)_.*|RANK|WORLD_SIZE|TMPDIR|PWD|OLDPWD|_|CUDA_VISIBLE_DEVICES"
    # torch reads these when it creates a group or compiles; the first sets only what the store logs
    r"|TORCH_CPP_LOG_LEVEL|TORCH_DISABLE_SHARE_RDZV_TCP_STORE|TORCH_NCCL_.*|TORCHINDUCTOR_CACHE_DIR|GLOO_SOCKET_IFNAME"
    r"|KINETO_LOG_LEVEL|TIKTOKEN_CACHE_DIR|CUBLAS_WORKSPACE_CONFIG|MALLOC_(MMAP|TRIM)_THRESHOLD_|GLIBC_TUNABLES"  # cuBLAS, and the speed of malloc
)
_SUBREAPER, _DEATH_SIGNAL, _SET_NAME = 36, 1, 15  # prctl(2)


def shoal(*arguments: str) -> list[str]:
    return [*SHOAL, *arguments]


def _prctl(*arguments: Any) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(*arguments)


def die_with_parent() -> None:
    """End this process, also while it is stopped, when its parent ends (Linux)."""
    _prctl(_DEATH_SIGNAL, signal.SIGKILL)


class Server:
    """A process that forks commands on request. `environment`: its environment when it started."""

    def __init__(self, pid: int, asking: socket.socket, environment: Mapping[str, str]) -> None:
        self.pid, self.environment = pid, dict(environment)
        self._asking, self._lock = asking, threading.Lock()

    @classmethod
    def fresh(cls, environment: Mapping[str, str]) -> Server:
        """Start a new interpreter that imports `IMPORTED`."""
        ours, theirs = socket.socketpair()
        code = f"import sys; sys.path[0] = {str(Path(__file__).parents[1])!r}; from tests.warm import serve_fresh; serve_fresh()"
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(theirs.fileno())], env=environment, stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )  # fmt: skip
        theirs.close()
        atexit.register(process.kill)
        return cls(process.pid, ours, environment)

    @classmethod
    def forked(cls, environment: Mapping[str, str]) -> Server:
        """Fork this process, which must have one thread."""
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            ours.close()
            null = os.open(os.devnull, os.O_RDWR)
            for number in range(3):
                os.dup2(null, number)
            _serve(theirs)
        theirs.close()
        return cls(pid, ours, environment)

    def start(self, asked: Mapping[str, Any], files: Sequence[int]) -> int:
        """Request a forked child of this process with these standard streams; return its process id."""
        with self._lock:
            _prctl(_SUBREAPER, 1)
            try:
                text = json.dumps({**asked, "parent": os.getpid()}).encode()
                socket.send_fds(self._asking, [len(text).to_bytes(4, "big")], files)
                self._asking.sendall(text)
                return int.from_bytes(_receive(self._asking, 4), "big")
            finally:
                _prctl(_SUBREAPER, 0)


def _receive(channel: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        part = channel.recv(count - len(found))
        if not part:
            raise EOFError
        found += part
    return found


def serve_fresh() -> NoReturn:
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    _serve(socket.socket(fileno=int(sys.argv[1])))


def _serve(channel: socket.socket) -> NoReturn:
    """Fork a process for each request, until the requesting process has ended."""
    _prctl(_SET_NAME, NAME.encode(), 0, 0, 0)
    die_with_parent()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):  # a launcher passes these to its children
        signal.signal(number, signal.SIG_IGN)
    while True:
        head, files, _, _ = socket.recv_fds(channel, 4, 3)
        if not head:
            os._exit(0)
        asked = json.loads(_receive(channel, int.from_bytes(head, "big")))
        reading, writing = os.pipe()
        middle = os.fork()
        if middle == 0:
            pid = os.fork()
            if pid == 0:
                for file in (channel.fileno(), reading, writing):
                    os.close(file)
                _become(asked, files)
            os.write(writing, pid.to_bytes(4, "big"))
            os._exit(0)
        os.waitpid(middle, 0)  # now its child has its final parent
        channel.sendall(os.read(reading, 4))
        for file in (reading, writing, *files):
            os.close(file)


def _become(asked: Mapping[str, Any], files: Sequence[int]) -> NoReturn:
    """Run the requested command in this forked process, then end the process."""
    code = 1
    try:
        while os.getppid() != asked["parent"]:
            time.sleep(0.001)
        _prctl(_SET_NAME, b"python", 0, 0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for ended_by in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(ended_by, signal.SIG_DFL)
        if asked["session"]:
            os.setsid()
        for number, file in enumerate(files):
            os.dup2(file, number)
        os.closerange(3, 3 + max(files))
        os.chdir(asked["cwd"])
        os.environ.clear()
        os.environ.update(asked["environment"])
        tempfile.tempdir = None
        sys.path[0] = asked["cwd"]
        _open_streams()
        import shoal.cli

        sys.argv = [str(Path(shoal.__file__).with_name("__main__.py")), *asked["arguments"]]
        if asked["arguments"][0] in LAUNCHERS and "RANK" not in os.environ:
            _fork_workers(asked["server"])
        shoal.cli.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def _open_streams() -> None:
    """Open the standard streams the way Python does when it starts."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        errors = "backslashreplace" if name == "stderr" else "strict"
        lines = number == 2 or os.isatty(number)
        stream = open(number, mode, 1 if lines else -1, encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _fork_workers(environment: Mapping[str, str]) -> None:
    """Let this launcher fork its workers."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    class Worker(Popen):
        server = Server.forked(environment)

    subprocess_handler.Popen = Worker  # type: ignore[attr-defined]


_environment = dict(os.environ)  # before any test changes it
# Verbs that this pytest worker need not start fresh. verify is one: a test of it sets PYTHONPATH, and so always starts fresh.
_seen: set[str] = {"verify"}
seen_by_all: Path | None = None  # a folder that all pytest workers share: one file for each verb


@functools.cache
def _session_server() -> Server:
    from shoal.launch.torchrun import worker_environment

    kept = {name: value for name, value in _environment.items() if not READ_LATER.fullmatch(name)}
    return Server.fresh(kept | worker_environment(1))


def popen_of(verb: str) -> type[subprocess.Popen[Any]]:
    """Return the class that starts a command of this verb: a fresh interpreter for the first one of a pytest session."""
    if verb in _seen:
        return Popen
    _seen.add(verb)
    try:
        if seen_by_all is not None:
            (seen_by_all / verb).touch(exist_ok=False)
    except FileExistsError:
        return Popen
    return subprocess.Popen


class Popen(subprocess.Popen[Any]):
    """`subprocess.Popen`, which forks a command of shoal's if it can."""

    server: Server | None = None  # the server that forks; None means the session's

    def _execute_child(self, *values: Any) -> None:
        names = inspect.signature(subprocess.Popen._execute_child).bind(None, *values).arguments  # type: ignore[attr-defined]
        del names["self"]
        if not self._fork(**names):
            super()._execute_child(*values)  # type: ignore[misc]

    def _fork(self, args: Any, cwd: Any, env: Any, start_new_session: bool, **more: Any) -> bool:
        """Fork the command if possible; return whether it was."""
        environment = dict(os.environ if env is None else env)
        if not LINUX or not runs_shoal(args):
            return False
        server = self.server or _session_server()
        if not starts_alike(args, environment, server.environment):
            return False
        pipes = [more[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        files = [number if pipe == -1 else pipe for number, pipe in enumerate(pipes)]
        asked = {
            "arguments": args[len(SHOAL) :], "cwd": str(cwd or os.getcwd()), "environment": environment,
            "session": start_new_session, "server": server.environment,
        }  # fmt: skip
        try:
            self.pid = server.start(asked, files)
        except (OSError, EOFError):  # the server was killed
            return False
        self._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(more[name] for name in ends))  # type: ignore[attr-defined]
        return True


def runs_shoal(args: Sequence[str]) -> bool:
    """Return whether this is a command of shoal's that imports torch."""
    return list(args[: len(SHOAL)]) == SHOAL and bool(VERBS.intersection(args[len(SHOAL) : len(SHOAL) + 1]))


def starts_alike(args: Sequence[str], environment: Mapping[str, str], of_server: Mapping[str, str]) -> bool:
    """Return whether a fresh interpreter would find the server's variables when it starts."""
    if any(item.partition("=")[0] == THREADS for item in args):
        return False
    return all(READ_LATER.fullmatch(name) for name, _ in environment.items() ^ of_server.items())
