"""What a SimMIM run makes of hidden pixels: image, masked image and reconstruction, as a picture or a page."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torchvision.io import encode_png
from torchvision.utils import make_grid

from dsmim.checkpoint import reading
from dsmim.data.dataset import EvalDataset, collate
from dsmim.data.from_recipe import open_reader, validation_shards
from dsmim.data.images import open_images
from dsmim.evaluate import recipe_of, weights_for
from dsmim.recipe import Recipe
from dsmim.shards.atomic import write_atomically
from dsmim.tasks import Task, build_task

SUFFIXES = (".png", ".html")
GREY = 128  # of hidden pixels
COLUMNS = ("image", "masked", "reconstruction")
PER_ROW = 2  # images in a row of a picture


@dataclass(frozen=True)
class Drawing:
    """One image as the network sees it. Tensors are (3, H, W) uint8."""

    name: str
    """The path of a file, or a sample's key."""
    image: torch.Tensor
    masked: torch.Tensor
    """The image with its hidden pixels grey."""
    reconstruction: torch.Tensor
    """The image with its hidden pixels predicted."""


def reconstruct(
    path: Path, inputs: list[str], overrides: list[str], count: int, which: str = "fp32"
) -> tuple[list[Drawing], int, list[str]]:
    """Reconstruct images by a SimMIM checkpoint, or by a run's newest valid one, on the CPU in fp32.

    inputs: image files, folders or patterns of them, or shards; none: data.val. The first `count` of them are taken.
    which: "fp32" for the weights, "ema" for their moving average. Return the drawings, the number of images there are,
    and the faults of images that cannot be decoded. Each image has the mask that validation gives it. Raises ValueError
    for a run of another task, and for what else a user can fix.
    """
    found = reading.locate(path)
    recipe = recipe_of(found, overrides)
    if recipe.task.name != "simmim":
        raise ValueError(f"{path}: the run's task is {recipe.task.name}; only a SimMIM run reconstructs images")
    task = build_task(recipe)
    data = _open(inputs, recipe, task)
    list(task.fill(weights_for(task, found, which)))
    task.model.eval()
    samples = [data[(number, 1.0)] for number in range(min(count, len(data)))]
    faults = [fault for sample in samples for fault in sample["undecodable"]]
    readable = [sample for sample in samples if sample["weight"]]
    size = recipe.batch.eval_batch
    batches = (collate(readable[begin : begin + size]) for begin in range(0, len(readable), size))
    return [drawing for batch in batches for drawing in _drawings(task, batch)], len(data), faults


def save(drawings: list[Drawing], out: Path, title: str) -> None:
    """Write a picture (.png) or a page that needs no other file (.html). Raises ValueError without a drawing."""
    check_output(out)
    if not drawings:
        raise ValueError(f"--out {out}: no image could be decoded, so there is nothing to draw")
    write_atomically(out, _picture(drawings) if out.suffix == ".png" else _page(drawings, title).encode())


def check_output(out: Path) -> None:
    """Check the suffix of a file for `save`. Raises ValueError for another one."""
    if out.suffix not in SUFFIXES:
        raise ValueError(f"--out {out}: the suffix decides the kind of file; it must be {' or '.join(SUFFIXES)}")


def _open(inputs: list[str], recipe: Recipe, task: Task) -> EvalDataset:
    if inputs:
        return open_images(inputs, recipe.data, task.eval_sample)
    if recipe.data.val is None:
        raise ValueError(
            "data.val: missing, the run has no validation images; give images, folders or shards after the run, or "
            "data.val=…"
        )
    return EvalDataset(open_reader(recipe.data, validation_shards(recipe.data), window=1), task.eval_sample, None)


def _drawings(task: Task, batch: dict) -> Iterator[Drawing]:
    images = batch["image"]
    filled, hidden = task.reconstruction(batch)
    masked = torch.where(hidden, torch.full_like(images, GREY), images)
    for key, *tensors in zip(batch["key"], images, masked, filled, strict=True):
        yield Drawing(key, *map(_rgb, tensors))


def _rgb(image: torch.Tensor) -> torch.Tensor:
    """Return three channels of (C, H, W): the first three, or one three times."""
    return image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)


def _picture(drawings: list[Drawing]) -> bytes:
    tiles = torch.stack([tile for drawing in drawings for tile in _tiles(drawing)])
    return _png(make_grid(tiles, nrow=3 * min(PER_ROW, len(drawings)), padding=3, pad_value=255))


def _page(drawings: list[Drawing], title: str) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("", *COLUMNS))
    rows = "\n".join(f"<tr><td>{_text(d.name)}</td>{''.join(map(_cell, _tiles(d)))}</tr>" for d in drawings)
    style = (
        "body{font-family:sans-serif} td,th{padding:4px;text-align:left} img{min-width:160px;image-rendering:pixelated}"
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f"<style>{style}</style></head>\n<body><h1>{_text(title)}</h1>\n<table><tr>{head}</tr>\n{rows}\n</table></body></html>\n"
    )


def _tiles(drawing: Drawing) -> tuple[torch.Tensor, ...]:
    return drawing.image, drawing.masked, drawing.reconstruction


def _cell(tile: torch.Tensor) -> str:
    return f'<td><img alt="" src="data:image/png;base64,{base64.b64encode(_png(tile)).decode()}"></td>'


def _text(text: str) -> str:
    """Return a text for a page; bytes of a file name that are no UTF-8 become question marks."""
    return html.escape(text.encode("utf-8", "replace").decode())


def _png(image: torch.Tensor) -> bytes:
    return encode_png(image.contiguous()).numpy().tobytes()
