"""Start `dsmim …` without waiting for its imports: fork a process that has imported everything already.

Importing torch and DeepSpeed takes several seconds of each of the hundreds of commands that the tests run. A server,
one for each pytest worker, imports them once; a command is a fork of it, with its own arguments, environment, folder,
session and standard streams.
"""

from __future__ import annotations

import atexit
import gc
import io
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

AT_IMPORT = ("OMP_", "MKL_", "DS_", "PYTHON", "LC_", "LANG", "LD_", "MALLOC", "CUDA", "TORCH_", "PATH", "TMPDIR", "TZ")
"""Beginnings of environment variables that are read when a process starts or imports: the server's must be equal."""


class Server:
    """The client's side of the server process, which starts at the first command."""

    def __init__(self, environment: dict[str, str]):
        self.environment = environment
        self.folder = tempfile.TemporaryDirectory(prefix="prefork")
        self.address = str(Path(self.folder.name) / "s")
        words = [sys.executable, __file__, self.address]
        root = str(Path(__file__).parent.parent)
        # Pipes, as commands have: Python sets up its output by the kind of file.
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(words, env=environment, cwd=root, start_new_session=True, **streams)
        atexit.register(self.close)

    def fits(self, environment: dict[str, str]) -> bool:
        """Return whether a command with this environment may be a fork."""
        changed = {name for name, _ in environment.items() ^ self.environment.items()}
        return not any(name.startswith(AT_IMPORT) for name in changed)

    def start(self, words: list[str], cwd: Path | str, environment: dict[str, str], out: int, err: int) -> Command:
        """Start `dsmim WORDS` with these files as standard output and error."""
        with suppress(FileNotFoundError, ConnectionRefusedError):
            return Command(self._connected(), words, cwd, environment, out, err)
        while True:  # the server is still importing
            assert self.process.poll() is None, "the server of prefork.py ended"
            time.sleep(0.05)
            with suppress(FileNotFoundError, ConnectionRefusedError):
                return Command(self._connected(), words, cwd, environment, out, err)

    def _connected(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self.address)
        return connection

    def close(self) -> None:
        """End the server."""
        self.process.kill()
        self.process.wait()
        self.folder.cleanup()


class Command:
    """A started command, with the part of subprocess.Popen that the tests use."""

    def __init__(self, connection, words, cwd, environment, out: int, err: int):
        self.args, self.returncode, self.connection = ["dsmim", *words], None, connection
        request = json.dumps({"words": words, "cwd": str(cwd), "environment": environment}).encode()
        socket.send_fds(connection, [len(request).to_bytes(4, "little")], [out, err])
        connection.sendall(request)
        self.file = connection.makefile("r")
        self.pid = int(self.file.readline())

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal; None while the command runs."""
        return self._read(0)

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status. Raises subprocess.TimeoutExpired."""
        if self._read(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the command has ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the command."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Ask the command to end."""
        self.send_signal(signal.SIGTERM)

    def _read(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self.connection], [], [], timeout)[0]:
            self.returncode = int(self.file.readline())
        return self.returncode


class Piped:
    """Commands whose standard output and error are read here; all share the two pipes."""

    def __init__(self, server: Server, commands: list[tuple[list[str], dict[str, str]]], cwd: Path | str):
        (read_out, out), (read_err, err) = os.pipe(), os.pipe()
        self.commands = [server.start(words, cwd, environment, out, err) for words, environment in commands]
        os.close(out), os.close(err)
        self.args = self.commands[0].args
        self.parts = (io.BytesIO(), io.BytesIO())
        self.readers = [
            threading.Thread(target=_drain, args=pair, daemon=True)
            for pair in zip((read_out, read_err), self.parts, strict=True)
        ]
        for reader in self.readers:
            reader.start()

    @property
    def pids(self) -> list[int]:
        """The process id of each command."""
        return [command.pid for command in self.commands]

    @property
    def returncode(self) -> int | None:
        """0 if every command ended with 0, else the first other status; None while one runs."""
        statuses = [command.poll() for command in self.commands]
        return None if None in statuses else next((status for status in statuses if status), 0)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Return standard output and error when all have ended. Raises subprocess.TimeoutExpired with what came so
        far. As under torchrun, a command that fails ends the others."""
        deadline = time.monotonic() + timeout
        for reader in self.readers:
            while reader.is_alive() and time.monotonic() < deadline:
                reader.join(0.05)
                self._end_the_others()
        for command in self.commands:
            if not any(reader.is_alive() for reader in self.readers):
                command.wait()
        if any(reader.is_alive() for reader in self.readers):
            output, error = (part.getvalue() for part in self.parts)
            raise subprocess.TimeoutExpired(self.args, timeout, output, error)
        return tuple(part.getvalue().decode(errors="replace") for part in self.parts)

    def _end_the_others(self) -> None:
        if any(command.poll() for command in self.commands):
            time.sleep(0.5)  # they may be about to end by themselves
            for command in self.commands:
                command.terminate()


def _drain(source: int, into: io.BytesIO) -> None:
    with os.fdopen(source, "rb", buffering=0) as file:
        while data := file.read(65536):
            into.write(data)


def serve(address: str) -> dict | None:
    """Answer requests until the tests end. Return in each child, with its request."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    wake, awoken = socket.socketpair()
    wake.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno())
    parent, children = os.getppid(), {}
    while os.getppid() == parent:
        readable = select.select([listener, awoken], [], [], 5)[0]
        if awoken in readable:
            awoken.recv(4096)
        _collect(children)
        if listener in readable:
            connection, _ = listener.accept()
            request, streams = _receive(connection)
            child = os.fork()
            if child == 0:
                for file in (listener, wake, awoken, connection, *children.values()):
                    file.close()
                return request | {"streams": streams}
            for stream in streams:
                os.close(stream)
            connection.sendall(f"{child}\n".encode())
            children[child] = connection
    os._exit(0)


def _collect(children: dict[int, socket.socket]) -> None:
    """Report the exit status of every child that has ended."""
    for child in list(children):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            with children.pop(child) as connection, suppress(OSError):
                connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _receive(connection: socket.socket) -> tuple[dict, list[int]]:
    size, streams, _, _ = socket.recv_fds(connection, 4, 2)
    size, data = int.from_bytes(size, "little"), b""
    while len(data) < size:
        data += connection.recv(size - len(data))
    return json.loads(data), list(streams)


def become(request: dict) -> None:
    """Give this process what a started command has of its own."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for stream, number in zip(request["streams"], (1, 2), strict=True):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    sys.argv = ["dsmim", *request["words"]]


def _status() -> int:
    """Return the exit status of the command."""
    from dsmim.cli.main import main

    try:
        return main()
    except SystemExit as wrong_usage:
        return wrong_usage.code


def _end(status: int) -> None:
    """End the process, without the interpreter's shutdown: in a process with all these modules it takes seconds."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(status)


def _import_all() -> None:
    """Import what commands import when they run."""
    import deepspeed
    import deepspeed.ops  # noqa: F401
    import timm  # noqa: F401
    import torchvision  # noqa: F401

    import dsmim.cli.main
    import dsmim.evaluate
    import dsmim.predict
    import dsmim.train
    import dsmim.weights.export  # noqa: F401


if __name__ == "__main__":
    sys.path[0] = str(Path(sys.executable).parent)  # that of the installed command
    _import_all()
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page that it touches
    become(serve(sys.argv[1]))
    _end(_status())
