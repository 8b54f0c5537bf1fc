"""The typed description of a run: what a recipe holds (schema, section), and how one is read (reading, errors)."""

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
