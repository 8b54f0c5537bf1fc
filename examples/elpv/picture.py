"""Draw eight validation images, their hidden parts, and the reconstruction by the pre-trained model."""

from __future__ import annotations

from pathlib import Path

import torch
from torchvision.io import write_png
from torchvision.utils import make_grid

from dsmim.checkpoint import reading
from dsmim.data.dataset import EvalDataset, collate
from dsmim.data.from_recipe import open_reader, validation_shards
from dsmim.evaluate import recipe_of, weights_for
from dsmim.models.simmim import sliding_statistics
from dsmim.tasks import build_task

IMAGES = 8
GREY = 128


@torch.no_grad()
def draw(run_dir: Path, out: Path) -> None:
    """Write a PNG: for each image, the image, the masked image and the reconstruction side by side.

    If the target is normalised, the prediction is scaled back by the mean and deviation of the original's windows, as
    is usual for such pictures. Pixels that were not hidden are those of the image.
    """
    found = reading.locate(run_dir)
    task = build_task(recipe := recipe_of(found, []))
    list(task.fill(weights_for(task, found)))
    data = EvalDataset(open_reader(recipe.data, validation_shards(recipe.data), window=1), task.eval_sample, None)
    batch = collate([data[(number, 1.0)] for number in range(IMAGES)])
    images, hidden = batch["image"], task.model.hidden_pixels(batch["mask"])  # (8, 3, S, S) uint8, (8, 1, S, S)
    scaled = task.normalise(images)
    prediction = task.model.eval().reconstruct(scaled, batch["mask"])
    if recipe.task.target_window:
        mean, deviation = sliding_statistics(scaled, recipe.task.target_window)
        prediction = prediction * deviation + mean
    pixels = task.normalise.undo(prediction)
    masked = torch.where(hidden, torch.full_like(images, GREY), images)
    rows = torch.stack([images, masked, torch.where(hidden, pixels, images)], dim=1).flatten(0, 1)
    write_png(make_grid(rows, nrow=3 * 2, padding=3, pad_value=255), str(out))
