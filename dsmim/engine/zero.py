"""DeepSpeed behind one small face: forward, backward, step, at ZeRO stage 0, 1, 2 or 3."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dsmim.engine import ema
from dsmim.engine.construct import autocast_modules, construct, share_buffers
from dsmim.engine.ds_config import load_ds_config, owned_keys, zero_stage
from dsmim.engine.optim import build_optimizer, parameter_groups
from dsmim.engine.runtime import Runtime
from dsmim.engine.schedule import LearningRate
from dsmim.recipe import Recipe


@dataclass
class StepResult:
    """What one optimizer step did."""

    grad_norm: float
    """Global norm of the gradient before clipping; not finite when the step was skipped for it."""
    lr: float
    """The rate of parameters with scale 1."""
    applied: bool


class Engine:
    """A model under DeepSpeed.

    layers: parameter name → layer id for layer decay; accumulation: micro batches per step; parts: gives the modules
    of a model on the meta device, each with its parameters filled (see Task.fill).
    Raises ValueError for a DeepSpeed JSON that contradicts the recipe.
    """

    def __init__(self, model: nn.Module, layers: dict[str, int], recipe: Recipe, runtime: Runtime,
                 accumulation: int, rate: LearningRate, parts: Iterable[nn.Module]):  # fmt: skip
        import deepspeed

        from dsmim.engine.writer import Writer

        self.runtime, self.rate, self.accumulation = runtime, rate, accumulation
        self.precision = resolve_precision(recipe.engine.precision, runtime.device)
        self.config = load_ds_config(recipe.engine.deepspeed, self._owned(recipe, model))
        self.stage = zero_stage(self.config)
        self.groups = parameter_groups(model, layers, recipe.optim)  # before shards make every tensor look 1-D
        construct(model, parts, self.config, self.stage, runtime)
        share_buffers(model, runtime)
        self.optimizer = build_optimizer(model, self.groups, recipe.optim)
        self.ema_decay = recipe.optim.ema_decay
        self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=self.config)
        self.deepspeed.checkpoint_engine = self.writer = Writer(recipe.checkpoint.background)
        self.deepspeed._copy_recovery_script = lambda path: None  # two scripts, written past the checkpoint engine
        if self.stage == 3:
            share_masters(self.deepspeed.optimizer)
            clear_padding(self.deepspeed.optimizer, runtime.rank)
        self._check_compiled(recipe)
        self._check_groups()

    @property
    def module(self) -> nn.Module:
        """The model. At stage 3 its parameters are shards: run it by calling the engine."""
        return self.deepspeed.module

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self.deepspeed(*inputs, **options)

    def train(self) -> None:
        self.deepspeed.train()

    def eval(self) -> None:
        self.deepspeed.eval()

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradient of one micro batch's mean loss, divided by the number of micro batches."""
        self.deepspeed.backward(loss)
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()  # only counts the micro batch

    def step(self, step: int) -> StepResult:
        """The optimizer step number `step`, after the last micro batch's backward. A gradient that is not finite is
        not applied, on any rank."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = self.rate.at(step, group["lr_scale"])
        norm = self._unpartitioned_norm() if self.stage == 0 else None
        if norm is not None and not math.isfinite(norm):
            # DeepSpeed has no overflow check at stage 0: drop the gradient and count the micro batch ourselves.
            self.deepspeed.zero_grad()
            self.deepspeed.micro_steps += 1
            return StepResult(norm, self.rate.at(step), applied=False)
        self.deepspeed.step()
        if norm is None:
            norm = float(self.deepspeed.get_global_grad_norm())
        applied = self.deepspeed.was_step_applied()
        if applied and self.ema_decay is not None:
            ema.update(self.optimizer, self.ema_decay)
        return StepResult(norm if applied else math.inf, self.rate.at(step), applied)

    def save(self, folder: Path) -> None:
        """Hand this rank's files over to the writer, which knows whether they could be written. Collective."""
        self.deepspeed.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)

    def restore(self, checkpoint: Path) -> None:
        """Load a checkpoint of the same world size and stage. Collective. Raises ValueError when it does not fit.

        DeepSpeed takes the groups' settings from the checkpoint too; the recipe's are put back, which matters when a
        forked run changed them.
        """
        settings = [{k: v for k, v in g.items() if k != "params"} for g in self.deepspeed.optimizer.param_groups]
        # Optimizer states always along: partial loads at stage 3 load other weights, or none (DeepSpeed #8499).
        path, _ = self.deepspeed.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
        if path is None:
            raise ValueError(f"{checkpoint}: DeepSpeed found nothing to load")
        if len(self.deepspeed.optimizer.param_groups) != len(settings):
            raise ValueError(f"{checkpoint}: has other parameter groups; optim.layer_decay and no_decay must stay")
        for group, own in zip(self.deepspeed.optimizer.param_groups, settings, strict=True):
            group.update(own)
        self.restored()

    def restored(self) -> None:
        """What holds after any checkpoint's loading."""
        if self.ema_decay is None:
            ema.drop(self.optimizer)
        self._check_groups()

    def close(self) -> None:
        self.writer.close()
        self.deepspeed.destroy()

    def _unpartitioned_norm(self) -> float:
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads))

    def _owned(self, recipe: Recipe, model: nn.Module) -> dict[str, Any]:
        return owned_keys(recipe, self.runtime.world_size, self.accumulation) | {
            "torch_autocast": {
                "enabled": self.precision == "bf16",
                "dtype": "bfloat16",
                "lower_precision_safe_modules": autocast_modules(model),
            },
        }

    def _check_compiled(self, recipe: Recipe) -> None:
        """ZeRO-3's hooks must lie between compiled blocks, not within them, where each makes dynamo start anew."""
        from deepspeed.utils import get_z3_leaf_modules

        if self.stage == 3 and recipe.model.compile and not get_z3_leaf_modules(self.module):
            raise ValueError(
                f"model.compile: at ZeRO stage 3 a block must be gathered whole; name its class in the JSON's "
                f"zero_optimization.leaf_module.classes, as zero3_blocks does ({recipe.engine.deepspeed} does not)"
            )

    def _check_groups(self) -> None:
        """DeepSpeed must have kept our groups: their number, order, scale, decay, and who is in which."""
        seen = [(g["lr_scale"], g["weight_decay"]) for g in self.deepspeed.optimizer.param_groups]
        wanted = [(g.scale, g.weight_decay) for g in self.groups]
        assert seen == wanted, f"DeepSpeed changed the parameter groups: {seen} instead of {wanted}"
        members = group_members(self.deepspeed, self.stage)
        for group, names in zip(self.groups, members, strict=True):
            assert set(names) == set(group.names), f"DeepSpeed moved parameters between groups: {names}"


def resolve_precision(wish: str, device: torch.device) -> str:
    """bf16 or fp32: auto is bf16 on an accelerator, fp32 on a CPU."""
    return ("bf16" if device.type == "cuda" else "fp32") if wish == "auto" else wish


def share_masters(optimizer: Any) -> None:
    """Let ZeRO-3's master weights be its fp32 weights themselves, 4 bytes a parameter less.

    That is what DeepSpeed means to do where weights are fp32 already, as under torch_autocast (runtime/zero/stage3.py,
    _create_fp32_partitions), but it compares a torch.device with a string and copies them.
    """
    masters, weights = optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat
    for master, weight in zip(masters, weights, strict=True):
        if weight is not None and (weight.dtype, weight.device) == (master.dtype, master.device):
            master.data = weight.data


def clear_padding(optimizer: Any, rank: int) -> None:
    """Zero what ZeRO-3's shards hold beyond the last element of a parameter that ranks cannot share evenly. DeepSpeed
    leaves it as it finds it in memory, and two checkpoints of the same weights would differ."""
    for master, group in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
        begin = 0
        for parameter in group:
            piece, (_, own) = parameter.partition_numel(), own_part(parameter, rank)
            if master is not None:
                master.data[begin + own : begin + piece] = 0
            begin += piece


def own_part(parameter: nn.Parameter, rank: int) -> tuple[int, int]:
    """First element and number of elements, without padding, that a rank keeps of a parameter at stage 3."""
    size = parameter.partition_numel()
    start = min(rank * size, parameter.ds_numel)
    return start, min(size, parameter.ds_numel - start)


def group_members(engine: Any, stage: int) -> list[list[str]]:
    """The names of the parameters that each of DeepSpeed's groups really updates.

    DeepSpeed keeps them in a different place at every stage (runtime/zero/stage3.py: fp16_groups are sub-groups;
    stage_1_and_2.py: bit16_groups).
    """
    optimizer, names = engine.optimizer, engine.param_names
    if stage == 0:
        return [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    if stage < 3:
        return [[names[p] for p in group] for group in optimizer.bit16_groups]
    members: list[list[str]] = [[] for _ in optimizer.param_groups]
    for number, group in enumerate(optimizer.fp16_groups):
        members[optimizer.sub_group_to_group_id[number]] += [names[p] for p in group]
    return members
