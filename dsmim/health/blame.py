"""Name the ranks that the others wait for, from what each rank said last. Pure: no store, no clock, no threads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from dsmim.health.status import LEFT, LEFT_ALONE, WORKING, RankStatus

NAMED = 4  # how many ranks a sentence names one by one


def name_missing(
    first: Sequence[RankStatus | None], second: Sequence[RankStatus | None], own_rank: int, now: float
) -> str:
    """Return a sentence that names the ranks the others wait for.

    first, second: the status of all ranks, by rank, read twice a few beats apart; None for a rank that never published
    one. A rank whose status is the same both times is taken for dead. now: seconds since 1970.
    """
    known = {rank: status for rank, status in enumerate(second) if status}
    silent = {r: status for r, status in known.items() if r != own_rank and first[r] and first[r].beat == status.beat}
    dead = [f"rank {rank} has never given a sign of life" for rank, status in enumerate(second) if not status]
    dead += [_describe_silence(rank, status, now) for rank, status in silent.items() if status.state == WORKING]
    if dead:
        return f"{_join(dead)}. It was killed or stopped, or its node or network failed"
    left = [f"{_name(rank, status)} has left, at: {status.phase}" for rank, status in known.items()
            if status.state in (LEFT, LEFT_ALONE)]  # fmt: skip
    if left:
        return f"{_join(left)}; see its own message"
    return _name_late(known) or _name_absent(known, silent, own_rank)


def _name_late(known: dict[int, RankStatus]) -> str | None:
    """Name the ranks that have begun fewer phases than others; None when all have begun equally many."""
    fewest = min(status.phase.number for status in known.values())
    ahead = [status for status in known.values() if status.phase.number > fewest]
    if not ahead:
        return None
    late = {rank: status for rank, status in known.items() if status.phase.number == fewest}
    words = [f"{_name(rank, status)} has been at: {status.phase} for {status.seconds:.0f} s"
             for rank, status in late.items()]  # fmt: skip
    phase, _ = Counter(str(status.phase) for status in ahead).most_common(1)[0]
    others = "the other rank is" if len(ahead) == 1 else f"the {len(ahead)} others are"
    return f"{_join(words)}; {others} at: {phase}"


def _name_absent(known: dict[int, RankStatus], silent: dict[int, RankStatus], own_rank: int) -> str:
    """Name the ranks that are not in the collective, although all have reached the same phase."""
    here = known[own_rank].phase
    if silent:
        words = [_name(rank, status) for rank, status in silent.items()]
        return f"{_join(words)} stopped waiting before this rank arrived, at: {here}"
    outside = [_name(rank, status) for rank, status in known.items() if status.state == WORKING]
    if outside and len(outside) < len(known):
        return f"{_join(outside)} did not join the others; all ranks are at: {here}"
    return f"every rank is alive and at: {here}; the network between them may have failed"


def _describe_silence(rank: int, status: RankStatus, now: float) -> str:
    seconds = max(0, now - status.time)  # clocks of nodes differ
    return f"{_name(rank, status)} has given no sign of life for {seconds:.0f} s, last at: {status.phase}"


def _name(rank: int, status: RankStatus) -> str:
    return f"rank {rank} on {status.host}"


def _join(words: Iterable[str]) -> str:
    words = list(words)
    more = f" and {len(words) - NAMED} more" if len(words) > NAMED else ""
    return "; ".join(words[:NAMED]) + more
