"""The sections of a recipe that say what is learned."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from dsmim.recipe.section import Count, Section, Share


class SimMIMTask(Section):
    """Masked image modelling (SimMIM, arXiv 2111.09886)."""

    name: Literal["simmim"]
    figures: ClassVar[tuple[str, ...]] = ("loss",)
    """What a validation measures, for checkpoint.keep_best."""
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
    """Supervised classification."""

    name: Literal["classify"]
    num_classes: Annotated[int, Field(ge=2)]
    loss: Literal["cross_entropy", "bce"] = "cross_entropy"
    """cross_entropy: over soft targets. bce: binary cross entropy of each class, where every target above 0 counts as 1
    (DeiT III on ImageNet-1K). The validation's loss is the cross entropy of the labels with both."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a target that all classes get equally; 0 with bce."""
    mixup: Annotated[float, Field(ge=0)] = 0.0
    """Alpha of the Beta distribution of mixup; 0: no mixup."""
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    """Alpha of the Beta distribution of CutMix; 0: no CutMix."""
    mix_switch: Share = 0.5
    """Share of the draws that use CutMix, when both are on."""
    mix_run: Annotated[int, Field(ge=2, multiple_of=2)] = 2
    """Number of neighbouring samples that share one draw of mixup or CutMix, coefficient and box; 2: each pair has its
    own. timm draws once per GPU's batch: give its size to do the same at any number of GPUs."""

    @property
    def figures(self) -> tuple[str, ...]:
        """What a validation measures, for checkpoint.keep_best."""
        return ("loss", "accuracy", "accuracy_top5") if self.num_classes > 5 else ("loss", "accuracy")

    @property
    def mixes(self) -> bool:
        """Whether samples are mixed with their neighbours."""
        return bool(self.mixup or self.cutmix)

    def odd_batch(self, key: str, size: int) -> str | None:
        """Return the problem of a batch of `size` samples, named by `key`, whose last sample has no neighbour to be
        mixed with; None: there is none."""
        if not self.mixes or size % 2 == 0:
            return None
        return f"{key}: mixup and CutMix pair neighbours; {size} samples are odd, set an even number"
