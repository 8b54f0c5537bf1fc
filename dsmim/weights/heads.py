"""Decide what happens to a file's classification head: the user says it, nothing is guessed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from timm.data import ImageNetInfo
from timm.layers import trunc_normal_
from torch import nn

from dsmim.models import classifier
from dsmim.models.initialise import MAE_HEAD
from dsmim.weights.layouts import Native

_TEDDY_BEAR = "n04399382"  # the class of ImageNet-1K that ImageNet-22K lacks


@dataclass(frozen=True)
class _Order:
    """An order of ImageNet-22K's classes in a head."""

    listed: str
    """its name in timm.data.ImageNetInfo"""
    rows: tuple[int, ...]
    """the sizes of the heads that have it"""
    whose: str
    moved: Mapping[int, int] = field(default_factory=dict)
    """row → row of the list whose class is there, in heads that lack the list's last rows"""
    teddy_bear: str | None = None
    """the class whose row a teddy bear takes, if its authors chose one"""


# microsoft/Swin-Transformer: two classes of the list have no images, and the last two classes have their rows
# (data/imagenet22k_dataset.py). A teddy bear takes the row of a garment, the chemise or teddy (data/map22kto1k.txt).
MAPPED = {
    "imagenet22k-goog": _Order(
        "imagenet-21k-goog", (21841, 21843), "microsoft/Swin-Transformer (21841 rows), Google (21843)",
        {9205: 21841, 15027: 21842}, "n03013580",
    ),
    "imagenet22k-fall2011": _Order("imagenet-22k", (21841,), "folders sorted by name, fall 2011 release: ConvNeXt"),
    "imagenet22k-ms": _Order("imagenet-22k-ms", (21842,), "microsoft/FocalNet, ImageNet-1K's classes first"),
}  # fmt: skip
_AMBIGUOUS = "imagenet22k"  # which of two orders of 21841 classes?
SETTING = "model.weights_head"


def head_names(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the names that belong to the head's tensors."""
    return sorted(name for name in names if name.startswith(tuple(f"{module}." for module in classifier(model))))


def settle(choice: str | None, native: Native, model: nn.Module, shapes: dict, source: str) -> dict[str, str]:
    """Change the file's head as chosen, in place. Return what was done, by name.

    choice: "keep", "drop" (the model's head starts fresh), a key of MAPPED, a path of a text file that gives a row of
    the file's head for each class, or None if file or model has no head. Raises ValueError for a choice that does not
    fit, and for no choice where file and model have a head.
    """
    theirs, own = head_names(model, native.tensors), head_names(model, shapes)
    if choice not in (None, "drop") and not (theirs and own):
        raise ValueError(f"{SETTING}={choice}: {source if own else 'the model'} has no head; leave this setting out")
    if theirs and own and choice is None:
        raise ValueError(_undecided(native, theirs, shapes, own, source))
    if choice in (None, "drop"):
        for name in theirs:
            native.drop(name, f"{SETTING}=drop" if own else "the model has no head")
        return {}
    if choice == "keep":
        return _keep(native, theirs, own, shapes, source)
    if choice == _AMBIGUOUS:
        raise ValueError(f"{SETTING}={choice}: says not which order of the classes; {_orders(native, theirs, source)}")
    return _pick(choice, native, theirs, own, shapes, source)


def fresh_as_mae(native: Native, model: nn.Module, shapes: dict) -> dict[str, torch.Tensor]:
    """Return first weights for a new head on MAE's pre-trained weights, as its authors fine-tune: 2e-5, biases 0.

    Empty for other weights, and where the recipe gives the deviation (model.head_init_std).
    """
    if not native.layout.startswith("MAE"):
        return {}
    if any(hasattr(model.get_submodule(module), "init_deviation") for module in classifier(model)):
        return {}
    fresh = {name: torch.zeros(shapes[name]) for name in head_names(model, shapes) if name not in native.tensors}
    for name, tensor in fresh.items():
        if name.endswith("weight"):
            trunc_normal_(tensor, std=MAE_HEAD)
    return fresh


def _keep(native: Native, theirs: list[str], own: list[str], shapes: dict, source: str) -> dict[str, str]:
    different = [n for n in own if n in theirs and native.tensors[n].shape != shapes[n]]
    if different:
        name = different[0]
        raise ValueError(
            f"{SETTING}=keep: {source} has {name} of shape {tuple(native.tensors[name].shape)}, the model "
            f"{tuple(shapes[name])}; use drop for a fresh head"
        )
    return {}


def _pick(choice: str, native: Native, theirs: list[str], own: list[str], shapes: dict, source: str) -> dict[str, str]:
    rows, classes = len(native.tensors[theirs[0]]), shapes[own[0]][0]
    if choice not in MAPPED:
        indices, remark = _rows(choice, rows, classes), ""
    else:
        indices, remark = _imagenet_rows(choice, native, theirs, classes, source)
    for name in theirs:
        native.tensors[name] = _picked(native.tensors[name], indices)
    return dict.fromkeys(theirs, f"{classes - indices.count(None)} of {rows} rows picked ({choice}){remark}")


def _picked(tensor: torch.Tensor, indices: list[int | None]) -> torch.Tensor:
    """Return the chosen rows. A class without a row starts as the mean of the others (our choice: a neutral start)."""
    picked = tensor.float()[torch.tensor([index or 0 for index in indices])]
    present = torch.tensor([index is not None for index in indices])
    picked[~present] = picked[present].mean(0)
    return picked


def _imagenet_rows(
    choice: str, native: Native, theirs: list[str], classes: int, source: str
) -> tuple[list[int | None], str]:
    """Return the row of each class of ImageNet-1K (None: there is none), and a remark about the teddy bear."""
    order, wanted, rows = MAPPED[choice], ImageNetInfo("imagenet-1k").label_names(), len(native.tensors[theirs[0]])
    if rows not in order.rows:
        sizes = " or ".join(map(str, order.rows))
        fix = _orders(native, theirs, source)
        raise ValueError(f"{SETTING}={choice}: needs a head of {sizes} classes, {source} has one of {rows}; {fix}")
    if classes != len(wanted):
        raise ValueError(f"{SETTING}={choice}: gives the {len(wanted)} classes of ImageNet-1K, the model has {classes}")
    row_of = _row_of(order, rows)
    absent = [synset for synset in wanted if synset not in row_of]
    if absent not in ([], [_TEDDY_BEAR]):
        raise ValueError(f"{SETTING}={choice}: the installed timm's list lacks {len(absent)} classes")
    if not absent:
        return [row_of[synset] for synset in wanted], ""
    stand_in = row_of.get(order.teddy_bear)
    start = "their mean" if stand_in is None else f"row {stand_in} ({order.teddy_bear}), as its authors chose"
    indices = [row_of.get(synset, stand_in) for synset in wanted]
    return indices, f", {_TEDDY_BEAR} has no row and starts as {start}"


def _row_of(order: _Order, rows: int) -> dict[str, int]:
    """Return synset → row of a head with this many rows."""
    listed = ImageNetInfo(order.listed).label_names()
    classes = listed[:rows]
    for row, moved in order.moved.items() if rows < len(listed) else ():
        classes[row] = listed[moved]
    return {synset: row for row, synset in enumerate(classes)}


def _orders(native: Native, theirs: list[str], source: str) -> str:
    """Return the orders to choose from, and the one that the file's layout tells."""
    rows = len(native.tensors[theirs[0]])
    fitting = {choice: order for choice, order in MAPPED.items() if rows in order.rows} or MAPPED
    listed = ", ".join(f"{choice} ({order.whose})" for choice, order in fitting.items())
    told = ""
    if fitting is not MAPPED and native.layout.startswith("Swin V2"):
        told = f". The released Swin V2 models, whose layout {source} has, are {next(iter(fitting))}"
    return f"choose by who trained it: {listed}{told}"


def _rows(choice: str, rows: int, classes: int) -> list[int | None]:
    """Read one row number per line, as in microsoft/Swin-Transformer's map22kto1k.txt."""
    path = Path(choice)
    if not path.is_file():
        known = ", ".join(["keep", "drop", *MAPPED])
        raise ValueError(f"{SETTING}={choice}: must be one of {known}, or the path of a file with row numbers")
    lines = path.read_text(encoding="utf-8", errors="replace").split()
    if len(lines) != classes:
        raise ValueError(f"{path}: has {len(lines)} row numbers, the model {classes} classes")
    wrong = [line for line in lines if not line.isascii() or not line.isdigit() or int(line) >= rows]
    if wrong:
        raise ValueError(f"{path}: {wrong[0]!r} is not a row of a head of {rows} classes (0 … {rows - 1})")
    return [int(line) for line in lines]


def _undecided(native: Native, theirs: list[str], shapes: dict, own: list[str], source: str) -> str:
    return (
        f"{source}: has a head of {len(native.tensors[theirs[0]])} classes, the model one of {shapes[own[0]][0]}; say "
        f"what to do with it: {SETTING}=keep, drop (a fresh head), a file with one row number per class, or the order "
        f"from which the rows of the ImageNet-1K classes are taken; {_orders(native, theirs, source)}"
    )
