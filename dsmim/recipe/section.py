"""What the sections of a recipe are made of: their base class, numbers with limits, and durations."""

from __future__ import annotations

import math
import os
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
UserPath = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path; ~ is the home folder, which a shell puts in only where a word begins with it."""


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, (int, float)) else list(value) if isinstance(value, tuple) else value


def _from_0_to_1(value: Any) -> Any:
    if isinstance(value, (int, float)) and value > 1:
        raise ValueError("pixels are on a scale from 0 to 1 here; divide by 255")
    return value


def per_channel(**limits: float) -> Any:
    """Return the type of one number per channel of an image, on a scale from 0 to 1 and within `limits`; a single
    number may stand alone."""
    number = Annotated[float, Field(**limits), BeforeValidator(_from_0_to_1)]
    return Annotated[list[number], Field(min_length=1), BeforeValidator(_listed)]


class Section(BaseModel):
    """A part of the recipe. Unknown keys are errors, and values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Duration(Section):
    """A length of training, in exactly one of the units."""

    steps: Annotated[int, Field(ge=0)] | None = None
    """Optimizer steps."""
    epochs: Annotated[float, Field(ge=0)] | None = None
    """As many samples as the training set has: a pass over it. With repeated augmentation an epoch is as long, so it
    shows a part of the images, each several times (as timm counts)."""
    samples: Annotated[int, Field(ge=0)] | None = None
    """Training samples seen."""

    @model_validator(mode="after")
    def _one_unit(self) -> Duration:
        units = list(type(self).model_fields)
        if sum(getattr(self, unit) is not None for unit in units) != 1:
            raise ValueError(f"give exactly one of {', '.join(units)}")
        return self

    def in_steps(self, global_batch: int, epoch_samples: int) -> int:
        """Return the number of optimizer steps, rounded up so that the last sample is seen."""
        if self.steps is not None:
            return self.steps
        samples = self.samples if self.samples is not None else self.epochs * epoch_samples
        return math.ceil(samples / global_batch - 1e-9)  # 1e-9: float epochs such as 0.1 * 10 must not add a step
