"""How a command ends: what it prints, its exit status, and how a rank leaves. ENDINGS is the whole rule.

A rank of train or evaluate leaves by os._exit, when its work is done and its process group is closed. The interpreter's
own shutdown would wait for a data worker in the middle of a download, and torch sometimes aborts there (a thread that
nobody joined): a finished job would count as failed. The other commands return to the interpreter.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from types import NoneType
from typing import Any, NamedTuple, NoReturn, TextIO

from dsmim.health.outcome import COMPLETE, CTRL_C, FAILED, NO_PROGRESS, LostPeer, NoProgress, Stopped

OWN = None
"""In ENDINGS: the status that the command returned, or that its error carries."""


def _nothing(error: object) -> None:
    """Print nothing."""


def _close_output(error: BaseException) -> None:
    """Send further output nowhere: the reader is gone (`dsmim samples … | head`)."""
    for stream in _open_streams():
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _message(error: BaseException) -> None:
    """Print one message: on rank 0 alone if every rank has the same error."""
    from dsmim.cluster.placement import is_first

    if is_first(os.environ) or not _is_on_every_rank(error):
        _print(error)


def _message_then_wait(error: LostPeer) -> None:
    """Print the message, then wait for ranks that do not know it yet."""
    _print(error)
    error.before_exit()


def _traceback(error: BaseException) -> None:
    """Print the traceback: nobody expected this error."""
    import traceback

    with suppress(OSError):
        traceback.print_exception(error)


def _print(error: BaseException) -> None:
    with suppress(OSError):  # standard error may be closed: the status still counts
        print(f"dsmim: error: {error}", file=sys.stderr, flush=True)


def _at_once(status: int) -> NoReturn:
    """End the process here, without the interpreter's shutdown."""
    for stream in _open_streams():
        with suppress(OSError):
            stream.flush()
    os._exit(status)


def _open_streams() -> list[TextIO]:
    """Return standard output and error. One that was closed before Python started (`>&-`) is None, and left out."""
    return [stream for stream in (sys.stdout, sys.stderr) if stream is not None]


def _after_mpi(status: int) -> NoReturn:
    """End MPI, then the process: mpirun counts a rank that skips Finalize as failed, and ends the others."""
    if "mpi4py.MPI" in sys.modules:
        sys.modules["mpi4py.MPI"].Finalize()
    _at_once(status)


class Ending(NamedTuple):
    """One row of ENDINGS."""

    cause: type
    """What the command raised; NoneType: it returned."""
    report: Callable[[Any], None]
    status: int | None
    rank_status: int | None
    """The status of train and evaluate."""
    leave: Callable[[int], NoReturn]
    """How a rank of train or evaluate leaves."""


# The first row that fits is used.
# fmt: off
ENDINGS = (
    #      cause              report              status    of a rank  a rank leaves
    Ending(NoneType,          _nothing,           OWN,      OWN,       _after_mpi),
    Ending(BrokenPipeError,   _close_output,      COMPLETE, FAILED,    _at_once),  # for a rank: it lost its log
    Ending(KeyboardInterrupt, _nothing,           CTRL_C,   CTRL_C,    _after_mpi),
    Ending(NoProgress,        _message,           NO_PROGRESS, NO_PROGRESS, _after_mpi),
    Ending(ValueError,        _message,           FAILED,   FAILED,    _at_once),
    Ending(OSError,           _message,           FAILED,   FAILED,    _at_once),
    Ending(LostPeer,          _message_then_wait, OWN,      OWN,       _at_once),  # MPI would wait for the lost one
    Ending(Exception,         _traceback,         FAILED,   FAILED,    _at_once),
)
# fmt: on


def end(error: BaseException | None, returned: int | None, is_rank: bool) -> int:
    """Report the end of a command. Return the exit status; a rank of train or evaluate leaves with it instead.

    error: what the command raised, or None; returned: the status that it returned, or None.
    """
    ending = next(row for row in ENDINGS if isinstance(error, row.cause))
    status = ending.rank_status if is_rank else ending.status
    if status is OWN:
        status = returned if error is None else error.status
    try:
        ending.report(error)
    finally:
        if is_rank:
            ending.leave(status)  # even if the report failed
    return status


def _is_on_every_rank(error: BaseException) -> bool:
    """Return whether every rank raises this error: all read the same recipe, and all agree on Stopped."""
    from dsmim.recipe.errors import RecipeError

    return isinstance(error, (RecipeError, Stopped))
