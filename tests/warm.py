"""
Fork `shoal` commands from a process that has imported it, because importing torch is most of a short command's work.

    process = Popen(shoal("train", "recipe.yaml"), cwd=folder, env=environment)     # as subprocess.Popen

A command is forked only if a fresh interpreter would start in the same state: its environment equals the server's,
except for variables that are read later. The first command of each verb in a session gets a fresh interpreter, and so do
the workers of a fresh launcher. Forked ranks share the seed of Python's hashes; fresh ones do not.

`Server` makes each process a child of the one that requested it: the intermediate process exits at once, and meanwhile
the requester adopts orphans (PR_SET_CHILD_SUBREAPER). A forked launcher has its own server for its workers.
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

SHOAL: Final = [sys.executable, "-m", "shoal"]
NAME: Final = "shoal-server"  # of a server's process, which is not a worker
# Verbs that import torch; the others start in a tenth of a second.
VERBS: Final = {"train", "eval", "generate", "export", "verify", "bench"}
IMPORTED: Final = ("shoal.elastic.agent", "shoal.training.loop", "shoal.bench.parity", "shoal.infer.commands")
LAUNCHERS: Final = {"train", "verify"}
READ_AT_START: Final = {"--threads", "--launch.threads"}  # they set variables that torch reads when it is imported
READ_LATER: Final = re.compile(
    r"(SHOAL|TORCHELASTIC|PYTEST|MASTER|LOCAL|GROUP|ROLE)_.*|RANK|WORLD_SIZE|TMPDIR|PWD|OLDPWD|_|CUDA_VISIBLE_DEVICES"
    # read by torch when it creates a group or compiles; the first sets the store's log level, in the launcher only
    r"|TORCH_CPP_LOG_LEVEL|TORCH_DISABLE_SHARE_RDZV_TCP_STORE|TORCH_NCCL_.*|TORCHINDUCTOR_CACHE_DIR|GLOO_SOCKET_IFNAME"
    r"|CUBLAS_WORKSPACE_CONFIG|MALLOC_(MMAP|TRIM)_THRESHOLD_|GLIBC_TUNABLES"  # of cuBLAS and malloc
)
_SUBREAPER, _DEATH_SIGNAL, _SET_NAME = 36, 1, 15  # prctl(2)


def shoal(*arguments: str) -> list[str]:
    return [*SHOAL, *arguments]


def _prctl(*arguments: Any) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(*arguments)


class Server:
    """A process that forks. environment: its own, from its start."""

    def __init__(self, pid: int, asking: socket.socket, environment: Mapping[str, str]) -> None:
        self.pid, self.environment = pid, dict(environment)
        self._asking, self._lock = asking, threading.Lock()

    @classmethod
    def fresh(cls, environment: Mapping[str, str]) -> Server:
        """Start an interpreter and import the modules that the commands of `VERBS` use."""
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
        """Fork this process, which must not have threads."""
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
        """Fork a child of this process with these standard streams; return its id."""
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
    """Fork the requested processes until the requester exits."""
    _prctl(_SET_NAME, NAME.encode(), 0, 0, 0)
    _prctl(_DEATH_SIGNAL, signal.SIGKILL)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):  # a launcher passes them to its children
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
        os.waitpid(middle, 0)  # now its child has the right parent
        channel.sendall(os.read(reading, 4))
        for file in (reading, writing, *files):
            os.close(file)


def _become(asked: Mapping[str, Any], files: Sequence[int]) -> NoReturn:
    """Run the requested command in this process, then exit."""
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
    """Open the standard streams as Python does at its start."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        errors = "backslashreplace" if name == "stderr" else "strict"
        lines = number == 2 or os.isatty(number)
        stream = open(number, mode, 1 if lines else -1, encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _fork_workers(environment: Mapping[str, str]) -> None:
    """Fork the workers of this launcher too."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    class Worker(Popen):
        server = Server.forked(environment)

    subprocess_handler.Popen = Worker  # type: ignore[attr-defined]


_environment = dict(os.environ)  # of this session, before a test adds to it
_seen: set[str] = set()


@functools.cache
def _session_server() -> Server:
    from shoal.launch.torchrun import worker_environment

    kept = {name: value for name, value in _environment.items() if not READ_LATER.fullmatch(name)}
    return Server.fresh(kept | worker_environment(1))


def popen_of(verb: str) -> type[subprocess.Popen[Any]]:
    """Return the class that starts a command of this verb: the first one of a session gets a fresh interpreter."""
    if verb in _seen:
        return Popen
    _seen.add(verb)
    return subprocess.Popen


class Popen(subprocess.Popen[Any]):
    """`subprocess.Popen`, which forks a shoal command if it can."""

    server: Server | None = None  # of this process

    def _execute_child(self, *values: Any) -> None:
        names = inspect.signature(subprocess.Popen._execute_child).bind(None, *values).arguments  # type: ignore[attr-defined]
        del names["self"]
        if not self._fork(**names):
            super()._execute_child(*values)  # type: ignore[misc]

    def _fork(self, args: Any, cwd: Any, env: Any, start_new_session: bool, **more: Any) -> bool:
        """Return whether the command was forked."""
        environment = dict(os.environ if env is None else env)
        if not runs_shoal(args):
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
    """Return whether this is a shoal command that imports torch."""
    return list(args[: len(SHOAL)]) == SHOAL and bool(VERBS.intersection(args[len(SHOAL) : len(SHOAL) + 1]))


def starts_alike(args: Sequence[str], environment: Mapping[str, str], of_server: Mapping[str, str]) -> bool:
    """Return whether a fresh interpreter would start in the same state."""
    if "RANK" not in environment and any(item.partition("=")[0] in READ_AT_START for item in args):
        return False  # a worker has them in its environment, from its launcher
    return all(READ_LATER.fullmatch(name) for name, _ in environment.items() ^ of_server.items())
