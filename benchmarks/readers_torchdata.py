"""webdataset and Hugging Face datasets, each under torchdata's StatefulDataLoader.

StatefulDataLoader's own documentation (torchdata/stateful_dataloader/README.md) gives the ways used here: a data set
with `state_dict` and `load_state_dict` is saved in every worker; one without is read again from its beginning ("naively
fast-forward"). It also gives the limits: "Calling load_state_dict requires StatefulDataLoader to have same num_workers
as those of the provided state_dict", and it handles state "across multiprocess workers (but not across ranks)".
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import torch
from readers_common import BUFFER, SEED, TARS, Layout, Tars, Unsupported, pixels


class _PerRank:
    """What both readers share: every rank saves its own state, and nothing converts it for another layout."""

    def convert(self, states: list[Any], layout: Layout) -> list[Any]:
        """Return each new rank the state of an old one, which is all there is: neither library names another way."""
        return [states[rank % len(states)] for rank in range(layout.ranks)]

    def stored(self, states: list[Any]) -> list[Any]:
        return states


class LoaderStream:
    """A StatefulDataLoader over samples {key, image}."""

    def __init__(self, dataset: torch.utils.data.IterableDataset, layout: Layout, state: dict | None):
        from torchdata.stateful_dataloader import StatefulDataLoader

        generator = torch.Generator().manual_seed(SEED)  # of the workers' seeds
        self.loader = StatefulDataLoader(dataset, layout.micro, num_workers=layout.workers, generator=generator)
        self.micro_batches = layout.micro_batches
        try:
            if state is not None:
                self.loader.load_state_dict(state)
            if not layout.workers:
                random.seed(SEED)
            self.batches = iter(self.loader)
        except AssertionError:  # it compares the numbers of workers, without a message
            raise Unsupported("StatefulDataLoader requires the same number of workers, as documented") from None

    def step(self) -> list[tuple[list[str], torch.Tensor]]:
        batches = [next(self.batches) for _ in range(self.micro_batches)]
        return [(batch["key"], batch["image"]) for batch in batches]

    def state(self) -> dict:
        return self.loader.state_dict()

    def close(self) -> None:
        del self.batches, self.loader


class Webdataset(_PerRank):
    """webdataset, which saves no state: "you'll have to keep track of the shards and samples you have already read …
    WebDataset can't really do this for you" (webdataset/webdataset#271; the same in #234 and #177). So the loader reads
    again, and pays for it, all that was read before; order and pixels repeat because every random stream is seeded."""

    packages = ("webdataset", "torchdata")

    def open(self, tars: Tars, layout: Layout, rank: int, state: dict | None = None) -> LoaderStream:
        import webdataset

        os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(layout.ranks)  # where split_by_node looks
        samples = webdataset.WebDataset(
            tars.paths, shardshuffle=TARS, detshuffle=True, seed=SEED, nodesplitter=webdataset.split_by_node
        )
        samples = samples.compose(webdataset.detshuffle(BUFFER, initial=BUFFER, seed=SEED)).map(_webdataset_sample)
        return LoaderStream(samples.repeat(), layout, state)


def _webdataset_sample(sample: dict[str, Any]) -> dict[str, Any]:
    return {"key": sample["__key__"], "image": pixels(sample["jpg"])}


class Datasets(_PerRank):
    """Hugging Face datasets: an IterableDataset of the format webdataset, split by ranks and workers.

    shuffle(buffer_size): "examples from shuffle buffers are lost when resuming and the buffers are refilled with new
    data" (IterableDataset.load_state_dict; docs/source/stream.mdx). So it is measured with a buffer, as one trains, and
    without one: shards shuffled, and read one after another (max_buffer_input_shards=1). With datasets 5.2.0 and more
    than one worker, loading a state of several interleaved shards, the default, is an IndexError.
    """

    packages = ("datasets", "torchdata")

    def __init__(self, buffer: int, interleaved: int = 10):
        self.shuffling = {"seed": SEED, "buffer_size": buffer, "max_buffer_input_shards": interleaved}

    def open(self, tars: Tars, layout: Layout, rank: int, state: dict | None = None) -> LoaderStream:
        return LoaderStream(_SavedRandom(self._samples(tars, layout, rank)), layout, state)

    def _samples(self, tars: Tars, layout: Layout, rank: int) -> Any:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the import; the files are here
        from datasets import Image, load_dataset
        from datasets.distributed import split_dataset_by_node

        samples = load_dataset("webdataset", data_files={"train": tars.paths}, split="train", streaming=True)
        samples = samples.cast_column("jpg", Image(decode=False)).shuffle(**self.shuffling)
        return split_dataset_by_node(samples, rank, layout.ranks).repeat(None)


class _SavedRandom(torch.utils.data.IterableDataset):
    """Decodes, and saves Python's random state beside the data set's: "if your dataset has worker-specific state (eg
    RNG transform state) you can add state_dict/load_state_dict methods" (StatefulDataLoader's documentation)."""

    def __init__(self, samples: Any):
        self.samples = samples
        self._random: tuple | None = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self._random is not None:
            random.setstate(self._random)
            self._random = None
        for sample in self.samples:
            yield {"key": sample["__key__"], "image": pixels(sample["jpg"]["bytes"])}

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.samples.state_dict(), "random": random.getstate()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.samples.load_state_dict(state["samples"])
        self._random = state["random"]
