"""What lamb_exactness.py and optimizers.py share: a small ViT, its batches, a plain training loop and the same under
DeepSpeed, the figure that compares them, and ranks that are forks of one process."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import nn

from dsmim.cluster.placement import free_port
from dsmim.engine.runtime import Runtime, start, stop
from dsmim.engine.zero_internals import clear_padding

BATCH, CLASSES, DECAY = 12, 5, 0.05
# What deepspeed.initialize imports: without this, 2 s in each fork.
PRELOADED = (
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch._inductor.compile_fx",
)
Weights = dict[str, torch.Tensor]
Build = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
"""Makes an optimizer of parameter groups."""


class SmallViT(nn.Module):
    """A DeiT III in small: class token, position embedding, LayerScale. Sizes that 2 and 3 ranks do not divide. It
    returns the loss.

    Queries, keys and values have no bias: the gradient of the keys' is 0 but for rounding, and Lion takes its sign.
    """

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.vit = VisionTransformer(
            img_size=16, patch_size=4, num_classes=CLASSES, embed_dim=21, depth=2, num_heads=3, init_values=1e-2,
            qkv_bias=False,
        )  # fmt: skip

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy of images (B, 3, 16, 16) with labels (B,)."""
        return nn.functional.cross_entropy(self.vit(images), labels)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images (BATCH, 3, 16, 16) and labels of a step's global batch."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 3, 16, 16, generator=generator), torch.randint(CLASSES, (BATCH,), generator=generator)


def micro_batches(step: int, runtime: Runtime, accumulation: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield a rank's micro batches of a step."""
    images, labels = (part.chunk(runtime.world_size)[runtime.rank] for part in batch(step))
    yield from zip(images.chunk(accumulation), labels.chunk(accumulation), strict=True)


def groups_of(model: nn.Module, no_decay: tuple[str, ...] = ("cls_token", "pos_embed")) -> list[dict[str, Any]]:
    """Return two groups, without weight decay and with it, as dsmim makes them."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for name, p in named if p.ndim <= 1 or name.endswith(no_decay)]
    others = [p for name, p in named if not (p.ndim <= 1 or name.endswith(no_decay))]
    return [{"params": plain, "weight_decay": 0.0}, {"params": others, "weight_decay": DECAY}]


def weights_of(model: nn.Module, gather: bool = False) -> Weights:
    """Return copies of the parameters by name. gather: at ZeRO stage 3, of the whole parameters; collective."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=gather):
        return {name: p.detach().float().clone() for name, p in model.named_parameters()}


def plain_run(build: Build, steps: int, clip: float, rate: Callable[[int], float]) -> Weights:
    """Return the weights after a plain loop on the whole batches, with torch's clipping (0: none)."""
    model = SmallViT()
    optimizer = build(groups_of(model))
    for step in range(steps):
        plain_step(model, optimizer, step, clip, rate)
    return weights_of(model)


def plain_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, step: int, clip: float, rate: Callable[[int], float]
) -> None:
    """Take one step of the plain loop."""
    for group in optimizer.param_groups:
        group["lr"] = rate(step)
    model(*batch(step)).backward()
    if clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad()


def deepspeed_run(
    build: Build, steps: int, clip: float, rate: Callable[[int], float], zero: dict[str, Any], runtime: Runtime,
    accumulation: int = 1,
) -> Weights:  # fmt: skip
    """Return the weights after the same steps under DeepSpeed, which gets the optimizer as it is. Collective."""
    import deepspeed

    model = SmallViT()
    config = {
        "train_batch_size": BATCH,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "zero_optimization": zero,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=build(groups_of(model)), config=config)
    if zero["stage"] == 3:
        clear_padding(engine.optimizer, runtime.rank)  # as dsmim does; else norms may be of what the memory held before
    for step in range(steps):
        for group in engine.optimizer.param_groups:
            group["lr"] = rate(step)
        for images, labels in micro_batches(step, runtime, accumulation):
            engine.backward(engine(images, labels))
            engine.step()
    found = weights_of(engine.module, gather=zero["stage"] == 3)
    engine.destroy()
    return found


def relative_error(found: Weights, wanted: Weights) -> float:
    """Return |found - wanted| / |wanted - first weights| over all parameters."""
    first = SmallViT().state_dict()
    difference = sum((found[name] - wanted[name]).double().square().sum() for name in wanted)
    update = sum((wanted[name] - first[name]).double().square().sum() for name in wanted)
    return float((difference / update).sqrt())


def preload() -> None:
    """Import in this process what its forks would import one by one."""
    for module in PRELOADED:
        importlib.import_module(module)


def launch(world: int, action: Callable[[Runtime], None]) -> None:
    """Run `action` on so many ranks, each a fork of this process. Raises RuntimeError when one fails."""
    port = str(free_port())
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_be_rank, args=(world, rank, port, action)) for rank in range(world)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    if failed := [rank.exitcode for rank in ranks if rank.exitcode]:
        raise RuntimeError(f"ranks ended with {failed}; what they printed says why")


def _be_rank(world: int, rank: int, port: str, action: Callable[[Runtime], None]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    try:
        action(start())
        stop()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # another rank may wait for this one, and an interpreter's end would wait for the group
