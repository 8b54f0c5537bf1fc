"""Statuses of ranks, as if they had published them."""

from dsmim.health.status import Phase, RankStatus


def statuses(*ranks: tuple[int, str, str, int], step: int = 5) -> list[RankStatus]:
    """Make one status for each (beat, state, name of the phase, number of the phase)."""
    return [
        RankStatus(beat, 1000.0, f"node{rank}", Phase(name, step, 0.0, number), 9.0, state)
        for rank, (beat, state, name, number) in enumerate(ranks)
    ]
