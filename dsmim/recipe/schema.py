"""The recipe: a typed description of one run. reading.py reads one from a file.

Imports nothing else of dsmim and nothing heavy, so that `dsmim recipes` and the checks before a submission answer at
once.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Union

import yaml
from pydantic import Field, model_validator

from dsmim.recipe.section import Count, Duration, Positive, Section, Share


class SimMIMTask(Section):
    """Masked image modelling (SimMIM, arXiv 2111.09886)."""

    name: Literal["simmim"]
    mask_ratio: Share = 0.6
    """Share of the mask patches that are hidden; their number is rounded up, as in the authors' code."""
    mask_patch: Count = 32
    """Side of a mask patch in pixels: a multiple of the model's patch size that divides model.img_size."""
    target_window: Count | None = None
    """Side in pixels of the sliding window that normalises the target; null: reconstruct plain pixels."""

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
    """Alpha of the Beta distribution of mixup; 0: no mixup."""
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    """Alpha of the Beta distribution of CutMix; 0: no CutMix."""
    mix_switch: Share = 0.5
    """Share of the steps that use CutMix, when both are on."""


class Model(Section):
    """The network and the weights that it starts from."""

    name: str
    """A name that `dsmim.models.create_model` knows, or timm:NAME for any network of timm (fine-tuning only)."""
    img_size: Count
    """Side of the square input in pixels."""
    window_size: Count | None = None
    """Swin V2: side of the attention window in tokens (limited to the feature map)."""
    drop_path_rate: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Stochastic depth. Swin V2 and timm: the rate of the deepest block, growing linearly from 0; DeiT III: of every
    block."""
    pretrained_window_sizes: list[int] | None = None
    """Swin V2, per stage: the window of the pre-training, to which position-bias coordinates are scaled; 0: the
    present window."""
    extra_norm_every: Annotated[int, Field(ge=0)] = 0
    """Swin V2: an extra norm after each n-th block of a stage (arXiv 2111.09883: 6 in the two largest); 0: none."""
    sequential_stages: Annotated[int, Field(ge=0)] = 0
    """Swin V2: in this many first stages, attention takes a few windows at a time: less memory at high resolution."""
    options: dict[str, Any] = {}
    """timm:NAME: more arguments for timm.create_model, such as {global_pool: avg}."""
    grad_checkpointing: Annotated[int, Field(ge=0)] = 0
    """Recompute each n-th block in the backward pass instead of keeping its activations; 1: every block, 0: none."""
    grad_checkpointing_stages: Count | None = None
    """Recompute blocks only in this many first stages; null: in all stages."""
    compile: bool = False
    """Compile every block by torch.compile: faster steps after minutes of compilation."""
    weights: str | None = None
    """Where training starts from: a run directory, one of its checkpoints, a .safetensors file, or a file of
    torch.save; with the parameter names of dsmim, of timm, or of the authors of Swin V2, SimMIM, DeiT III, MAE or
    BEiT."""
    weights_head: str | None = None
    """What to do with the classifier of the weights; needed if the model has one too: keep, drop (use a new one),
    imagenet22k or imagenet22k-ms (take the rows of ImageNet-1K's classes), or a file with one row number per class."""


class Augment(Section):
    """What is done to the pixels of an image before normalisation."""

    crop_scale: tuple[Positive, Positive] = (0.67, 1.0)
    """Area of the random resized crop, as a share of the image."""
    crop_ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    """Width over height of the random resized crop."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    decode: Literal["exact", "scaled"] = "exact"
    """scaled: decode a JPEG at 1/2, 1/4 or 1/8 (by libjpeg's DCT) if its crop has at least twice the side of the input:
    faster on large photographs, with slightly different pixels."""
    hflip: Share = 0.5
    """Share of images that are flipped left to right."""
    vflip: Share = 0.0
    """Share of images that are flipped top to bottom."""
    rand_augment: Annotated[str, Field(pattern=r"^rand(-[a-z]+[\d.]*)*$")] | None = None
    """RandAugment, as timm writes it, such as rand-m9-mstd0.5-inc1."""
    random_erasing: Share = 0.0
    """Share of images in which a rectangle is replaced by per-pixel noise."""
    eval_crop_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Evaluation: side of the centre crop over the resized short side."""
    eval_interpolation: Literal["bilinear", "bicubic"] = "bicubic"

    @model_validator(mode="after")
    def _ordered(self) -> Augment:
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} must go from small to large, got [{low:g}, {high:g}]")
        if self.crop_scale[1] > 1:
            raise ValueError(f"crop_scale is a share of the image, at most 1, got {self.crop_scale[1]:g}")
        return self


class Data(Section):
    """Where samples come from and how they are read."""

    train: str | list[str] | None = None
    """Training shards: paths, globs, or brace patterns such as train-{000000..000146}.tar; http(s):// and s3:// too."""
    val: str | list[str] | None = None
    """Validation shards; null: train without validation."""
    index_dir: str | None = None
    """Folder of the shards' indexes, if their own folder is read-only or remote; null: beside each tar."""
    subset: str | None = None
    """A list of keys, written by `dsmim shards subset`: train only on these samples of data.train."""
    cache_dir: str | None = None
    """Folder on the node that keeps copies of remote shards, shared by the node's ranks and by other runs."""
    cache_gb: Positive = 100
    """Size limit of data.cache_dir in 10^9 bytes; the least recently used shards are removed first."""
    allow_pipe: bool = False
    """Run the commands of pipe: shards, as webdataset does. They can do everything that you may do."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Decoding processes per rank; this changes the speed, never the data."""
    shuffle_window: Count = 16
    """Number of shards whose samples are shuffled together."""
    repeats: Count = 1
    """Repeated augmentation: number of times that an epoch shows each sample (arXiv 1901.09335)."""
    max_undecodable: Share = 0.01
    """Stop training when more than this share of the images seen cannot be decoded (before the end of the first epoch:
    of the images of one epoch)."""
    augment: Augment = Augment()


class Batch(Section):
    """How many samples are computed together."""

    global_batch: Count
    """Samples per optimizer step, over all ranks."""
    micro_batch: Count | Literal["auto"] = "auto"
    """Samples that one rank computes at once; auto: global batch / ranks. Gradient accumulation does the rest."""
    eval_batch: Count = 64
    """Samples of one validation batch."""


class Optim(Section):
    """The optimizer."""

    name: Literal["adamw"] = "adamw"
    lr: Positive
    """Peak learning rate, before optim.lr_scaling."""
    lr_scaling: Literal["none", "linear"] = "none"
    """linear: multiply lr, warmup_lr and min_lr by global_batch / lr_base_batch."""
    lr_base_batch: Count = 512
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    no_decay: list[str] = ["*mask_token", "*logit_scale", "*cpb_mlp*", "*pos_embed", "*cls_token"]
    """Shell patterns of the names of parameters without weight decay; biases and other 1-D tensors never have any."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the learning rate per layer below the head (arXiv 2106.08254)."""
    clip_grad: Positive | None = 5.0
    """Largest global gradient norm; null: no clipping."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay per step of a moving average of the weights (4 more bytes per parameter, in shards); null: no average."""


class Schedule(Section):
    """How the learning rate changes, and how long training takes."""

    name: Literal["cosine", "multistep"] = "cosine"
    duration: Duration
    warmup: Duration = Duration(steps=0)
    warmup_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at step 0 of the warm-up."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the end of the cosine."""
    milestones: list[Duration] = []
    """multistep: when the rate is multiplied by gamma."""
    gamma: Positive = 0.1

    @model_validator(mode="after")
    def _milestones_fit(self) -> Schedule:
        if (self.name == "multistep") != bool(self.milestones):
            raise ValueError("milestones: the multistep schedule needs at least one, other schedules take none")
        return self


class Engine(Section):
    """How a step is computed, and when a run fails."""

    deepspeed: str = "zero3"
    """A DeepSpeed JSON file: the name of a shipped one (in ds_configs), or a path."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on an accelerator, fp32 on CPU."""
    max_skipped: Annotated[int, Field(ge=0)] = 10
    """Largest number of steps in a row that may be skipped because their loss or gradient is not finite; one more stops
    the run."""
    max_loss_growth: Annotated[float, Field(gt=1)] | None = 3
    """Stop the run as diverged when the mean loss of its last 20 steps exceeds this multiple of that of its first 20;
    null: never."""
    timeout_minutes: Positive = 10
    """How long a rank waits for another one, before the job ends with an error. It holds until the first step is done,
    and in validation and saving."""
    step_timeout_minutes: Positive = 5
    """The same in training, after the first step."""


class Validation(Section):
    """When the validation set is measured."""

    every: Duration = Duration(epochs=1)
    """How often the validation set is measured. It is always measured at the end too."""


class Best(Section):
    """What makes one checkpoint better than another."""

    metric: str
    """A figure of the validation, named as in metrics.jsonl without val_: loss, accuracy, …"""
    mode: Literal["min", "max"]


class Checkpoint(Section):
    """When checkpoints are written, and which are kept."""

    every: Duration = Duration(epochs=1)
    """How often a checkpoint is written. One is always written at the end too."""
    keep: Count = 2
    """Number of newest checkpoints to keep."""
    keep_every: Duration | None = None
    """Keep checkpoints at multiples of this length too; null: none."""
    keep_best: Best | None = None
    """Keep the checkpoint with the best validation at its own step too; null: none."""
    background: bool = False
    """Copy the state to host memory, and continue training while the copy is written: a shorter stall, but host memory
    for a rank's shard."""
    before_end_minutes: Annotated[float, Field(ge=0)] = 5
    """Save and stop this long before the job ends, if its end is known (as under Slurm); 0: ignore the end."""


class Log(Section):
    """What is logged."""

    every: Count = 10
    """Steps between two lines of the log."""
    low_memory: Share = 0.05
    """Warn when less than this share of a node's memory is left (of the job's memory, if Slurm limits it)."""
    tensorboard: bool = True
    """Write the figures for TensorBoard too."""


class Recipe(Section):
    """Everything that decides what a run learns, and how it is run."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    """The run directory is runs/NAME unless --run-dir is given."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Decides everything that is random: order of samples, augmentation, masks, first weights, drop path."""
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
        """Return the recipe as YAML with every default. Loading it gives the same recipe."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=False), sort_keys=False)


def required(value: Any, key: str) -> Any:
    """Return the value of a recipe key that a command needs. Raises ValueError when it is null."""
    if value is None:
        raise ValueError(f"{key}: missing; give it in the recipe, or as {key}=…")
    return value
