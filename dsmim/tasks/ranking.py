"""Where the right class stands among the scores: top-1 and top-5 figures, with one rule for ties and for NaN.

Of equal scores the lower class number is first, as in torch.argmax. An image with NaN among its scores is wrong.
"""

from __future__ import annotations

import torch

TOPS = {"accuracy": 1, "accuracy_top5": 5}
"""Name of a figure → how many first classes may hold the right one."""


def tops(classes: int) -> dict[str, int]:
    """Return the figures of TOPS for so many classes. Without more than 5, the right one is always in the top 5."""
    return {name: top for name, top in TOPS.items() if top < max(classes, 2)}


def places(scores: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return (B,) int64: how many classes come before the best right one. An image with NaN, or without any right
    class, has the number of classes.

    scores (B, classes); right (B, classes) bool: one class, or several.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    first = right.gather(1, order).int().argmax(dim=-1)  # of equal values torch gives the first
    never = scores.isnan().any(dim=-1) | ~right.any(dim=-1)
    return first.masked_fill(never, scores.shape[-1])


def answers(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return (B,): the first class of each image. With NaN among the scores it is the lowest class that is wrong."""
    return torch.where(scores.isnan().any(dim=-1), (labels == 0).long(), scores.argmax(dim=-1))


def right_within(place: torch.Tensor, weight: torch.Tensor, classes: int) -> list[torch.Tensor]:
    """Return for each figure of `tops(classes)` the sum of the weights (B,) of the images that it counts as right."""
    return [(weight * (place < top)).sum() for top in tops(classes).values()]


def accuracies(right: list[float], samples: float, classes: int) -> dict[str, float]:
    """Return the figures of `tops(classes)`: the shares of `samples` that the sums `right` are; NaN without samples."""
    count = samples or float("nan")
    return {name: value / count for name, value in zip(tops(classes), right, strict=True)}
