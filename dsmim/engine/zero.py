"""DeepSpeed behind a small interface: forward, backward, step, save and load, at ZeRO stage 0, 1, 2 or 3."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dsmim.engine import ema
from dsmim.engine.construct import autocast_modules, construct, share_buffers
from dsmim.engine.ds_config import load_ds_config, owned_keys, zero_stage
from dsmim.engine.lamb import Lamb, bind_lamb
from dsmim.engine.optim import build_optimizer, check_optimizer, parameter_groups
from dsmim.engine.runtime import Runtime
from dsmim.engine.schedule import LearningRate
from dsmim.engine.zero_internals import clear_padding, group_members, on_nvme, release_modules, share_masters
from dsmim.models import frozen_modules
from dsmim.recipe import Recipe


@dataclass
class StepResult:
    """The outcome of one optimizer step."""

    grad_norm: float
    """Global norm of the gradient before clipping; not finite if the step was skipped for that reason."""
    lr: float
    """The learning rate of parameters with scale 1."""
    applied: bool


class Engine:
    """A model under DeepSpeed.

    layers: parameter name → layer id for layer decay; accumulation: micro batches per step; parts: yields the modules
    of a model on the meta device, each with its parameters filled (see Task.fill).
    Raises ValueError for a DeepSpeed JSON that contradicts the recipe.
    """

    def __init__(self, model: nn.Module, layers: dict[str, int], recipe: Recipe, runtime: Runtime,
                 accumulation: int, rate: LearningRate, parts: Iterable[nn.Module]):  # fmt: skip
        self.runtime, self.rate, self.accumulation = runtime, rate, accumulation
        self.ema_decay, self.ema_warmup = recipe.optim.ema_decay, recipe.optim.ema_warmup
        self.precision = resolve_precision(recipe.engine.precision, runtime.device)
        # Each of the next steps needs the one before it.
        self.config = load_ds_config(recipe.engine.deepspeed, self._owned_keys(recipe, model))
        self.stage = zero_stage(self.config)
        check_optimizer(recipe.optim, self.config)
        # Groups hold names, and are made while the parameters have their shapes: ZeRO-3's shards all look 1-D.
        self.groups = parameter_groups(model, layers, recipe.optim)
        # The weights: filled, moved to the device or partitioned as the stage requires, the same on every rank.
        self.frozen = frozen_modules(model)
        construct(model, parts, self.config, self.stage, runtime)
        share_buffers(model, runtime)
        # The optimizer holds the parameters themselves; filling has replaced those of the meta device.
        self.optimizer = build_optimizer(model, self.groups, recipe.optim, rate.peak)
        self.deepspeed = self._initialize_deepspeed(model)
        self._install_writer(background=recipe.checkpoint.background)
        if self.stage == 3:
            share_masters(self.deepspeed.optimizer)
            clear_padding(self.deepspeed.optimizer, runtime.rank)
        if recipe.validation.ema and on_nvme(self.deepspeed.optimizer):
            raise ValueError(
                "validation.ema: the average cannot be measured with weights or optimizer offloaded to NVMe; set "
                "validation.ema=false, or use a DeepSpeed JSON without NVMe"
            )
        if isinstance(self.optimizer, Lamb):
            bind_lamb(self.optimizer, self.deepspeed, self.stage, runtime.rank, runtime.device)
        self._check_compiled(recipe)
        self._check_groups()

    @property
    def module(self) -> nn.Module:
        """The model. At stage 3 its parameters are shards: run it by calling the engine."""
        return self.deepspeed.module

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self.deepspeed(*inputs, **options)

    def train(self) -> None:
        """Set the model to training mode; what is frozen stays in evaluation mode."""
        self.deepspeed.train()
        for module in self.frozen:
            module.training = False  # not eval(): what learns may be inside

    def eval(self) -> None:
        """Set the model to evaluation mode."""
        self.deepspeed.eval()

    def averaged(self) -> AbstractContextManager[None]:
        """Return a context in which the forward pass uses the moving average of the weights. Collective, see
        ema.swapped_in; it must not be entered between a backward and its step."""
        return ema.swapped_in(self.optimizer, self.deepspeed.optimizer, self.stage)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of one micro batch's mean loss, divided by the number of micro batches."""
        self.deepspeed.backward(loss)
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()  # only counts the micro batch

    def step(self, step: int) -> StepResult:
        """Take the optimizer step number `step`, after the backward of its last micro batch.

        If the gradient is not finite, the step is skipped on every rank.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = self.rate.at(step, group["lr_scale"])
        norm = self._unpartitioned_norm() if self.stage == 0 else None
        if norm is not None and not math.isfinite(norm):
            # At stage 0 DeepSpeed does not check for this: drop the gradient and count the micro batch here.
            self.deepspeed.zero_grad()
            self.deepspeed.micro_steps += 1
            return StepResult(norm, self.rate.at(step), applied=False)
        self.deepspeed.step()
        if norm is None:
            norm = float(self.deepspeed.get_global_grad_norm())
        applied = self.deepspeed.was_step_applied()
        if applied and self.ema_decay is not None:
            ema.update(self.optimizer, ema.decay_at(step, self.ema_decay, self.ema_warmup))
        return StepResult(norm if applied else math.inf, self.rate.at(step), applied)

    def save_checkpoint(self, folder: Path) -> None:
        """Pass this rank's files to the writer. Collective. A file that cannot be written raises in writer.entries."""
        self.deepspeed.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)

    def load_checkpoint(self, checkpoint: Path) -> None:
        """Load a checkpoint whose files hold every tensor where this engine has it (checkpoint/places.py checks this:
        DeepSpeed compares no names). Collective. Raises ValueError when DeepSpeed finds no files.

        DeepSpeed also takes the settings of the groups from the checkpoint. The recipe's own are put back: they differ
        when a forked run changed them.
        """
        settings = [{k: v for k, v in g.items() if k != "params"} for g in self.deepspeed.optimizer.param_groups]
        # Always with the optimizer's state: partial loads at stage 3 load other weights, or none (DeepSpeed #8499).
        path, _ = self.deepspeed.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
        if path is None:
            raise ValueError(f"{checkpoint}: DeepSpeed found nothing to load; restore its files")
        for group, own in zip(self.deepspeed.optimizer.param_groups, settings, strict=True):
            group.update(own)
        self.finish_loading()

    def finish_loading(self) -> None:
        """Drop a loaded moving average that the recipe does not keep, and check the groups. Every loader ends so."""
        if self.ema_decay is None:
            ema.drop(self.optimizer)
        self._check_groups()

    def close(self) -> None:
        """Wait until every file is written, and free the model and what DeepSpeed holds.

        Nothing collective, but on a GPU it waits for the work in progress: do not call it when that may wait for a rank
        that has failed.
        """
        self.writer.close()
        self.deepspeed.destroy()
        release_modules(self.module)

    def _unpartitioned_norm(self) -> float:
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads))

    def _owned_keys(self, recipe: Recipe, model: nn.Module) -> dict[str, Any]:
        return owned_keys(recipe, self.runtime.world_size, self.accumulation) | {
            "torch_autocast": {
                "enabled": self.precision == "bf16",
                "dtype": "bfloat16",
                "lower_precision_safe_modules": autocast_modules(model),
            },
        }

    def _initialize_deepspeed(self, model: nn.Module) -> Any:
        import deepspeed

        engine, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=self.config)
        return engine

    def _install_writer(self, background: bool) -> None:
        """Replace DeepSpeed's own writer, so that every file of a checkpoint gets a digest."""
        from dsmim.engine.writer import CheckpointWriter

        self.deepspeed.checkpoint_engine = self.writer = CheckpointWriter(background)
        # Two scripts that DeepSpeed would copy into the folder without its checkpoint engine.
        self.deepspeed._copy_recovery_script = lambda path: None

    def _check_compiled(self, recipe: Recipe) -> None:
        """Check that ZeRO-3's hooks are between compiled blocks. A hook within one makes dynamo start a new graph."""
        from deepspeed.utils import get_z3_leaf_modules

        if self.stage == 3 and recipe.model.compile and not get_z3_leaf_modules(self.module):
            raise ValueError(
                f"model.compile: at ZeRO stage 3 a block must be gathered whole; name its class in the JSON's "
                f"zero_optimization.leaf_module.classes, as zero3_blocks does ({recipe.engine.deepspeed} does not)"
            )

    def _check_groups(self) -> None:
        """Check that DeepSpeed kept the groups: their number, order, scales, decays and members."""
        found = [(g["lr_scale"], g["weight_decay"]) for g in self.deepspeed.optimizer.param_groups]
        expected = [(g.scale, g.weight_decay) for g in self.groups]
        assert found == expected, f"DeepSpeed changed the parameter groups: {found} instead of {expected}"
        members = group_members(self.deepspeed, self.stage)
        for group, names in zip(self.groups, members, strict=True):
            assert set(names) == set(group.names), f"DeepSpeed moved parameters between groups: {names}"


def resolve_precision(setting: str, device: torch.device) -> str:
    """Return "bf16" or "fp32": "auto" is bf16 on an accelerator, fp32 on a CPU."""
    return ("bf16" if device.type == "cuda" else "fp32") if setting == "auto" else setting
