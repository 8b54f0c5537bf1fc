"""torch DataLoaders over the data sets: which positions form a micro batch, and which rank evaluates which batch."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from types import TracebackType

import torch
from torch.utils.data import DataLoader, Sampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from dsmim.data.dataset import EvalDataset, TarDataset, collate
from dsmim.data.order import rank_positions
from dsmim.shards.forking import ForkContext, end_with_parent


class _MicroBatches(Sampler):
    """The micro batches of one rank in `steps` global batches, the first of which begins at position `consumed`."""

    def __init__(self, consumed: int, steps: int, global_batch: int, accumulation: int, world_size: int, rank: int):
        self.begins = range(consumed, consumed + steps * global_batch, global_batch)
        self.accumulation = accumulation
        self.share = (global_batch, world_size, rank)

    def __iter__(self) -> Iterator[list[int]]:
        for begin in self.begins:
            positions = rank_positions(begin, *self.share)
            micro = len(positions) // self.accumulation
            yield from (list(positions[i : i + micro]) for i in range(0, len(positions), micro))

    def __len__(self) -> int:
        return len(self.begins) * self.accumulation


class _EvalBatches(Sampler):
    """Batch k goes to rank k mod world size, so that a batch has the same samples at any world size. Every rank gets
    equally many batches, as ZeRO-3's collectives need: a rank without a batch repeats the first with weight 0."""

    def __init__(self, samples: int, size: int, world_size: int, rank: int):
        self.samples, self.size = samples, size
        self.batches = -(-samples // size)
        rounds = -(-self.batches // world_size)
        self.mine = range(rank, rounds * world_size, world_size)

    def __iter__(self) -> Iterator[list[tuple[int, float]]]:
        for number in self.mine:
            begin, weight = (number * self.size, 1.0) if number < self.batches else (0, 0.0)
            yield [(sample, weight) for sample in range(begin, min(begin + self.size, self.samples))]

    def __len__(self) -> int:
        return len(self.mine)


def train_loader(
    dataset: TarDataset, consumed: int, steps: int, global_batch: int, accumulation: int, world_size: int, rank: int,
    workers: int, pin: bool,
) -> DataLoader:  # fmt: skip
    """Return a loader of one rank's micro batches for `steps` steps after `consumed` samples.

    With any number of workers the batches come in the same order. Each batch is a dictionary as `collate` makes it.
    """
    batches = _MicroBatches(consumed, steps, global_batch, accumulation, world_size, rank)
    return _loader(dataset, batches, workers, pin)


def eval_loader(dataset: EvalDataset, size: int, world_size: int, rank: int, workers: int, pin: bool) -> DataLoader:
    """Return a loader of one rank's batches of an evaluation; each sample has weight 1 on exactly one rank."""
    return _loader(dataset, _EvalBatches(len(dataset), size, world_size, rank), workers, pin)


def end_workers(batches: Iterator) -> None:
    """End the workers of a loader's iterator. Otherwise they live as long as it, and the traceback of an error holds
    it. torch has no public call for this."""
    if isinstance(batches, _MultiProcessingDataLoaderIter):
        batches._shutdown_workers()


def _loader(dataset: torch.utils.data.Dataset, batches: Sampler, workers: int, pin: bool) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
        multiprocessing_context=ForkContext() if workers else None,  # forked workers share index mappings and modules
        worker_init_fn=_prepare_worker,
        generator=torch.Generator(),  # a separate one: the loader must not draw from the model's random stream
    )


def _prepare_worker(worker: int) -> None:
    """Ignore requests to stop, which Slurm, or a terminal on Ctrl-C, sends to every process: the rank decides when to
    end. And end with the rank, however it ends."""
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGALRM, signal.SIGINT):
        signal.signal(number, _ignore)
    sys.excepthook = _report_error
    end_with_parent()


def _report_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an error of the thread that passes batches to the rank, unless the rank has broken off: it does when it is
    asked to stop while it receives one."""
    if not isinstance(error, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _ignore(*_: object) -> None:
    """Do nothing. SIG_IGN would be inherited by the commands of pipe: shards."""
