"""Loads a run's checkpoint into a freshly made engine, also one of another number of ranks or another ZeRO stage."""

from __future__ import annotations

from collections.abc import Callable

from dsmim.checkpoint.reading import UNIVERSAL_FOLDER
from dsmim.checkpoint.run_directory import RunDirectory
from dsmim.checkpoint.saved_layout import PARAMETER_ORDER
from dsmim.checkpoint.universal import convert
from dsmim.checkpoint.universal_loading import load_universal
from dsmim.engine.runtime import Runtime
from dsmim.engine.zero import Engine


def resume_engine(run: RunDirectory, engine: Engine, runtime: Runtime, say: Callable[[str], None]) -> None:
    """Load run.resume_from into the engine. If the engine is partitioned differently, convert the checkpoint first.
    Collective. Raises Stopped when the checkpoint cannot be read or is of another model."""
    runtime.phase("resuming", run.step)
    if run.same_shards(runtime.world_size, engine.stage) and _same_groups(run, engine):
        with runtime.all_or_none():
            engine.load_checkpoint(run.resume_from)
        return
    universal = run.checkpoints / UNIVERSAL_FOLDER / run.resume_from.name
    convert(run.resume_from, universal, runtime, say)
    runtime.phase("loading the converted checkpoint", run.step)
    load_universal(universal, engine, runtime)


def _same_groups(run: RunDirectory, engine: Engine) -> bool:
    """Return whether the engine's groups have the checkpoint's members: DeepSpeed loads by place, not by name."""
    saved = run.state.get(PARAMETER_ORDER)
    return saved is None or saved == [list(group.names) for group in engine.groups]
