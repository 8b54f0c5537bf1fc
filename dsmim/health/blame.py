"""Which rank the others wait for, told from what each said last. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WORKING, BROKEN, JUDGED, ENDED = "working", "broken", "judged", "ended"
NAMED = 4  # ranks that a sentence names one by one


@dataclass(frozen=True)
class Entry:
    """What one rank says of itself."""

    count: int
    """Grows with every entry."""
    wall: float
    """When it was said, in seconds since 1970 by the clock of its node."""
    host: str
    step: int | None
    phase: str
    seconds: float
    """How long it had been in that phase."""
    moves: int
    """How many phases it has begun: ranks take them in the same order."""
    state: str
    """WORKING; BROKEN: a collective of its own failed; JUDGED: and it knows why; ENDED: it left by itself."""


def blame(first: Sequence[Entry | None], second: Sequence[Entry | None], own: int, now: float) -> str:
    """Two looks at all ranks' entries, a few beats apart → whom the others wait for, in a sentence.

    now: seconds since 1970.
    """
    said = {rank: entry for rank, entry in enumerate(second) if entry}
    gone = {r: entry for r, entry in said.items() if r != own and first[r] and first[r].count == entry.count}
    words = [f"rank {rank} never gave a sign of life" for rank, entry in enumerate(second) if not entry]
    words += [_silence(rank, entry, now) for rank, entry in gone.items() if entry.state == WORKING]
    if words:
        return f"{_listed(words)}. It was killed or stopped, or its node or network failed"
    left = [f"rank {r} on {entry.host} has left, at: {_at(entry)}" for r, entry in said.items() if entry.state == ENDED]
    if left:
        return f"{_listed(left)}; see what it said itself"
    return _behind(said) or _level(said, gone, own)


def whereabouts(phase: str, step: int | None) -> str:
    return phase if step is None else f"{phase}, step {step}"


def _behind(said: dict[int, Entry]) -> str | None:
    """Those with fewest phases begun."""
    least = min(entry.moves for entry in said.values())
    ahead = [entry for entry in said.values() if entry.moves > least]
    if not ahead:
        return None
    late = {rank: entry for rank, entry in said.items() if entry.moves == least}
    words = [f"rank {r} on {e.host} has been at: {_at(e)} for {e.seconds:.0f} s" for r, e in late.items()]
    (phase, step), _ = Counter((entry.phase, entry.step) for entry in ahead).most_common(1)[0]
    others = "the other rank is" if len(ahead) == 1 else f"the {len(ahead)} others are"
    return f"{_listed(words)}; {others} at: {whereabouts(phase, step)}"


def _level(said: dict[int, Entry], gone: dict[int, Entry], own: int) -> str:
    """All have come to the same place, be it too late."""
    if gone:
        words = [f"rank {rank} on {entry.host}" for rank, entry in gone.items()]
        return f"{_listed(words)} gave up waiting before this rank came, at: {_at(said[own])}"
    stuck = [f"rank {rank} on {entry.host}" for rank, entry in said.items() if entry.state == WORKING]
    if stuck and len(stuck) < len(said):
        return f"{_listed(stuck)} did not meet the others, all being at: {_at(said[own])}"
    return f"every rank is alive and at: {_at(said[own])}; the network between them may have failed"


def _silence(rank: int, entry: Entry, now: float) -> str:
    seconds = max(0, now - entry.wall)  # clocks of nodes differ
    return f"rank {rank} on {entry.host} gives no sign of life since {seconds:.0f} s, last at: {_at(entry)}"


def _at(entry: Entry) -> str:
    return whereabouts(entry.phase, entry.step)


def _listed(words: Iterable[str]) -> str:
    words = list(words)
    more = f" and {len(words) - NAMED} more" if len(words) > NAMED else ""
    return "; ".join(words[:NAMED]) + more
