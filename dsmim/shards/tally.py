"""Counts of things that are left out, by kind, with the first of each kind."""

from __future__ import annotations

NAMED = 8


class Tally(dict[str, tuple[int, str]]):
    """How often each kind of thing was met, and the first of it."""

    def count(self, kind: str, example: str, times: int = 1) -> None:
        """Count one thing, or `times` of them."""
        before, first = self.get(kind, (0, example))
        self[kind] = before + times, first

    def add(self, other: Tally) -> None:
        """Add the counts of another tally."""
        for kind, (times, example) in other.items():
            self.count(kind, example, times)

    def __str__(self) -> str:
        kinds = sorted(self.items(), key=lambda item: -item[1][0])
        rest = sum(times for _, (times, _) in kinds[NAMED:])
        words = [f"{kind} {times} ({example})" for kind, (times, example) in kinds[:NAMED]]
        return ", ".join([*words, *([f"others {rest}"] if rest else [])])

    def line(self) -> list[str]:
        """Return the line that says what was left out; nothing if nothing was."""
        return [f"{sum(times for times, _ in self.values())} left out: {self}"] if self else []
