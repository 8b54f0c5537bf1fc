"""What becomes of a file's classification head: always said, never guessed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from timm.data import ImageNetInfo
from torch import nn

from dsmim.models.swin_v2 import SwinTransformerV2
from dsmim.weights.layouts import Native

# Orders of a head of ImageNet-22K, as timm lists them: of the synsets' names, and microsoft/FocalNet's, whose first
# 1,000 rows are ImageNet-1K's.
MAPPED = {"imagenet22k": "imagenet-22k", "imagenet22k-ms": "imagenet-22k-ms"}
SETTING = "model.weights_head"


def classifier(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules that turn features into logits."""
    if isinstance(model, SwinTransformerV2):
        return ("head.fc",)
    name = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "head"
    return (name,) if isinstance(name, str) else tuple(name)


def head_names(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of the names that are the head's tensors."""
    return sorted(name for name in names if name.startswith(tuple(f"{module}." for module in classifier(model))))


def settle(choice: str | None, native: Native, model: nn.Module, shapes: dict, source: str) -> dict[str, str]:
    """Make the file's head what the choice says, in place; says for each name what was done.

    choice: "keep", "drop" (the model's starts fresh), a key of MAPPED, a file with one row number of the file's head
    per class, or None where file or model has no head. Raises ValueError where it does not fit.
    """
    theirs, own = head_names(model, native.tensors), head_names(model, shapes)
    if choice not in (None, "drop") and not (theirs and own):
        raise ValueError(f"{SETTING}={choice}: {source if own else 'the model'} has no head; leave it out")
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
            f"{tuple(shapes[name])}; say drop for a fresh head"
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
        done += f", {', '.join(names[i] for i in absent)} is none of them and starts as their mean"
    return dict.fromkeys(theirs, done)


def _picked(tensor: torch.Tensor, indices: list[int | None]) -> torch.Tensor:
    """The rows; a class without one starts as the mean of the others (our choice: neither wanted nor shunned)."""
    picked = tensor.float()[torch.tensor([index or 0 for index in indices])]
    present = torch.tensor([index is not None for index in indices])
    picked[~present] = picked[present].mean(0)
    return picked


def _imagenet_rows(choice: str, rows: int, classes: int, source: str) -> list[int | None]:
    """Row of each ImageNet-1K class. ImageNet-22K lacks one of them (n04399382, a teddy bear): None."""
    order = {synset: row for row, synset in enumerate(ImageNetInfo(MAPPED[choice]).label_names())}
    if rows != len(order):
        raise ValueError(f"{SETTING}={choice}: wants a head of {len(order)} classes, {source} has one of {rows}")
    wanted = ImageNetInfo("imagenet-1k").label_names()
    if classes != len(wanted):
        raise ValueError(f"{SETTING}={choice}: gives the {len(wanted)} classes of ImageNet-1K, the model has {classes}")
    found = [order.get(synset) for synset in wanted]
    if found.count(None) > 1:
        raise ValueError(f"{SETTING}={choice}: timm's list of this version lacks {found.count(None)} classes")
    return found


def _rows(choice: str, rows: int, classes: int) -> list[int | None]:
    """One row number per line, as microsoft/Swin-Transformer's map22kto1k.txt."""
    path = Path(choice)
    if not path.is_file():
        known = ", ".join(["keep", "drop", *MAPPED])
        raise ValueError(f"{SETTING}={choice}: none of {known}, and no file of row numbers")
    lines = path.read_text(encoding="utf-8", errors="replace").split()
    if len(lines) != classes:
        raise ValueError(f"{path}: has {len(lines)} row numbers, the model {classes} classes")
    wrong = [line for line in lines if not line.isascii() or not line.isdigit() or int(line) >= rows]
    if wrong:
        raise ValueError(f"{path}: {wrong[0]!r} is no row of a head of {rows} classes (0 … {rows - 1})")
    return [int(line) for line in lines]


def _undecided(native: Native, theirs: list[str], shapes: dict, own: list[str], source: str) -> str:
    return (
        f"{source}: has a head of {len(native.tensors[theirs[0]])} classes, the model one of {shapes[own[0]][0]}; say "
        f"what becomes of it: {SETTING}=keep, drop (a fresh head), {', '.join(MAPPED)} (their rows of the ImageNet-1K "
        f"classes), or a file with one row number per class"
    )
