"""The checks before a checkpoint is converted, and before the result is loaded: does it hold the engine's model?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsmim.checkpoint.zero_shards import ZeroShards
from dsmim.engine.construct import saved_buffers
from dsmim.engine.zero import Engine
from dsmim.engine.zero_internals import group_members, whole_shape

Shapes = dict[str, list[int]]
"""Name → shape."""

TRAINED, FROZEN, BUFFER = "parameter that is trained", "frozen parameter", "buffer"
MAX_LISTED = 10  # differences that an error names
_MODEL_KEYS = ("model.", "task.")


def check_same_model(universal: Path, manifest: dict[str, Any], engine: Engine) -> None:
    """Check that a converted checkpoint has the engine's trained parameters, frozen parameters and buffers, in the same
    shapes, and no others. Raises ValueError that names up to ten differences."""
    trained = {name: entry["shape"] for name, entry in manifest["parameters"].items()}
    if different := _differences({TRAINED: trained, FROZEN: manifest["frozen"], BUFFER: manifest["buffers"]}, engine):
        raise ValueError(f"{universal}: is of another model; restore the recipe's model section:{_listed(different)}")


def check_fits(shards: ZeroShards, engine: Engine, run_dir: Path, changes: list[str]) -> None:
    """Check, before a checkpoint is converted, that its tensors fit the engine's model.

    changes: what differs between the checkpoint's recipe and this one, a line per key. Raises ValueError that names the
    keys that may have changed the model, and up to ten tensors.
    """
    found = {
        TRAINED: {name: list(shards.shapes[name]) for name in shards.names},
        FROZEN: {name: list(shards.shapes[name]) for name in shards.frozen},
        BUFFER: {name: list(value.shape) for name, value in shards.buffers.items()},
    }
    if not (different := _differences(found, engine)):
        return
    cause, fix = "that this installation builds from the same recipe", "Install the versions the run was started with"
    if keys := [change for change in changes if change.startswith(_MODEL_KEYS)]:
        cause, fix = f"of this recipe, in which these keys differ:{_listed(keys)}", "Give these keys their old values"
    raise ValueError(
        f"{shards.checkpoint}: its weights do not fit the model {cause}\nTensors that do not fit:{_listed(different)}\n"
        f"{fix}, or start a new run from these weights: another --run-dir, with model.weights={run_dir} (and "
        "model.weights_head, where both have a classifier)"
    )


def _engine_shapes(engine: Engine) -> dict[str, Shapes]:
    trained = {name for names in group_members(engine.deepspeed, engine.stage) for name in names}
    shapes = {name: list(whole_shape(parameter)) for name, parameter in engine.module.named_parameters()}
    return {
        TRAINED: {name: shape for name, shape in shapes.items() if name in trained},
        FROZEN: {name: shape for name, shape in shapes.items() if name not in trained},
        BUFFER: {name: list(buffer.shape) for name, buffer in saved_buffers(engine.module).items()},
    }


def _differences(found: dict[str, Shapes], engine: Engine) -> list[str]:
    expected = _engine_shapes(engine)
    return [line for kind in expected for line in _of_kind(kind, expected[kind], found[kind])]


def _listed(different: list[str]) -> str:
    more = f"\n  … and {len(different) - MAX_LISTED} more" if len(different) > MAX_LISTED else ""
    return "".join(f"\n  {line}" for line in different[:MAX_LISTED]) + more


def _of_kind(kind: str, expected: Shapes, found: Shapes) -> list[str]:
    missing = [f"{name}: the checkpoint has no such {kind}" for name in expected if name not in found]
    extra = [f"{name}: this run's model has no such {kind}" for name in found if name not in expected]
    reshaped = [name for name in expected if name in found and expected[name] != found[name]]
    return [*missing, *extra, *(f"{name}: has shape {found[name]}, here {expected[name]}" for name in reshaped)]
