"""What is measured of one reader: whether a resumed run repeats the uninterrupted one, and how fast one core reads."""

from __future__ import annotations

import pickle
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from readers_common import GLOBAL_BATCH, Layout, Reader, Step, Stream, Tars, Unsupported, fingerprint


@dataclass(frozen=True)
class Plan:
    """The layouts of the resume, and its steps before and after the interruption."""

    base: Layout
    others: list[Layout]
    before: int
    after: int


@dataclass
class Resume:
    """The outcome: "bytes" when keys and pixels of every global batch are equal, "keys" when only the keys are."""

    state_bytes: int
    same: str | bool
    others: dict[str, str | bool] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def resume(reader: Reader, tars: Tars, plan: Plan) -> Resume:
    """Interrupt a run, continue it in the same layout and in others, and compare with the run that went on."""
    torch.set_num_threads(1)
    streams = _open(reader, tars, plan.base, None)
    for _ in range(plan.before):
        _global_step(streams)
    states = [pickle.dumps(stream.state()) for stream in streams]
    expected = [_global_step(streams) for _ in range(plan.after)]
    _close(streams)
    stored = reader.stored(states)
    outcome = Resume(sum(map(len, stored)), False)
    for layout in (plan.base, *plan.others):
        loaded = [pickle.loads(state) for state in states]
        try:
            converted = loaded if layout == plan.base else reader.convert(loaded, layout)
            outcome.others[str(layout)] = _continued(reader, tars, layout, converted, expected, outcome)
        except Unsupported as reason:
            outcome.others[str(layout)] = False
            outcome.notes.append(f"{layout}: {reason}")
        except Exception as error:  # each library refuses a state in a way of its own
            outcome.others[str(layout)] = False
            outcome.notes.append(f"{layout}: refused: {_last_line(error)}")
    outcome.same = outcome.others.pop(str(plan.base))
    return outcome


def _continued(
    reader: Reader, tars: Tars, layout: Layout, states: list[Any], expected: list[Step], outcome: Resume
) -> str | bool:
    """Continue from the states; return what equals the expected steps."""
    streams = _open(reader, tars, layout, states)
    got = [_global_step(streams) for _ in expected]
    _close(streams)
    if got == expected:
        return "bytes"
    keys = [_keys(step) == _keys(other) for step, other in zip(got, expected, strict=True)]
    if all(keys):
        return "keys"
    outcome.notes.append(f"{layout}: {sum(keys)} of {len(keys)} global batches hold the expected keys")
    return False


def _last_line(error: Exception) -> str:
    """Return what an error says; one of a worker carries the worker's traceback, at the end of which is its reason."""
    lines = str(error).strip().splitlines()
    return lines[-1] if len(lines) > 1 else repr(error)


def _keys(step: Step) -> list[str]:
    return [key for key, _ in step]


def _open(reader: Reader, tars: Tars, layout: Layout, states: list[Any] | None) -> list[Stream]:
    return [reader.open(tars, layout, rank, states[rank] if states else None) for rank in range(layout.ranks)]


def _global_step(streams: list[Stream]) -> Step:
    """One global batch, over all ranks; sorted, because no reader promises which rank takes which sample."""
    return sorted(pair for stream in streams for batch in stream.step() for pair in fingerprint(*batch))


def _close(streams: list[Stream]) -> None:
    for stream in streams:
        stream.close()


def rate(reader: Reader, tars: Tars, steps: int) -> float:
    """Return images per second of CPU time of one process without workers, after a first step that is not counted.

    CPU time, of all threads, because it hardly changes when other programs take the cores; on an idle machine it is the
    time that passes. Files come from the page cache.
    """
    torch.set_num_threads(1)
    stream = reader.open(tars, Layout(1, 0, GLOBAL_BATCH), 0)
    stream.step()
    begin = time.process_time()
    for _ in range(steps):
        stream.step()
    spent = time.process_time() - begin
    stream.close()
    return steps * GLOBAL_BATCH / spent
