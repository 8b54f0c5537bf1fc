"""Classification by the nearest neighbours of a frozen encoder's features, as DINO reports it: exact at any world size.

The queries are the features of data.val, the bank those of data.train. The bank is never held as a whole: a block of it
is compared with the queries, of which each rank has a share, and dropped. Blocks and shares are cut at the same samples
at any world size, so that every product of matrices is the same there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsmim.data.dataset import EvalDataset
from dsmim.data.from_recipe import open_reader, training_shards, validation_shards
from dsmim.engine.runtime import Runtime, joined
from dsmim.evaluate import Autocast, Trained, evaluation_batches, limits_of, open_trained
from dsmim.health.interrupt import Interrupt
from dsmim.models.features import feature_network
from dsmim.recipe import Data, Recipe
from dsmim.shards.index import ShardIndex
from dsmim.shards.sample_format import NO_LABEL
from dsmim.tasks import Task, build_task
from dsmim.tasks.nearest import QUERIES, Neighbours, right_votes, votes
from dsmim.tasks.ranking import accuracies, tops

BLOCK = 8192
"""Samples of a block of the bank, about."""


@dataclass(frozen=True)
class Labelled:
    """Samples, and their labels from the indexes, (N,) int64."""

    images: EvalDataset
    labels: torch.Tensor


def knn(
    path: Path, overrides: list[str], ks: list[int], temperature: float = 0.07, which: str = "fp32"
) -> dict[str, Any]:
    """Classify data.val by the nearest samples of data.train. Every rank calls it and gets the figures.

    path: a checkpoint, or a run (its newest valid one), of any task. ks: numbers of neighbours. A neighbour votes for
    its class with exp(cosine similarity / temperature). which: "fp32" for the weights, "ema" for their moving average.
    Both sets are prepared as in evaluation; undecodable images are left out. Raises ValueError for what a user can fix.
    """
    with joined(*limits_of(path, overrides)) as runtime:
        trained = open_trained(path, overrides, which, runtime, build_task, partial(_open, most=max(ks)))
        network = Autocast(feature_network(trained.task.model), trained.recipe, runtime)
        bank, queries = trained.data
        numbers, features = (
            torch.cat(parts) for parts in zip(*_in_order(network, queries, trained, runtime), strict=True)
        )
        own = _share(len(numbers), runtime)
        nearest = Neighbours(features[own].to(runtime.device), max(ks))
        added = _add_in_blocks(nearest, _in_order(network, bank, trained, runtime), trained.recipe.batch.eval_batch)
        found = _Found(*nearest.found(), queries.labels[numbers[own]], bank.labels[added], temperature)
        classes = 1 + int(max(bank.labels.max(), queries.labels.max()))
        rows = [{"k": k} | found.shares(k, classes, len(numbers), runtime) for k in sorted(set(ks))]
        sets = {"train": (bank, len(added)), "val": (queries, len(numbers))}
        return {"checkpoint": trained.source, "temperature": temperature, "knn": rows, **_counts(sets, trained.recipe)}


def _open(recipe: Recipe, task: Task, runtime: Runtime, most: int) -> tuple[Labelled, Labelled]:
    """Open data.train and data.val with their labels. Collective: rank 0 opens the index files."""
    with runtime.all_or_none():
        shards, labels = runtime.on_rank_zero(lambda: _labelled(recipe.data, most))
        readers = [open_reader(recipe.data, of_set, window=1) for of_set in shards]
    sets = [EvalDataset(reader, task.eval_sample, None) for reader in readers]
    bank, queries = (Labelled(images, torch.from_numpy(own)) for images, own in zip(sets, labels, strict=True))
    return bank, queries


def _labelled(data: Data, most: int) -> tuple[list[list[ShardIndex]], list[np.ndarray]]:
    """Return shards and labels of data.train and data.val. Raises ValueError for samples without labels, for images in
    both sets, and for fewer than `most` samples of data.train."""
    shards = [training_shards(data), validation_shards(data)]
    labels = [np.concatenate([shard.labels() for shard in of_set]).astype(np.int64) for of_set in shards]
    for name, own in zip(("data.train", "data.val"), labels, strict=True):
        if missing := int((own == NO_LABEL).sum()):
            raise ValueError(
                f"{name}: {missing} of {len(own)} samples have no class number, by which neighbours vote; say where "
                "labels are by dsmim shards index --labels, or give labelled shards"
            )
    ours = {shard.sha256: shard.tar for shard in shards[0]}
    if shared := [shard.tar for shard in shards[1] if shard.sha256 in ours]:
        raise ValueError(
            f"data.train and data.val share {len(shared)} shards, such as {shared[0]}: an image would be its own "
            "nearest neighbour; give other shards for one of them"
        )
    if most > len(labels[0]):
        raise ValueError(f"--k {most}: data.train has {len(labels[0])} samples; give a smaller number")
    return shards, labels


def _in_order(
    network: Autocast, samples: Labelled, trained: Trained, runtime: Runtime
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield numbers (B,) and features (B, D), fp32 in host memory, batch after batch in the order of the set, on every
    rank. Undecodable images are left out. Collective."""
    batches = evaluation_batches(network, samples.images, trained.recipe, runtime, Interrupt(), "left out")
    for batch in batches:
        with torch.no_grad():
            features = network(trained.task.normalise(batch["image"])).float()
        seen = batch["weight"] > 0  # neither padding nor undecodable
        with runtime.all_or_none():
            if not features[seen].isfinite().all():
                raise ValueError(
                    f"{trained.source}: some features are not finite; its weights are broken, give another checkpoint"
                )
        yield from runtime.gather((batch["number"][seen].cpu(), features[seen].cpu()))


def _add_in_blocks(
    nearest: Neighbours, batches: Iterator[tuple[torch.Tensor, torch.Tensor]], size: int
) -> torch.Tensor:
    """Add the features of all batches in blocks of equally many batches of `size`. Return the numbers of the samples in
    the order in which they were added."""
    added: list[torch.Tensor] = []
    while block := list(islice(batches, max(1, BLOCK // size))):
        added += [numbers for numbers, _ in block]
        nearest.add(torch.cat([features for _, features in block]))
    return torch.cat(added)


def _share(queries: int, runtime: Runtime) -> torch.Tensor:
    """Return the queries of this rank: chunks of QUERIES, dealt to the ranks in turn."""
    chunks = torch.arange(queries).split(QUERIES)
    return torch.cat([torch.arange(0), *chunks[runtime.rank :: runtime.world_size]])


@dataclass(frozen=True)
class _Found:
    """The neighbours of this rank's queries."""

    similarity: torch.Tensor
    """(Q, k), the nearest first."""
    neighbours: torch.Tensor
    """(Q, k): places in the bank."""
    labels: torch.Tensor
    """Of the queries, (Q,)."""
    bank_labels: torch.Tensor
    temperature: float

    def shares(self, k: int, classes: int, queries: int, runtime: Runtime) -> dict[str, float]:
        """Return the accuracies of all ranks' queries by their k nearest neighbours. Collective."""
        right = torch.zeros(len(tops(classes)), dtype=torch.float64)
        for place in torch.arange(len(self.labels)).split(QUERIES):
            labels = self.bank_labels[self.neighbours[place, :k].cpu()]
            scores = votes(self.similarity[place, :k].cpu(), labels, classes, self.temperature)
            right += right_votes(scores, self.labels[place])
        total = runtime.sum(right.to(runtime.device)).tolist()
        return accuracies(total, queries, classes)


def _counts(sets: dict[str, tuple[Labelled, int]], recipe: Recipe) -> dict[str, Any]:
    """Return what each set is, how many of its samples were used, and how many could not be decoded, if any."""
    found: dict[str, Any] = {}
    for name, (samples, used) in sets.items():
        prefix = "" if name == "val" else f"{name}_"
        found |= {"data" if name == "val" else name: getattr(recipe.data, name), f"{prefix}samples": used}
        if missing := len(samples.images) - used:
            found[f"{prefix}undecodable"] = missing
    return found
