"""A run's checkpoint into a freshly made engine, whatever ranks and ZeRO stage wrote it."""

from __future__ import annotations

from collections.abc import Callable

from dsmim.checkpoint.run_directory import RunDirectory
from dsmim.checkpoint.saving import UNIVERSAL
from dsmim.checkpoint.scatter import place
from dsmim.checkpoint.universal import convert
from dsmim.engine.runtime import Runtime
from dsmim.engine.zero import Engine


def restore(run: RunDirectory, engine: Engine, runtime: Runtime, say: Callable[[str], None]) -> None:
    """Load run.resume_from; what was cut up otherwise is converted first. Collective. Raises Stopped."""
    runtime.phase("resuming", run.step)
    if run.same_shards(runtime.world_size, engine.stage):
        with runtime.all_or_none():
            engine.restore(run.resume_from)
        return
    whole = run.checkpoints / UNIVERSAL / run.resume_from.name
    convert(run.resume_from, whole, runtime, say)
    runtime.phase("placing whole parameters", run.step)
    place(whole, engine, runtime)
