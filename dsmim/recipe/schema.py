"""The recipe: a typed description of one run. reading.py reads one from a file.

Imports nothing else of dsmim and nothing heavy, so that `dsmim recipes` and the checks before a submission answer at
once.
"""

from __future__ import annotations

from typing import Annotated, Any, Union

import yaml
from pydantic import Field

from dsmim.recipe.about import About
from dsmim.recipe.data import Batch, Data
from dsmim.recipe.model import Model
from dsmim.recipe.running import Checkpoint, Log, Validation
from dsmim.recipe.section import Section
from dsmim.recipe.tasks import ClassifyTask, SimMIMTask
from dsmim.recipe.training import Engine, Optim, Schedule


class Recipe(Section):
    """Everything that decides what a run learns, and how it is run."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    """The run directory is runs/NAME unless --run-dir is given."""
    about: About = About()
    """What the recipe is, for readers: it decides nothing."""
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
        """Return the recipe as YAML with every default. Loading it gives the same recipe, but without the permission
        data.allow_pipe, which only a command line gives."""
        tree = self.model_dump(mode="json", exclude_none=False)
        tree["data"]["allow_pipe"] = False
        return yaml.safe_dump(tree, sort_keys=False)


def required(value: Any, key: str) -> Any:
    """Return the value of a recipe key that a command needs. Raises ValueError when it is null."""
    if value is None:
        raise ValueError(f"{key}: missing; give it in the recipe, or as {key}=…")
    return value
