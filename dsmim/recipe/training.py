"""The sections of a recipe that say how the network is trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from dsmim.recipe.optimizers import TIMM_PREFIX, known_optimizer, own_arguments
from dsmim.recipe.section import Count, Duration, Positive, Section, Share, UserPath


class Optim(Section):
    """The optimizer."""

    name: Annotated[str, AfterValidator(known_optimizer)] = "adamw"
    """adamw; lamb (arXiv 1904.00962, exact at every ZeRO stage); or timm:NAME, one of timm's optimizers. Which of them
    are right at which ZeRO stage: docs/optimizers.md."""
    options: dict[str, Any] = {}
    """More arguments of a timm optimizer, such as {momentum: 0.95}."""
    lr: Positive
    """Peak learning rate, before optim.lr_scaling."""
    lr_scaling: Literal["none", "linear"] = "none"
    """linear: multiply lr, warmup_lr and min_lr by global_batch / lr_base_batch."""
    lr_base_batch: Count = 512
    betas: tuple[Share, ...] | None = None
    """null: the optimizer's own; of adamw and lamb 0.9 and 0.999."""
    eps: Positive | None = None
    """null: the optimizer's own; of adamw and lamb 1e-8."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    no_decay: list[str] = ["*mask_token", "*logit_scale", "*cpb_mlp*", "*pos_embed", "*cls_token"]
    """Shell patterns of the names of parameters without weight decay; biases and other 1-D tensors never have any."""
    model_no_decay: bool = True
    """timm:NAME: no weight decay for what the network itself names either (its no_weight_decay()), such as register
    tokens and tables of relative positions. false: optim.no_decay alone decides."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the learning rate per layer below the head (arXiv 2106.08254)."""
    clip_grad: Positive | None = 5.0
    """Largest global gradient norm; null: no clipping."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay per step of a moving average of the weights (4 more bytes per parameter, in shards); null: no average."""
    ema_warmup: bool = False
    """Begin with a short average: the k-th update has a decay of at most 1 - k^(-2/3), as timm's ModelEmaV3
    with use_warmup."""

    @model_validator(mode="before")
    @classmethod
    def _own_arguments(cls, values: Any) -> Any:
        """Write out what the optimizer takes where the recipe leaves betas or eps out: a checkpoint keeps it."""
        if not isinstance(values, dict) or not isinstance(name := values.get("name", "adamw"), str):
            return values
        return values | {key: own for key, own in own_arguments(name).items() if values.get(key) is None}

    @model_validator(mode="after")
    def _arguments_fit(self) -> Optim:
        own = own_arguments(self.name)
        for key, value in (("betas", self.betas), ("eps", self.eps)):
            if value is not None and own[key] is None:
                raise ValueError(f"{key}: {self.name} has no such argument; remove it, or set optim.{key}=null")
        if self.betas is not None and len(self.betas) != len(own["betas"]):
            raise ValueError(f"betas: {self.name} takes {len(own['betas'])} of them, as in {list(own['betas'])}")
        if self.options and not self.name.startswith(TIMM_PREFIX):
            raise ValueError(f"options: {self.name} takes none; only timm's optimizers do (optim.name=timm:NAME)")
        owners = ["lr", "weight_decay", *(key for key in ("betas", "eps") if own[key] is not None)]
        if twice := [key for key in owners if key in self.options]:
            raise ValueError(f"options.{twice[0]}: give it as optim.{twice[0]}")
        return self


class Schedule(Section):
    """How the learning rate changes, and how long training takes."""

    name: Literal["cosine", "multistep"] = "cosine"
    duration: Duration
    warmup: Duration = Duration(steps=0)
    warmup_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at step 0 of the warm-up."""
    cosine: Literal["after_warmup", "whole"] = "after_warmup"
    """Where the cosine begins: after_warmup: at its end, with the peak (MAE, BEiT, Swin); whole: at step 0, so that the
    rate drops a little where the warm-up ends (DeiT, microsoft/SimMIM)."""
    update: Literal["step", "epoch"] = "step"
    """When the rate changes. epoch: once per epoch, and one epoch late: the first two epochs have the first rate, as in
    facebookresearch/deit, which calls timm's scheduler after each epoch with that epoch's number."""
    epoch: Duration | None = None
    """update=epoch: length of an epoch; null: {epochs: 1}, rounded up to steps. facebookresearch/deit drops what does
    not fill a batch: ImageNet-1K at 2048 has {steps: 625}."""
    layer_scale: Literal["peak", "rate"] = "peak"
    """What optim.layer_decay scales: peak: the peak alone, so that all layers share warmup_lr and min_lr
    (microsoft/SimMIM); rate: the whole rate of every step (BEiT, MAE)."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the end of the cosine."""
    milestones: list[Duration] = []
    """multistep: when the rate is multiplied by gamma."""
    gamma: Positive = 0.1

    @model_validator(mode="after")
    def _milestones_fit(self) -> Schedule:
        if self.name == "multistep" and not self.milestones:
            raise ValueError(
                "name=multistep needs the times at which the rate drops: "
                "schedule.milestones='[{epochs: 30}, {epochs: 60}]', for example"
            )
        if self.name != "multistep" and self.milestones:
            raise ValueError(
                f"schedule.milestones have no effect with schedule.name={self.name}; set schedule.name=multistep, or "
                "schedule.milestones=[]"
            )
        return self


class Engine(Section):
    """How a step is computed, and when a run fails."""

    deepspeed: UserPath = "zero3"
    """A DeepSpeed JSON file: the name of a shipped one (in ds_configs), or a path."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on an accelerator, fp32 on CPU."""
    max_skipped: Annotated[int, Field(ge=0)] = 10
    """Largest number of steps in a row that may be skipped because their loss or gradient is not finite; one more stops
    the run."""
    max_loss_growth: Annotated[float, Field(gt=1)] | None = 3
    """Stop the run as diverged when the mean loss of its last 20 steps exceeds this multiple of that of its first 20,
    and also the loss of an untrained network (classification: ln(classes), with bce ln(2); masked image modelling: 1);
    null: never."""
    timeout_minutes: Positive = 10
    """How long a rank waits for another one, before the job ends with an error. It holds until the first step is done,
    and in validation and saving."""
    step_timeout_minutes: Positive = 5
    """The same in training, after the first step."""
