"""Megatron Energon: get_savable_loader, and its `energon checkpoint redist` for another layout."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from readers_common import BUFFER, Layout, Tars, Unsupported, pixels

# A sequence is a run of neighbours of one tar; docs/source/basic/save_restore.md takes 100, a tenth of its usual shard.
SEQUENCE = 4


class Energon:
    """Its documentation: docs/source/basic/save_restore.md (a state per rank, "our recommended way") and
    docs/source/advanced/repro_scaling.md, which asks that ranks × workers stay constant. Crop and flip draw under
    `@stateless(restore_seeds=True)`, as its docstring says for augmentations: it seeds them by the worker and by the
    number of the sample on its rank. Each seeding calls torch.manual_seed, which in a process without an accelerator
    records a call and its stack for each kind of accelerator: that is part of energon's time here.
    """

    packages = ("megatron-energon",)

    def open(self, tars: Tars, layout: Layout, rank: int, state: Any = None) -> EnergonStream:
        prepare(tars)
        return EnergonStream(tars, layout, rank, state)

    def convert(self, states: list[Any], layout: Layout) -> list[Any]:
        """Run its tool on the ranks' files. Raises Unsupported when the product of ranks and workers changes."""
        from megatron.energon.tools.checkpoint import command_redist

        workers = sum(len(state.worker_states) for state in states)
        if workers != layout.ranks * layout.workers:
            raise Unsupported(
                'docs/source/advanced/repro_scaling.md: "The product world_size * num_workers must stay the same"'
            )
        with tempfile.TemporaryDirectory() as folder:
            old, new = Path(folder, "old"), Path(folder, "new")
            old.mkdir()
            new.mkdir()  # 7.4.1 does not create it
            for rank, state in enumerate(states):
                torch.save(state, old / f"state_rank{rank}.pt")
            paths = [str(path) for path in sorted(old.iterdir())]
            with contextlib.redirect_stdout(sys.stderr):
                command_redist.main([*paths, str(new), "--new-world-size", str(layout.ranks)], standalone_mode=False)
            return [torch.load(new / f"state_rank{rank}.pt", weights_only=False) for rank in range(layout.ranks)]

    def stored(self, states: list[Any]) -> list[Any]:
        return states


class EnergonStream:
    def __init__(self, tars: Tars, layout: Layout, rank: int, state: Any):
        from megatron.energon import WorkerConfig, get_savable_loader, get_train_dataset

        samples = get_train_dataset(
            tars.folder,
            worker_config=WorkerConfig(rank=rank, world_size=layout.ranks, num_workers=layout.workers),
            batch_size=layout.micro,
            shuffle_buffer_size=BUFFER,
            max_samples_per_sequence=SEQUENCE,
            task_encoder=_task_encoder(),
        )
        self.loader = get_savable_loader(samples)
        if state is not None:
            self.loader.restore_state_rank(state)
        self.batches, self.micro_batches = iter(self.loader), layout.micro_batches

    def step(self) -> list[tuple[list[str], torch.Tensor]]:
        batches = [next(self.batches) for _ in range(self.micro_batches)]
        return [(batch.__key__, batch.image) for batch in batches]

    def state(self) -> Any:
        return self.loader.save_state_rank()

    def close(self) -> None:
        del self.batches, self.loader


def prepare(tars: Tars) -> None:
    """Write energon's index beside the tars (docs/source/advanced/data_prep_api.md), unless a former call did."""
    from megatron.energon.flavors import BaseWebdatasetFactory

    description = tars.folder / ".nv-meta" / "dataset.yaml"
    if description.exists():
        return
    names = [Path(path).name for path in tars.paths]
    with contextlib.redirect_stdout(sys.stderr):
        BaseWebdatasetFactory.prepare_dataset(tars.folder, names, split_parts_ratio=[("train", 1)], workers=1)
    sample_type = {"__module__": "megatron.energon", "__class__": "ImageSample"}
    description.write_text(yaml.safe_dump({"sample_type": sample_type, "field_map": {"image": "jpg"}}))


def _task_encoder() -> Any:
    from megatron.energon import DefaultTaskEncoder, ImageSample, stateless

    class Encoder(DefaultTaskEncoder):
        decoder = None  # the bytes, for the decoder of all readers

        @stateless(restore_seeds=True)
        def encode_sample(self, sample: ImageSample) -> ImageSample:
            return ImageSample.derive_from(sample, image=pixels(sample.image))

    return Encoder()
