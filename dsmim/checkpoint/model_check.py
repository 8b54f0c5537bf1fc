"""The check before a universal checkpoint is loaded: does it hold the same model as the engine?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsmim.engine.construct import saved_buffers
from dsmim.engine.zero import Engine
from dsmim.engine.zero_internals import group_members, whole_shape

Shapes = dict[str, list[int]]
"""Name → shape."""

TRAINED, FROZEN, BUFFER = "parameter that is trained", "frozen parameter", "buffer"
MAX_LISTED = 10  # differences that an error names


def check_same_model(universal: Path, manifest: dict[str, Any], engine: Engine) -> None:
    """Check that the checkpoint has the engine's trained parameters, frozen parameters and buffers, in the same shapes,
    and no others. Raises ValueError that names up to ten differences."""
    expected, found = _engine_shapes(engine), _checkpoint_shapes(manifest)
    different = [line for kind in expected for line in _differences(kind, expected[kind], found[kind])]
    if different:
        lines = "".join(f"\n  {line}" for line in different[:MAX_LISTED])
        more = f"\n  … and {len(different) - MAX_LISTED} more" if len(different) > MAX_LISTED else ""
        raise ValueError(f"{universal}: is of another model; restore the recipe's model section:{lines}{more}")


def _engine_shapes(engine: Engine) -> dict[str, Shapes]:
    trained = {name for names in group_members(engine.deepspeed, engine.stage) for name in names}
    shapes = {name: list(whole_shape(parameter)) for name, parameter in engine.module.named_parameters()}
    return {
        TRAINED: {name: shape for name, shape in shapes.items() if name in trained},
        FROZEN: {name: shape for name, shape in shapes.items() if name not in trained},
        BUFFER: {name: list(buffer.shape) for name, buffer in saved_buffers(engine.module).items()},
    }


def _checkpoint_shapes(manifest: dict[str, Any]) -> dict[str, Shapes]:
    return {
        TRAINED: {name: entry["shape"] for name, entry in manifest["parameters"].items()},
        FROZEN: manifest["frozen"],
        BUFFER: manifest["buffers"],
    }


def _differences(kind: str, expected: Shapes, found: Shapes) -> list[str]:
    missing = [f"{name}: the checkpoint has no such {kind}" for name in expected if name not in found]
    extra = [f"{name}: this run's model has no such {kind}" for name in found if name not in expected]
    reshaped = [name for name in expected if name in found and expected[name] != found[name]]
    return [*missing, *extra, *(f"{name}: has shape {found[name]}, here {expected[name]}" for name in reshaped)]
