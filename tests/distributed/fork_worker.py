"""Trains a small model on two ranks under every ZeRO stage, saves, and resumes it with other parameter groups.

Usage: fork_worker.py OUT. The ranks are forks of this process, which has imported everything. It writes

    OUT/truth/STAGE.pt             the engine's state when it saved, from DeepSpeed's own getters, and the next losses
    OUT/found/STAGE.VARIANT.pt     state and losses of the engine that resumed, and what was said
    OUT/cut/STAGE                  a checkpoint of an engine that cuts its flat tensors in another way
    OUT/errorsSTAGE.json           the messages when the model is another one
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from dsmim.checkpoint.resume import resume_engine
from dsmim.checkpoint.run_directory import RunDirectory
from dsmim.checkpoint.saved_layout import PARAMETER_ORDER
from dsmim.engine.runtime import Runtime
from dsmim.engine.zero import Engine
from tests.distributed.elastic_worker import (
    PRELOADED,
    SAVED_AT,
    STAGES,
    STEPS,
    Odd,
    build,
    everything,
    launch,
    report,
    train,
)

OPTIM = {"layer_decay": 1.0, "no_decay": ["first.weight"]}
FORKS: dict[str, dict[str, Any]] = {
    "same": {},
    "no_decay": {"no_decay": ["last.weight"]},  # as large as first.weight: no size tells that they changed places
    "no_decay_nowhere": {"no_decay": []},
    "layer_decay": {"layer_decay": 0.7},
    "modules": {},
    "cut": {},
}
CUTS = {
    "1": {"stage": 1, "round_robin_gradients": True},
    "2": {"stage": 2, "round_robin_gradients": True},
    "3": {"stage": 3, "sub_group_size": 20},
}
VARIANTS = [(stage, fork) for stage in STAGES for fork in FORKS if fork != "cut" or stage in CUTS]


class Reordered(Odd):
    """The same parameters, created in another order, as after an update of a library."""

    def __init__(self, seed: int):
        super().__init__(seed)
        self.last = self._modules.pop("last")
        self.first = self._modules.pop("first")


def save(out: Path, runtime: Runtime, stage: str) -> None:
    engine = build(out, runtime, stage, 1, **OPTIM)
    train(engine, runtime, range(SAVED_AT))
    run = run_directory(out, stage)
    engine.save_checkpoint(run.resume_from)
    runtime.gather(engine.writer.entries())  # waits until the files of all ranks are on disk
    if runtime.is_rank_zero:
        names = [list(group.names) for group in engine.groups]
        state = {PARAMETER_ORDER: names, "zero_stage": engine.stage, "world_size": 2, "step": SAVED_AT}
        (run.resume_from / "state.json").write_text(json.dumps(state))
        (run.resume_from / "manifest.json").write_text(json.dumps({"files": {}}))
    truth = everything(engine)
    truth["losses"] = train(engine, runtime, range(SAVED_AT, STEPS))
    report(out / "truth" / f"{stage}.pt", truth, runtime)
    engine.close()


def run_directory(out: Path, stage: str) -> RunDirectory:
    path = out / f"run{stage}"
    found = path / f"checkpoints/step_{SAVED_AT:08d}"
    state = found / "state.json"
    return RunDirectory(path, found, json.loads(state.read_text()) if state.exists() else {})


def fork(out: Path, runtime: Runtime, stage: str, name: str) -> None:
    model = Reordered(2) if name == "modules" else None
    engine = build(out, runtime, f"{stage}_cut" if name == "cut" else stage, 2, model, **OPTIM | FORKS[name])
    said: list[str] = []
    resume_engine(run_directory(out, stage), engine, runtime, said.append)
    found = everything(engine)
    if name == "cut":
        engine.save_checkpoint(out / "cut" / stage)
        runtime.gather(engine.writer.entries())
    found["losses"] = train(engine, runtime, range(SAVED_AT, STEPS))
    report(out / "found" / f"{stage}.{name}.pt", found | {"said": said}, runtime)
    engine.close()


def refused(out: Path, runtime: Runtime, stage: str, changes: list[str]) -> str:
    engine: Engine = build(out, runtime, stage, 2, Odd(2, width=8), **OPTIM)
    run = run_directory(out, stage)
    run.changes = changes
    try:
        resume_engine(run, engine, runtime, print)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def work(out: Path, runtime: Runtime) -> None:
    for stage in STAGES:
        save(out, runtime, stage)
        errors = {"keys": refused(out, runtime, stage, ["model.img_size: 32 → 64", "optim.lr: 1 → 2"])}
        errors["no key"] = refused(out, runtime, stage, ["optim.lr: 1 → 2"])
        assert not (out / f"run{stage}/checkpoints/universal").exists()  # nothing is converted that cannot be loaded
        (out / f"errors{stage}.json").write_text(json.dumps(errors))
    for stage, name in VARIANTS:
        fork(out, runtime, stage, name)


def main(out: Path) -> None:
    for stage in STAGES:
        own = {"stage": int(stage)} | ({"stage3_param_persistence_threshold": 20} if stage == "3" else {})
        (out / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": own}))
        if stage in CUTS:
            (out / f"zero{stage}_cut.json").write_text(json.dumps({"zero_optimization": own | CUTS[stage]}))
    for module in PRELOADED:
        importlib.import_module(module)
    launch(out, 2, work)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
