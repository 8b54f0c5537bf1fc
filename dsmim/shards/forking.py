"""Worker processes: a fork that is known to have started, and workers that end with the process that started them.

CPython before 3.12 can lose a forked child at its start. When another thread registers itself with the interpreter at
the moment of the fork (gloo's threads do so whenever they drop the last reference to a tensor), the child waits for
ever for a lock whose holder does not exist in it (PyOS_AfterFork_Child). It has done nothing by then, so it can be
forked again.
"""

from __future__ import annotations

import ctypes
import multiprocessing.context
import os
import select
import signal
import sys
from contextlib import suppress
from multiprocessing.popen_fork import Popen
from multiprocessing.process import BaseProcess

PATIENCE = 10.0  # seconds in which a forked child must report that it runs; usually it takes milliseconds
ATTEMPTS = 5

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_report_to: int | None = None  # in the child: the pipe on which it reports that it runs


def end_with_parent() -> None:
    """Let the kernel kill this process (on Linux) when the thread that started it ends, however that ends.

    Without it, workers of a pool whose process is killed wait for work for ever.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class _Popen(Popen):
    def _launch(self, process: BaseProcess) -> None:
        for _ in range(ATTEMPTS):
            if self._starts(process):
                return
            print(f"forked data worker {self.pid} did not start; forked again", file=sys.stderr, flush=True)
            self.finalizer()
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        raise OSError(f"no data worker started in {ATTEMPTS} forks of {PATIENCE:.0f} s each")

    def terminate(self) -> None:
        """Kill the process: data workers ignore SIGTERM, which Slurm sends to every process of a step, and a program
        waits at its end for what it has terminated."""
        self._send_signal(signal.SIGKILL)

    def _starts(self, process: BaseProcess) -> bool:
        global _report_to
        reading, _report_to = os.pipe()
        try:
            super()._launch(process)  # does not return in the child
            return bool(select.select([reading], [], [], PATIENCE)[0])
        finally:
            os.close(reading)
            os.close(_report_to)
            _report_to = None


def _report_start() -> None:
    if _report_to is not None:
        os.write(_report_to, b"!")


os.register_at_fork(after_in_child=_report_start)  # called when the child's interpreter works again


class _Process(multiprocessing.context.ForkProcess):
    @staticmethod
    def _Popen(process: BaseProcess) -> Popen:
        return _Popen(process)


class ForkContext(multiprocessing.context.ForkContext):
    """multiprocessing's "fork" context for a DataLoader: each child is known to have started."""

    Process = _Process
