"""The recipe: a typed description of one run. Reading one is in recipe_file.py.

This is the ground floor: it imports nothing else of dsmim and nothing heavy, so that `dsmim recipes` and a check before
submission answer at once.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Union

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A part of the recipe: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Duration(Section):
    """A length of training, in exactly one of three units."""

    steps: Annotated[int, Field(ge=0)] | None = None
    """Optimizer steps."""
    epochs: Annotated[float, Field(ge=0)] | None = None
    """Passes over the training set (with repeated augmentation, an epoch holds every repeat)."""
    samples: Annotated[int, Field(ge=0)] | None = None
    """Training samples seen."""

    @model_validator(mode="after")
    def _one_unit(self) -> Duration:
        if sum(v is not None for v in (self.steps, self.epochs, self.samples)) != 1:
            raise ValueError("give exactly one of steps, epochs, samples")
        return self

    def in_steps(self, global_batch: int, epoch_samples: int) -> int:
        """Optimizer steps, rounded up so that the last sample asked for is seen."""
        if self.steps is not None:
            return self.steps
        samples = self.samples if self.samples is not None else self.epochs * epoch_samples
        return math.ceil(samples / global_batch - 1e-9)  # 1e-9: float epochs such as 0.1 * 10 must not add a step


class SimMIMTask(Section):
    """Masked image modelling (SimMIM, arXiv 2111.09886)."""

    name: Literal["simmim"]
    mask_ratio: Share = 0.6
    """Share of mask patches hidden; their number is rounded up, as in the authors' code."""
    mask_patch: Count = 32
    """Side of a mask patch in pixels: a multiple of the model's patch size that divides the image."""
    target_window: Count | None = None
    """Side in pixels of the sliding window that normalises the target; null reconstructs plain pixels."""

    @model_validator(mode="after")
    def _odd_window(self) -> SimMIMTask:
        if self.target_window is not None and self.target_window % 2 == 0:
            raise ValueError(f"target_window must be odd so that it has a centre pixel, got {self.target_window}")
        return self


class ClassifyTask(Section):
    """Supervised classification with cross entropy over soft targets."""

    name: Literal["classify"]
    num_classes: Annotated[int, Field(ge=2)]
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    mixup: Annotated[float, Field(ge=0)] = 0.0
    """Alpha of mixup's Beta distribution; 0 is off."""
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    """Alpha of CutMix's Beta distribution; 0 is off."""
    mix_switch: Share = 0.5
    """When both are on, the share of steps that use CutMix."""


class Model(Section):
    name: str
    """A name that `dsmim.models.create_model` knows, or timm:NAME for any network of timm (to be fine-tuned)."""
    img_size: Count
    """Side of the square input in pixels."""
    window_size: Count | None = None
    """Swin V2: attention window in tokens (clamped to the feature map)."""
    drop_path_rate: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Stochastic depth. Swin V2 and timm: of the deepest block, growing linearly from 0; DeiT III: of every block."""
    pretrained_window_sizes: list[int] | None = None
    """Per stage: window of the pre-training, to which the position-bias coordinates are scaled (0: this window)."""
    extra_norm_every: Annotated[int, Field(ge=0)] = 0
    """Swin V2: a further norm behind each n-th block of a stage (arXiv 2111.09883: 6 in the two largest); 0: none."""
    sequential_stages: Annotated[int, Field(ge=0)] = 0
    """Swin V2: in so many first stages a few windows are attended to at a time: less memory at high resolution."""
    options: dict[str, Any] = {}
    """timm:NAME: further arguments of timm.create_model, such as {global_pool: avg}."""
    grad_checkpointing: Annotated[int, Field(ge=0)] = 0
    """Recompute each n-th block in the backward pass instead of keeping its activations: 1 every block, 0 none."""
    grad_checkpointing_stages: Count | None = None
    """Recompute blocks of so many first stages only; null: of all."""
    compile: bool = False
    """torch.compile of every block: faster steps after minutes of compilation."""
    weights: str | None = None
    """Where training starts from: a run directory, one of its checkpoints, a .safetensors file, or one of torch.save;
    in our names, timm's, or the authors' of Swin V2, SimMIM, DeiT III, MAE and BEiT."""
    weights_head: str | None = None
    """What becomes of their classifier, if both they and the model have one: keep, drop (a fresh one), imagenet22k or
    imagenet22k-ms (the rows of ImageNet-1K's classes), or a file with one row number per class."""


class Augment(Section):
    """What the pixels of a training image go through, before normalisation."""

    crop_scale: tuple[Positive, Positive] = (0.67, 1.0)
    """Area of the random resized crop, as a share of the image."""
    crop_ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    decode: Literal["exact", "scaled"] = "exact"
    """scaled: a JPEG of which the crop has at least twice the input's side is decoded at 1/2, 1/4 or 1/8 (by libjpeg's
    DCT): faster on large photographs, and not quite the same pixels."""
    hflip: Share = 0.5
    vflip: Share = 0.0
    rand_augment: Annotated[str, Field(pattern=r"^rand(-[a-z]+[\d.]*)*$")] | None = None
    """timm's RandAugment string, such as rand-m9-mstd0.5-inc1."""
    random_erasing: Share = 0.0
    """Share of images of which a rectangle becomes per-pixel noise."""
    eval_crop_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Evaluation: the centre crop's side over the resized short side."""
    eval_interpolation: Literal["bilinear", "bicubic"] = "bicubic"

    @model_validator(mode="after")
    def _ordered(self) -> Augment:
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} goes from small to large, got [{low:g}, {high:g}]")
        if self.crop_scale[1] > 1:
            raise ValueError(f"crop_scale is a share of the image, got {self.crop_scale[1]:g}")
        return self


class Data(Section):
    train: str | list[str] | None = None
    """Training shards: paths, globs, or brace patterns such as train-{000000..000146}.tar; http(s):// and s3:// too."""
    val: str | list[str] | None = None
    """Validation shards; null trains without validation."""
    index_dir: str | None = None
    """Where the sidecar indexes lie when the shards' own folder is read-only or remote; null: beside each tar."""
    subset: str | None = None
    """A list of keys, made by `dsmim shards subset`: only these samples of data.train are trained on."""
    cache_dir: str | None = None
    """Folder on the node where remote shards are kept, shared by its ranks and by other runs."""
    cache_gb: Positive = 100
    """Size of that folder in 10^9 bytes; the least recently used shards make room."""
    allow_pipe: bool = False
    """Run the commands of pipe: shards, as webdataset does. They can do whatever you can."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Decoding processes per rank; changes speed only, never the data."""
    shuffle_window: Count = 16
    """Shards whose samples are mixed with one another."""
    repeats: Count = 1
    """Repeated augmentation: how often an epoch shows each sample (arXiv 1901.09335)."""
    max_undecodable: Share = 0.01
    """Share of undecodable training images (of those seen, but at least of one epoch) above which training stops."""
    augment: Augment = Augment()


class Batch(Section):
    global_batch: Count
    """Samples per optimizer step, over all ranks."""
    micro_batch: Count | Literal["auto"] = "auto"
    """Samples that one rank computes at once; auto: global batch / ranks. The rest is gradient accumulation."""
    eval_batch: Count = 64
    """Samples of one validation batch."""


class Optim(Section):
    name: Literal["adamw"] = "adamw"
    lr: Positive
    """Peak learning rate, before lr_scaling."""
    lr_scaling: Literal["none", "linear"] = "none"
    """linear: lr, warmup_lr and min_lr are multiplied by global_batch / lr_base_batch."""
    lr_base_batch: Count = 512
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    no_decay: list[str] = ["*mask_token", "*logit_scale", "*cpb_mlp*", "*pos_embed", "*cls_token"]
    """Shell patterns of parameter names without weight decay; biases and other 1-D tensors never have any."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the learning rate per layer below the head (arXiv 2106.08254)."""
    clip_grad: Positive | None = 5.0
    """Largest global gradient norm; null: no clipping."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep a moving average of the weights beside them (a further 4 bytes a parameter, in shards); null: none."""


class Schedule(Section):
    name: Literal["cosine", "multistep"] = "cosine"
    duration: Duration
    warmup: Duration = Duration(steps=0)
    warmup_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at step 0 of the warm-up."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Floor of the cosine."""
    milestones: list[Duration] = []
    """Multistep: when the rate is multiplied by gamma."""
    gamma: Positive = 0.1

    @model_validator(mode="after")
    def _milestones_fit(self) -> Schedule:
        if (self.name == "multistep") != bool(self.milestones):
            raise ValueError("milestones belong to the multistep schedule, which needs at least one")
        return self


class Engine(Section):
    deepspeed: str = "zero3"
    """A DeepSpeed JSON: the name of one that dsmim ships, or a path."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on an accelerator, fp32 on CPU."""
    max_skipped: Annotated[int, Field(ge=0)] = 10
    """Consecutive steps skipped for a non-finite loss or gradient after which the run stops."""
    max_loss_growth: Annotated[float, Field(gt=1)] | None = 3
    """A run has diverged, and stops, when the mean loss of its last 20 steps is this multiple of that of its first 20;
    null: never."""
    timeout_minutes: Positive = 10
    """How long a rank waits for another before the job ends with an error, until the first step is done."""
    step_timeout_minutes: Positive = 5
    """The same in training from then on. Validation and saving keep the longer time."""


class Validation(Section):
    every: Duration = Duration(epochs=1)
    """How often the validation set is measured; always at the end too."""


class Best(Section):
    """What makes one checkpoint better than another."""

    metric: str
    """A figure of the validation, as metrics.jsonl names it without val_: loss, accuracy, …"""
    mode: Literal["min", "max"]


class Checkpoint(Section):
    every: Duration = Duration(epochs=1)
    """How often a checkpoint is written; always at the end too."""
    keep: Count = 2
    """Newest checkpoints that stay on disk."""
    keep_every: Duration | None = None
    """Checkpoints at multiples of this length stay too; null: none."""
    keep_best: Best | None = None
    """The checkpoint that did best in a validation at its own step stays too; null: none."""
    background: bool = False
    """Serialise into host memory and go on training while that is written: a shorter stall, for the memory of a rank's
    shard."""
    before_end_minutes: Annotated[float, Field(ge=0)] = 5
    """Where the end of the job is known, as under Slurm: save and leave so long before it; 0: do not look."""


class Log(Section):
    every: Count = 10
    """Steps between two lines of the log."""
    low_memory: Share = 0.05
    """Warn when less than this share of a node's memory (or of the job's, where Slurm limits it) is left."""
    tensorboard: bool = True


class Recipe(Section):
    """Everything that decides what a run learns, and how it is run."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    seed: Annotated[int, Field(ge=0)] = 0
    task: Annotated[Union[SimMIMTask, ClassifyTask], Field(discriminator="name")]
    model: Model
    data: Data = Data()
    batch: Batch
    optim: Optim
    schedule: Schedule
    engine: Engine = Engine()
    validation: Validation = Validation()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()

    def to_yaml(self) -> str:
        """The recipe with every default filled in; loading it gives the same recipe."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=False), sort_keys=False)


def required(value: Any, key: str) -> Any:
    """The value of a recipe key that a command cannot do without. Raises ValueError when it is null."""
    if value is None:
        raise ValueError(f"{key}: missing, must be given (in the recipe, or as {key}=…)")
    return value
