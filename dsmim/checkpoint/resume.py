"""Loads a run's checkpoint into a freshly made engine, also one whose tensors are cut or grouped in another way."""

from __future__ import annotations

from collections.abc import Callable

from dsmim.checkpoint.model_check import check_fits
from dsmim.checkpoint.places import same_places
from dsmim.checkpoint.reading import UNIVERSAL_FOLDER
from dsmim.checkpoint.run_directory import RunDirectory
from dsmim.checkpoint.saved_layout import PARAMETER_ORDER
from dsmim.checkpoint.universal import convert
from dsmim.checkpoint.universal_loading import load_universal
from dsmim.checkpoint.zero_shards import MODEL_FILE, ZeroShards, load_file
from dsmim.engine.runtime import Runtime
from dsmim.engine.zero import Engine

_GROUPING = ("optim.no_decay:", "optim.model_no_decay:", "optim.layer_decay:", "optim.weight_decay:")
"""Keys that decide which parameters share a group of the optimizer."""
_OPTIMIZER = "optim.name: "


def resume_engine(run: RunDirectory, engine: Engine, runtime: Runtime, say: Callable[[str], None]) -> None:
    """Load run.resume_from into the engine. Where its tensors are at other places in the checkpoint's files, convert
    the checkpoint first and load it by name. Collective. Raises Stopped when the checkpoint cannot be read or is of
    another model."""
    runtime.phase("resuming", run.step)
    with runtime.all_or_none():
        _check_same_optimizer(run)
    with runtime.all_or_none():
        if all(runtime.gather(_loads_as_it_is(run, engine, runtime))):
            engine.load_checkpoint(run.resume_from)
            return
    runtime.on_rank_zero(lambda: check_fits(ZeroShards(run.resume_from), engine, run.path, run.changes))
    if run.same_shards(runtime.world_size, engine.stage):
        say(f"{run.resume_from.name} has its parameters in other groups or another order: it is loaded by name")
    universal = run.checkpoints / UNIVERSAL_FOLDER / run.resume_from.name
    convert(run.resume_from, universal, runtime, say)
    runtime.phase("loading the converted checkpoint", run.step)
    load_universal(universal, engine, runtime)


def _check_same_optimizer(run: RunDirectory) -> None:
    """Check that a fork can continue with the optimizer's state. AdamW and LAMB keep the same moments."""
    line = next((change for change in run.changes if change.startswith(_OPTIMIZER)), None)
    if line is not None and set(line.removeprefix(_OPTIMIZER).split(" → ")) != {"adamw", "lamb"}:
        raise ValueError(
            f"{line}: {run.resume_from} has the state of the other optimizer; restore optim.name, or start a new run "
            f"from these weights: another --run-dir, with model.weights={run.path}"
        )


def _loads_as_it_is(run: RunDirectory, engine: Engine, runtime: Runtime) -> bool:
    """Return whether DeepSpeed can load this rank's files."""
    if not run.same_shards(runtime.world_size, engine.stage):
        return False
    if any(change.startswith(_OPTIMIZER) for change in run.changes):  # its step counters may be on another device
        return False
    order = run.state.get(PARAMETER_ORDER)
    if order is None and engine.stage == 0:  # an older dsmim wrote it: nothing else tells the order of the moments
        saved = load_file(run.resume_from / MODEL_FILE)["optimizer"]["param_groups"]
        same_sizes = [len(group["params"]) for group in saved] == [len(group.names) for group in engine.groups]
        return same_sizes and not any(change.startswith(_GROUPING) for change in run.changes)
    return same_places(run.resume_from, order, engine, runtime.rank)
