"""Trains the parity models with the engine in every configuration. torchrun starts it on two ranks.

Usage: parity_worker.py OUT. Rank 0 writes OUT/CONFIGURATION.pt: losses, gradient norms, weights.
"""

import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from dsmim.engine.runtime import start, stop
from dsmim.engine.schedule import resolve_schedule
from dsmim.engine.zero import Engine
from dsmim.models import PositionDraws
from dsmim.recipe import Recipe
from dsmim.recipe.reading import parse_recipe
from dsmim.tasks import build_task

STEPS, BATCH, KEY = 10, 8, 77
# Together they have every kind of parameter that is not used in the forward of a module of its own: mask token, logit
# scale, query and value biases; class token, position embedding, LayerScale.
MODELS = {
    "swin": {"name": "swinv2_nano", "img_size": 32, "window_size": 4, "extra_norm_every": 3},
    "vit": {"name": "deit3_nano_patch16", "img_size": 64},
}
CLIP = {"swin": 0.3, "vit": 0.03}


class Configuration(NamedTuple):
    model: str
    stage: int | str
    """A DeepSpeed file's name after `zero`; "3_all": stage 3, where every parameter is cut up and gathered alone."""
    accumulation: int = 1
    precision: str = "fp32"
    checkpointing: int = 0
    compiled: bool = False
    drop_path: float = 0.0
    """Of every block. With micro batches of one or two samples, often one rank keeps none, and the other some."""

    def __str__(self) -> str:
        return "-".join(map(str, self))


CONFIGURATIONS = [
    *(Configuration("swin", stage, accumulation) for stage in (0, 1, 2, 3) for accumulation in (1, 2)),
    *(Configuration("swin", stage) for stage in ("3_blocks", "3_all")),
    *(Configuration("vit", stage) for stage in (0, 2, 3, "3_blocks", "3_all")),
    Configuration("swin", "3_all", checkpointing=1),
    Configuration("swin", "3_blocks", checkpointing=2),
    Configuration("vit", "3_all", checkpointing=1),
    *(Configuration(model, 3, precision="bf16") for model in MODELS),
    *(Configuration("vit", stage, compiled=True) for stage in (1, 2, "3_blocks")),
    Configuration("vit", "3_blocks", checkpointing=1, compiled=True),
    Configuration("swin", "3_blocks", compiled=True),
    Configuration("vit", 1, accumulation=4, drop_path=0.6),
    Configuration("vit", "3_all", accumulation=2, checkpointing=1, drop_path=0.6),
    Configuration("vit", "3_blocks", compiled=True, drop_path=0.6),
    Configuration("swin", 3, accumulation=2, drop_path=0.6),
    Configuration("swin", "3_all", accumulation=4, precision="bf16", drop_path=0.6),
]


def parity_recipe(wanted: Configuration, out: Path | None = None) -> Recipe:
    file = f"zero{wanted.stage}"
    if wanted.stage == "3_all":
        file = str(out / f"zero3_all_{os.getpid()}.json")
        Path(file).write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    model = MODELS[wanted.model] | {"grad_checkpointing": wanted.checkpointing, "compile": wanted.compiled}
    if wanted.drop_path:
        model |= {"drop_path_rate": wanted.drop_path, "drop_path_rates": "uniform"}
    tree = {
        "name": "parity",
        "task": {"name": "simmim", "mask_patch": 8 if wanted.model == "swin" else 16},
        "model": model,
        "batch": {"global_batch": BATCH},
        "optim": {"lr": 1e-3, "layer_decay": 0.8, "clip_grad": CLIP[wanted.model]},
        "schedule": {"duration": {"steps": STEPS}, "warmup": {"steps": 3}, "min_lr": 1e-5},
        "engine": {"deepspeed": file, "precision": wanted.precision},
    }
    return parse_recipe(tree, "parity")


def parity_batch(step: int, model: str = "swin") -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B, 3, img_size, img_size) and masks (B, rows, columns) of tokens; every mask hides as many tokens."""
    generator = torch.Generator().manual_seed(step)
    side, tokens = MODELS[model]["img_size"], {"swin": 8, "vit": 4}[model]
    order = [torch.randperm(tokens**2, generator=generator) for _ in range(BATCH)]
    masks = (torch.stack(order) < 0.62 * tokens**2).view(BATCH, tokens, tokens)
    return torch.randn(BATCH, 3, side, side, generator=generator), masks


def parity_task(recipe: Recipe):
    torch.manual_seed(0)
    return build_task(recipe)


def whole_weights(engine: Engine) -> dict[str, torch.Tensor]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=engine.stage == 3):
        return {name: p.detach().float().clone() for name, p in engine.module.named_parameters()}


def build_engine(runtime, wanted: Configuration, out: Path | None = None) -> Engine:
    recipe = parity_recipe(wanted, out)
    task = parity_task(recipe)
    rate = resolve_schedule(recipe.schedule, recipe.optim, BATCH, 1000)
    return Engine(task.model, task.layers, recipe, runtime, wanted.accumulation, rate, task.fill())


def micro_batches(runtime, step, accumulation, model="swin"):
    """Images, masks and positions of each micro batch."""
    share = BATCH // runtime.world_size
    whole = (*parity_batch(step, model), torch.arange(step * BATCH, (step + 1) * BATCH))
    parts = (part[runtime.rank * share : (runtime.rank + 1) * share].chunk(accumulation) for part in whole)
    return zip(*parts, strict=True)


def train(runtime, wanted: Configuration, out: Path) -> None:
    engine = build_engine(runtime, wanted, out)
    draws = PositionDraws(engine.module, KEY, BATCH)
    losses, norms = [], []
    for step in range(STEPS):
        total = torch.zeros((), dtype=torch.float64)
        for images, mask, positions in micro_batches(runtime, step, wanted.accumulation, wanted.model):
            with draws.at(positions):
                loss = engine(images, mask)
                engine.backward(loss)
            total += loss.detach().double() / wanted.accumulation / runtime.world_size
        norms.append(engine.step(step).grad_norm)
        losses.append(runtime.sum(total).item())
    weights = whole_weights(engine)
    if runtime.is_rank_zero:
        torch.save({"losses": losses, "norms": norms, "weights": weights}, out / f"{wanted}.pt")
        print(wanted, "trained", flush=True)  # the launch's deadline follows what it prints
    engine.close()


def every_rank_has_rank_0_s_weights(runtime, stage: int | str, out: Path) -> None:
    """A model filled module by module and cut into shards has the plain model's weights. Weights that rank 0 is given
    reach every rank."""
    recipe = parity_recipe(Configuration("swin", stage), out)
    plain = parity_task(recipe)
    list(plain.fill())
    given = {"encoder.norm.weight": torch.randn(256), "mask_token": torch.randn(1, 1, 32)}
    task = parity_task(recipe)
    rate = resolve_schedule(recipe.schedule, recipe.optim, BATCH, 1000)
    parts = task.fill(given if runtime.is_rank_zero else None)
    engine = Engine(task.model, task.layers, recipe, runtime, 1, rate, parts)
    if stage == "3_all":
        assert all(p.numel() == 0 for p in engine.module.parameters()), "not cut up"
    weights = whole_weights(engine)
    for name, value in plain.model.named_parameters():
        if name not in given:
            assert torch.equal(weights[name], value), (stage, name)
    for name in given:
        everybody = runtime.gather(weights[name].tolist())
        assert everybody[0] == everybody[1] and (not runtime.is_rank_zero or torch.equal(weights[name], given[name])), (
            name
        )
    engine.close()


def each_group_alone(runtime, stage: int) -> None:
    """With a learning rate for one group only, only that group's parameters change: each group gets its own rate."""
    for chosen in (0, 5):
        engine = build_engine(runtime, Configuration("swin", stage))
        scale = engine.groups[chosen].scale
        names = {name for group in engine.groups if group.scale == scale for name in group.names}
        engine.rate = OneScale(scale)
        before = whole_weights(engine)
        for images, mask, _ in micro_batches(runtime, 0, 1):
            engine.backward(engine(images, mask))
        engine.step(0)
        after = whole_weights(engine)
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved and moved <= names, (stage, chosen, moved - names)
        unmoved = {name for name in names - moved if "norm" not in name and "attn" not in name and "mlp" not in name}
        assert not unmoved, (stage, chosen, unmoved)  # res-post-norm starts at 0: before it there is no gradient
        engine.close()


class OneScale:
    def __init__(self, scale: float):
        self.scale = scale

    def at(self, step: int, scale: float = 1.0) -> float:
        return 1e-2 if scale == self.scale else 0.0


def a_nan_is_not_applied(runtime, stage: int) -> None:
    """A NaN on one rank must leave the weights of all ranks unchanged, and the next step must be applied."""
    engine = build_engine(runtime, Configuration("swin", stage, accumulation=2))
    before = whole_weights(engine)
    for poison in (True, False):
        for number, (images, mask, _) in enumerate(micro_batches(runtime, 1, 2)):
            bad = poison and runtime.rank == 1 and number == 0
            engine.backward(engine(images * float("nan") if bad else images, mask))
        result = engine.step(5)
        after = whole_weights(engine)
        same = all(torch.equal(before[name], after[name]) for name in before)
        assert result.applied is (not poison) and same is poison, (stage, poison, result, same)
    engine.close()


def main(out: Path) -> None:
    runtime = start()
    for configuration in CONFIGURATIONS:
        train(runtime, configuration, out)
    for stage in (0, 2, "3_all"):
        every_rank_has_rank_0_s_weights(runtime, stage, out)
        print("weights of rank 0, stage", stage, flush=True)
    for stage in range(4):
        each_group_alone(runtime, stage)
        a_nan_is_not_applied(runtime, stage)
        print("groups and NaN, stage", stage, flush=True)
    stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
