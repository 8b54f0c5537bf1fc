"""Figures of an evaluation as a table for people."""

from __future__ import annotations

from typing import Any


def figure_table(figures: dict[str, Any]) -> str:
    """Return a line per figure: its name, then its value, accuracies in percent."""
    width = max(map(len, figures))
    return "\n".join(f"{name.ljust(width)}  {shown(name, value)}" for name, value in figures.items())


def shown(name: str, value: Any) -> str:
    """Return a value as people read it: an accuracy (0 to 1) in percent, other fractions with four digits."""
    if value is None:
        return "-"
    if name.startswith("accuracy"):
        return f"{100 * value:.2f} %"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
