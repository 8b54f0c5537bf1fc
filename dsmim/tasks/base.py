"""The interface between a task and the training loop, which does not know which task it runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from dsmim.data.checks import check_data
from dsmim.data.decode import Buffer
from dsmim.data.normalisation import Normalisation
from dsmim.models import Recompute, compile_blocks, create_model, materialise, set_recompute
from dsmim.recipe import Recipe
from dsmim.shards.index import ShardIndex

Batch = dict[str, Any]
Forward = Callable[..., torch.Tensor]
"""The engine, or a plain module; it is called like the task's model."""


ARCHITECTURE = (
    "img_size", "in_chans", "window_size", "drop_path_rate", "drop_path_rates", "head_init_std",
    "pretrained_window_sizes", "extra_norm_every", "sequential_stages", "options",
)  # fmt: skip
"""Keys of the recipe's `model` section that are passed to create_model."""


class Task(ABC):
    """One kind of learning."""

    model: nn.Module
    """Its parameters take no memory before `fill`."""
    normalise: Normalisation
    """Images (B, C, H, W) uint8 → float32, as the model takes them."""
    layers: dict[str, int]
    """Parameter name → layer id, for layer-wise learning-rate decay."""
    classes: int | None = None
    """Number of classes that the samples' labels count; None: samples need no label."""
    train_sample: Callable[[Buffer, int | None], Batch]
    """Encoded image and label → the tensors of one training sample. It runs in a data worker."""
    eval_sample: Callable[[Buffer, int | None], Batch]
    """The same for one sample of validation."""

    def fill(self, weights: Mapping[str, torch.Tensor] | None = None) -> Iterator[nn.Module]:
        """Create the model's parameters, one module at a time; see materialise in models/build.py."""
        return materialise(self.model, weights)

    def check_micro_batch(self, size: int) -> None:
        """Raise ValueError for a micro batch that the task cannot train on."""
        assert size > 0

    def check_samples(self, recipe: Recipe, shards: list[ShardIndex]) -> None:
        """Raise ValueError for samples of data.val that cannot be measured."""
        check_data(recipe, None, shards)

    @abstractmethod
    def training_loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Return the mean loss of a micro batch on the device.

        batch["step"] is the optimizer step; batch["position"], (B,) in host memory, where each sample is in the order.
        """

    @abstractmethod
    def validation_sums(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Return (K,) float64 sums over a batch's weighted samples; they can be added over batches and ranks."""

    @abstractmethod
    def metrics(self, sums: torch.Tensor) -> dict[str, float]:
        """Return the named metrics, computed from the sums over the whole data set."""


def encoder_from(recipe: Recipe, num_classes: int) -> nn.Module:
    """Return the recipe's network with a head of num_classes (0: none), with its parameters on the meta device."""
    settings = recipe.model
    model = create_model(
        settings.name, "meta", num_classes=num_classes, **settings.model_dump(include=set(ARCHITECTURE))
    )
    set_recompute(model, Recompute(settings.grad_checkpointing, settings.grad_checkpointing_stages))
    if settings.compile:
        compile_blocks(model)
    return model
