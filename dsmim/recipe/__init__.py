"""The typed description of a run: what a recipe file holds (schema), and how one is read (reading)."""

from dsmim.recipe.schema import (
    Augment,
    Batch,
    Best,
    Checkpoint,
    ClassifyTask,
    Data,
    Duration,
    Engine,
    Log,
    Model,
    Optim,
    Recipe,
    Schedule,
    SimMIMTask,
    Validation,
    required,
)

__all__ = [
    "Augment",
    "Batch",
    "Best",
    "Checkpoint",
    "ClassifyTask",
    "Data",
    "Duration",
    "Engine",
    "Log",
    "Model",
    "Optim",
    "Recipe",
    "Schedule",
    "SimMIMTask",
    "Validation",
    "required",
]
