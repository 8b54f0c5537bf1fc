"""The typed description of a run: schema, made of the sections in
about, tasks, model, data, training and running (section: their base); how one is read (files, reading, errors) and
shown (explain)."""

from dsmim.recipe.about import About
from dsmim.recipe.data import Augment, Batch, Data
from dsmim.recipe.model import Model
from dsmim.recipe.running import Best, Checkpoint, Log, Validation
from dsmim.recipe.schema import Recipe, required
from dsmim.recipe.section import Duration
from dsmim.recipe.tasks import ClassifyTask, SimMIMTask
from dsmim.recipe.training import Engine, Optim, Schedule

__all__ = [
    "About",
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
