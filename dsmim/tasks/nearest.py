"""The k nearest neighbours of images, by similarity: exact, in bounded memory, the same in any split of the queries.

The weighted vote is that of DINO (facebookresearch/dino, eval_knn.py), from arXiv 1805.01978.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from dsmim.tasks.ranking import places, right_within

QUERIES = 512
"""Queries that are compared at once."""
_SHIFT = 32
_LAST = 2**_SHIFT - 1


class Neighbours:
    """The k most similar samples of a bank for each query; the bank is added in blocks.

    Cosine similarity in fp32. Of equally similar samples the one that was added first is nearer. queries (Q, D). A
    block costs memory for QUERIES × its samples, whatever the size of the bank.
    """

    def __init__(self, queries: torch.Tensor, k: int):
        self.chunks, self.k, self.added = F.normalize(queries, dim=1).split(QUERIES), k, 0
        self.best = [torch.empty(len(chunk), 0, dtype=torch.int64, device=chunk.device) for chunk in self.chunks]

    def add(self, bank: torch.Tensor) -> None:
        """Add samples (N, D), which are numbered on."""
        bank = F.normalize(bank, dim=1)
        numbers = self.added + torch.arange(len(bank), device=bank.device)
        for place, chunk in enumerate(self.chunks):
            found = _ordered(chunk @ bank.T, numbers)  # (q, N)
            both = torch.cat([self.best[place], found], dim=1)
            self.best[place] = both.topk(min(self.k, both.shape[1]), dim=1).values  # no two are equal
        self.added += len(bank)

    def found(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return similarities (Q, k) and numbers (Q, k), the nearest first; fewer than k if the bank is smaller."""
        keys = torch.cat(self.best)
        return _similarity(keys >> _SHIFT), _LAST - (keys & _LAST)


def votes(similarity: torch.Tensor, labels: torch.Tensor, classes: int, temperature: float) -> torch.Tensor:
    """Return (Q, classes) float64: the sum of exp(similarity / temperature) over the neighbours of each class.

    similarity, labels (Q, k). A class without a neighbour has -inf, so that it comes last.
    """
    nearest = similarity[:, :1].double()  # subtracted, so that no temperature overflows: all votes change by one factor
    weights = ((similarity.double() - nearest) / temperature).exp()
    sums = torch.zeros(len(labels), classes, dtype=torch.float64).scatter_add_(1, labels, weights)
    seen = torch.zeros(len(labels), classes, dtype=torch.bool).scatter_(1, labels, True)
    return sums.masked_fill(~seen, -torch.inf)


def right_votes(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return for each figure of `tops` how many queries it counts as right. scores: of `votes`; labels (Q,).

    A class without a vote is never right. Of equal votes the lower class number is first.
    """
    classes = scores.shape[1]
    own = F.one_hot(labels, classes).bool()
    voted = scores.gather(1, labels[:, None])[:, 0] > -torch.inf
    return torch.stack(right_within(places(scores, own), voted.double(), classes))


def _ordered(similarity: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Return int64 keys (q, N) that are all different: larger where similarity is, then where the number is smaller.

    The upper half is the fp32 number as an integer of the same order, the lower half counts down.
    """
    bits = (similarity.float() + 0.0).view(torch.int32)  # -0 becomes 0
    upper = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return (upper << _SHIFT) + (_LAST - numbers)


def _similarity(upper: torch.Tensor) -> torch.Tensor:
    """Return the fp32 numbers that `_ordered` put in the upper half."""
    upper = upper.int()
    return torch.where(upper < 0, upper ^ 0x7FFFFFFF, upper).view(torch.float32)
