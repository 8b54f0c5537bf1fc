"""What is learned: a task combines a model, its loss, its metrics and its transforms."""

from dsmim.recipe import Recipe
from dsmim.tasks.base import Task
from dsmim.tasks.classify import Classify
from dsmim.tasks.simmim import MaskedImageModelling

__all__ = ["Task", "build_task"]


def build_task(recipe: Recipe) -> Task:
    """Return the task that the recipe names. `Task.fill` creates its model's parameters."""
    return {"simmim": MaskedImageModelling, "classify": Classify}[recipe.task.name](recipe)
