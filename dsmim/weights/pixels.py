"""Whether weights were trained on pixels that were normalised as this run does it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import safe_open

from dsmim.checkpoint import reading
from dsmim.data.normalisation import IMAGENET, Normalisation, as_stored, normalisation
from dsmim.recipe import Recipe
from dsmim.weights import files


def normalisation_note(path: Path, layout: str, own: Normalisation) -> str | None:
    """Return what to tell when the weights of `path` expect pixels that are normalised differently; None if not.

    layout: as LoadReport has it; own: of the run that starts from the weights. A run and an export of dsmim say how
    they were trained. Of others' layouts only BEiT's differs from ImageNet's figures (unilm/beit, datasets.py: without
    --imagenet_default_mean_and_std it takes 0.5; BEiT v2, whose files have the same keys, sets that option).
    """
    theirs = _trained_with(path)
    if theirs is None and layout == "BEiT" and own == IMAGENET:
        return (
            f"{path}: BEiT was trained on images normalised by mean 0.5 and standard deviation 0.5, this run has "
            "ImageNet's figures, which are those of BEiT v2; unless these weights are v2's, set data.mean=0.5 "
            "data.std=0.5"
        )
    if theirs is None or theirs == own or theirs.channels != own.channels:
        return None
    fix = " ".join(f"'data.{name}={list(getattr(theirs, name))}'" for name in ("mean", "std"))
    return f"{path}: was trained on images normalised by {theirs}, this run has {own}; for the former set {fix}"


def _trained_with(path: Path) -> Normalisation | None:
    """Return the normalisation that a run, a checkpoint or an export of dsmim names; None for other files."""
    try:
        return normalisation(Recipe.model_validate(as_stored(_recipe(path))))
    except (KeyError, TypeError, ValueError, ValidationError):
        return None


def _recipe(path: Path) -> Mapping[str, Any]:
    if path.is_dir():
        itself = [path] if (path / reading.STATE).is_file() else []
        newest = [*itself, *reading.candidates(path / "checkpoints"), *reading.candidates(path)][0]
        return reading.read_state(newest)["recipe"]
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {})["recipe"])
    return json.loads(files.read(path).metadata["recipe"])
