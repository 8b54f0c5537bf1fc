"""Decide what happens to a file's classification head: the user says it, nothing is guessed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from timm.data import ImageNetInfo
from torch import nn

from dsmim.models.swin_v2 import SwinTransformerV2
from dsmim.weights.layouts import Native

# Class orders of an ImageNet-22K head, as timm lists them: by the synsets' names, and microsoft/FocalNet's order, whose
# first 1,000 rows are ImageNet-1K's.
MAPPED = {"imagenet22k": "imagenet-22k", "imagenet22k-ms": "imagenet-22k-ms"}
SETTING = "model.weights_head"


def classifier(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules that turn features into logits."""
    if isinstance(model, SwinTransformerV2):
        return ("head.fc",)
    name = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "head"
    return (name,) if isinstance(name, str) else tuple(name)


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
    return _pick(choice, native, theirs, own, shapes, source)


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
    indices = _imagenet_rows(choice, rows, classes, source) if choice in MAPPED else _rows(choice, rows, classes)
    absent = [i for i, index in enumerate(indices) if index is None]
    for name in theirs:
        native.tensors[name] = _picked(native.tensors[name], indices)
    done = f"{classes - len(absent)} of {rows} rows picked ({choice})"
    if absent:
        names = ImageNetInfo().label_names()
        done += f", {', '.join(names[i] for i in absent)} has no row and starts as their mean"
    return dict.fromkeys(theirs, done)


def _picked(tensor: torch.Tensor, indices: list[int | None]) -> torch.Tensor:
    """Return the chosen rows. A class without a row starts as the mean of the others (our choice: a neutral start)."""
    picked = tensor.float()[torch.tensor([index or 0 for index in indices])]
    present = torch.tensor([index is not None for index in indices])
    picked[~present] = picked[present].mean(0)
    return picked


def _imagenet_rows(choice: str, rows: int, classes: int, source: str) -> list[int | None]:
    """Return the row of each ImageNet-1K class; None for the one that ImageNet-22K lacks (n04399382, a teddy bear)."""
    order = {synset: row for row, synset in enumerate(ImageNetInfo(MAPPED[choice]).label_names())}
    if rows != len(order):
        raise ValueError(f"{SETTING}={choice}: needs a head of {len(order)} classes, {source} has one of {rows}")
    wanted = ImageNetInfo("imagenet-1k").label_names()
    if classes != len(wanted):
        raise ValueError(f"{SETTING}={choice}: gives the {len(wanted)} classes of ImageNet-1K, the model has {classes}")
    found = [order.get(synset) for synset in wanted]
    if found.count(None) > 1:
        raise ValueError(f"{SETTING}={choice}: the installed timm's list lacks {found.count(None)} classes")
    return found


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
        f"what to do with it: {SETTING}=keep, drop (a fresh head), {', '.join(MAPPED)} (the rows of the ImageNet-1K "
        f"classes), or a file with one row number per class"
    )
