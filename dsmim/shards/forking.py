"""Forking data workers from a process with threads.

CPython before 3.12 can lose a child at its very start: when some thread was just making itself known to the interpreter
as the process was forked (gloo's threads do so whenever they drop the last hold of a tensor), the child waits for ever
for a lock whose holder it does not have (PyOS_AfterFork_Child). It has done nothing by then: it can be forked again.
"""

from __future__ import annotations

import multiprocessing.context
import os
import select
import signal
import sys
from contextlib import suppress
from multiprocessing.popen_fork import Popen
from multiprocessing.process import BaseProcess

PATIENCE = 10.0  # seconds in which a forked child must have come to life; milliseconds, where nothing is wrong
ATTEMPTS = 5

_alive: int | None = None  # in the child: where to say so


class _Popen(Popen):
    def _launch(self, process: BaseProcess) -> None:
        for _ in range(ATTEMPTS):
            if self._comes_alive(process):
                return
            print(f"forked data worker {self.pid} did not start; forked again", file=sys.stderr, flush=True)
            self.finalizer()
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        raise OSError(f"no data worker came to life in {ATTEMPTS} forks of {PATIENCE:.0f} s each")

    def _comes_alive(self, process: BaseProcess) -> bool:
        global _alive
        reading, _alive = os.pipe()
        try:
            super()._launch(process)  # the child never returns from here
            return bool(select.select([reading], [], [], PATIENCE)[0])
        finally:
            os.close(reading)
            os.close(_alive)
            _alive = None


def _say_alive() -> None:
    if _alive is not None:
        os.write(_alive, b"!")


os.register_at_fork(after_in_child=_say_alive)  # called when the child's interpreter is in order again


class _Process(multiprocessing.context.ForkProcess):
    @staticmethod
    def _Popen(process: BaseProcess) -> Popen:
        return _Popen(process)


class ForkContext(multiprocessing.context.ForkContext):
    """multiprocessing's "fork" for a DataLoader, whose children are known to have started."""

    Process = _Process
