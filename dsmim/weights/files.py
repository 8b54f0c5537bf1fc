"""Read weights to start from: from dsmim's runs, and from files in other projects' layouts."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from dsmim.checkpoint import reading, zero_shards
from dsmim.weights import swin_windows
from dsmim.weights.match import LoadReport, State, Weights, match
from dsmim.weights.swin_windows import Windows

PICKLED = (".pth", ".pt", ".bin", ".ckpt")
CONTAINERS = ("model", "state_dict", "module")  # DeiT, MAE, Swin, BEiT; Lightning, timm; DeepSpeed, BEiT v2


# What the authors' trainings save beside the weights: the options of DeiT, MAE and BEiT, and the settings of Swin
# and SimMIM, which are a dict of yacs. An OrderedDict stands for it: it holds the items, and no code of yacs is needed.
_HARMLESS = (argparse.Namespace, (OrderedDict, "yacs.config.CfgNode"))


def warm_start(model: nn.Module, path: Path | str, head: str | None = None) -> tuple[LoadReport, State]:
    """Return what a run starts from: a report, and the weights of `path` by the model's full parameter names.

    The model may be on the meta device. head: see heads.settle. Raises ValueError with the problem and the fix.
    """
    return match(model, read(Path(path)), head)


def read(path: Path) -> Weights:
    """Read the tensors of a run directory, a checkpoint, a .safetensors file, or a file written by torch.save.

    From files of torch.save only tensors and plain values are unpickled. Raises ValueError for a path that is none of
    these, or that cannot be read.
    """
    if path.is_dir():
        return _read_checkpoint(reading.locate(path))
    if not path.is_file():
        raise ValueError(f"{path}: no such file or run directory")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in PICKLED:
        return _unwrapped(_load(path), str(path))
    endings = ", ".join((".safetensors", *PICKLED))
    raise ValueError(f"{path}: is not weights; give a run directory, a checkpoint, or a file that ends in {endings}")


def unfinished(path: Path) -> str | None:
    """Return how far the run directory `path` has come, if it is not at its end; None for anything else, and where the
    end is not given in steps."""
    newest = next(iter(reading.candidates(path / "checkpoints")), None)
    if newest is None:
        return None
    state = reading.read_state(newest)
    total = state["recipe"].get("schedule", {}).get("duration", {}).get("steps")
    return None if total is None or state["step"] >= total else f"{path} is at step {state['step']} of {total}"


def _read_checkpoint(found: Path) -> Weights:
    settings = reading.read_state(found)["recipe"].get("model", {})
    return Weights(zero_shards.read_weights(found), str(found), windows=_windows(settings))


def _read_safetensors(path: Path) -> Weights:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    return Weights(_without_wrappers(tensors), str(path), windows=_windows_in(metadata), metadata=metadata)


def _load(path: Path) -> Any:
    """Load a file of torch.save without running code; large files are memory-mapped where their format allows it."""
    try:
        with torch.serialization.safe_globals([*_HARMLESS]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        wanted = re.findall(r"GLOBAL (\S+)", str(error))
        what = f"would run {wanted[0]}" if wanted else "is not a plain file of torch.save"
        raise ValueError(
            f"{path}: {what}; dsmim does not run code from files. If you trust the file, save only its weights: "
            f"torch.save({{'model': torch.load({str(path)!r}, weights_only=False)['model']}}, NEW_FILE)"
        ) from None
    except Exception as error:  # for bytes that are not a pickle, torch's reader raises any kind of error
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path}: cannot be read ({reason})") from None


def _unwrapped(content: Any, source: str) -> Weights:
    """Take the weights out of what torch.save wrote; note what else it holds."""
    left_out: dict[str, str] = {}
    metadata: Mapping[str, Any] = {}
    while isinstance(content, Mapping) and (inner := _container(content)):
        left_out |= {f"{key}": "an entry beside the weights" for key in content if key != inner}
        metadata = content.get("metadata") or metadata
        content = content[inner]
    strange = [key for key, value in content.items() if not isinstance(value, torch.Tensor)] if _named(content) else []
    if not _named(content) or strange:
        entries = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(
            f"{source}: {f'{strange[0]} is not a tensor' if strange else 'holds no tensors'}; dsmim needs a dict of "
            f"tensors, alone or as the value of the key {' or '.join(CONTAINERS)}; found: {entries[:300]}"
        )
    return Weights(_without_wrappers(content), source, left_out, _windows_in(metadata), metadata)


def _container(content: Mapping) -> str | None:
    return next((name for name in CONTAINERS if isinstance(content.get(name), Mapping)), None)


def _named(content: Any) -> bool:
    return isinstance(content, Mapping) and bool(content) and all(isinstance(key, str) for key in content)


def _without_wrappers(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Remove the prefixes that DistributedDataParallel (`module.`) and torch.compile (`_orig_mod.`) add to names."""
    tensors = {key.replace("_orig_mod.", ""): value for key, value in tensors.items()}
    while tensors and all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return tensors


def _windows_in(metadata: Mapping[str, Any]) -> Windows | None:
    """Return the windows by the settings in the metadata of dsmim's exports; None for other files."""
    try:
        return _windows(json.loads(metadata["model_args"]))
    except (KeyError, ValueError, TypeError, AttributeError):
        return None


def _windows(settings: Mapping[str, Any]) -> Windows | None:
    if not (settings.get("img_size") and settings.get("window_size")):
        return None
    return swin_windows.from_settings(
        settings["img_size"], settings["window_size"], settings.get("pretrained_window_sizes")
    )
