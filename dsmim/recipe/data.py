"""The sections of a recipe that say where samples come from and how they are read."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from dsmim.recipe.section import Count, Positive, Section, Share, UserPath, per_channel

MAX_PIXELS = 89_478_485
"""Pillow's limit against decompression bombs: 256 MiB as RGB."""


def member_extension(text: str) -> str:
    """Return the extension of a member of a tar as indexes hold it: in lower case, without the dot before it.

    Raises ValueError for what is no extension.
    """
    extension = text.lstrip(".").lower()
    if not extension or "/" in extension:
        raise ValueError("give the extension of a member, such as jpg or input.png")
    return extension


class Augment(Section):
    """What is done to the pixels of an image before normalisation, in the order of docs/augmentation.md."""

    crop: Literal["random_resized", "simple"] = "random_resized"
    """random_resized: a crop of random area and ratio. simple: DeiT III's Simple Random Crop, which resizes the short
    side to model.img_size, adds 4 pixels around the image by reflection, and crops a square."""
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
    three_augment: bool = False
    """DeiT III's 3-Augment: exactly one of greyscale, solarisation and Gaussian blur, a third of the images each."""
    color_jitter: Annotated[float, Field(ge=0)] | None = None
    """Strength s of a random change of brightness, contrast and saturation, each by a factor from 1 - s to 1 + s, in
    random order; null or 0: none."""
    rand_augment: Annotated[str, Field(pattern=r"^rand(-[a-z]+[\d.]*)*$")] | None = None
    """RandAugment, as timm writes it, such as rand-m9-mstd0.5-inc1."""
    random_erasing: Share = 0.0
    """Share of images in which a rectangle is replaced by per-pixel noise."""
    eval_crop_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Evaluation: side of the centre crop over the resized short side (timm: crop_pct); DeiT III: 1.0."""
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
    index_dir: UserPath | None = None
    """Folder of the shards' indexes, if their own folder is read-only or remote; null: beside each tar."""
    subset: UserPath | None = None
    """A list of keys, written by `dsmim shards subset`: train only on these samples of data.train."""
    classes: UserPath | list[int | str] | None = None
    """Train and validate on these classes alone, numbered in this order: class numbers, or names of the classes.json
    beside the indexes; or a file that lists them; null: all classes, with their own numbers."""
    image_key: Annotated[str, AfterValidator(member_extension)] | None = None
    """Extension of the member that is the image, such as jpg, if samples have several; null: as the shards were
    indexed."""
    cache_dir: UserPath | None = None
    """Folder on the node that keeps copies of remote shards, shared by the node's ranks and by other runs."""
    cache_gb: Positive = 100
    """Size limit of data.cache_dir in 10^9 bytes; the least recently used shards are removed first."""
    allow_pipe: bool = False
    """Run the commands of pipe: shards, as webdataset does. They can do everything that you may do, so only the command
    line can allow them, not a recipe file; a resume and an evaluation need it again."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Decoding processes per rank; this changes the speed, never the data."""
    shuffle_window: Count = 16
    """Number of shards whose samples are shuffled together."""
    repeats: Count = 1
    """Repeated augmentation (arXiv 1901.09335): number of times that a global batch shows each of its images, with
    other crops and colours each time. An epoch is as long as without, so it shows 1/repeats of the images."""
    max_undecodable: Share = 0.01
    """Stop training when more than this share of the images seen cannot be decoded (before the end of the first epoch:
    of the images of one epoch)."""
    mean: per_channel(ge=0, le=1) | None = None
    """Mean of the pixels, on a scale from 0 to 1, which is subtracted: one number for each channel of the image, or one
    for all. null: that of the run at a resume; for a new run timm's for timm:NAME, else ImageNet's (with one channel:
    the average of the three)."""
    std: per_channel(gt=0, le=1) | None = None
    """Standard deviation of the pixels, by which they are divided, like data.mean."""
    max_pixels: Count = MAX_PIXELS
    """An image with more pixels counts as undecodable: a file of a few kilobytes may claim billions."""
    augment: Augment = Augment()


class Batch(Section):
    """How many samples are computed together."""

    global_batch: Count
    """Samples per optimizer step, over all ranks."""
    micro_batch: Count | Literal["auto"] = "auto"
    """Samples that one rank computes at once; auto: global batch / ranks, but at most max_micro_batch. Gradient
    accumulation does the rest."""
    max_micro_batch: Count | None = None
    """Largest micro batch that auto takes: the largest divisor of a rank's share up to it (an even one where mixup or
    CutMix pair samples); null: no limit."""
    eval_batch: Count = 64
    """Samples of one validation batch."""
