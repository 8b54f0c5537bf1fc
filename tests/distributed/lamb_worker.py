"""Trains with LAMB and with timm's optimizers at several ZeRO stages and numbers of ranks, saves and resumes.

Usage: lamb_worker.py OUT. The ranks are forks of this process, which has imported everything. It writes

    OUT/lamb.json                                     figures of benchmarks/lamb_exactness.py
    OUT/NAME/{truth,same,other}STAGE/checkpoints      six steps of one of NAMES: in one go; resumed after three; resumed
                                                      after three of the other stage (nadam, which keeps most)
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

from benchmarks.exactness import launch
from benchmarks.lamb_exactness import Case, folder_name, measure, resume, save
from dsmim.engine.runtime import Runtime
from tests.distributed.elastic_worker import DEEPSPEED, build, train

TRAINED = [
    Case(1, "0"),
    *(Case(2, zero) for zero in ("0", "1", "2", "3", "3-offload")),
    *(Case(3, zero) for zero in ("1", "2", "3")),
    Case(2, "3", precision="bf16"),
]
# From every number of ranks and every stage; on 2 ranks also as they were saved, and forked.
RESUMED = [
    Case(2, "1", folder_name(1, "0")),
    Case(2, "3", folder_name(3, "2")),
    Case(3, "0", folder_name(2, "3")),
    Case(1, "2", folder_name(3, "1")),
    *(Case(2, zero, folder_name(2, zero)) for zero in ("1", "3")),
    *(Case(2, zero, folder_name(2, zero), forked=True) for zero in ("0", "3")),
]
NAMES, STAGES = ("sgd", "lion", "nadam"), ("0", "3")
HALF, ALL = 3, 6


def by_name(out: Path, runtime: Runtime) -> None:
    for name in NAMES:
        folder, optim = out / name, {"name": f"timm:{name}", "lr": 1e-3}
        for stage in STAGES:
            engine = build(out, runtime, stage, seed=1, **optim)
            train(engine, runtime, range(HALF))
            save(engine, folder / f"truth{stage}", runtime, HALF)
            train(engine, runtime, range(HALF, ALL))
            save(engine, folder / f"truth{stage}", runtime, ALL)
            engine.close()
        others = (("0", "3", "other0"), ("3", "0", "other3")) if name == "nadam" else ()
        for stage, source, result in (("0", "0", "same0"), ("3", "3", "same3"), *others):
            engine = build(out, runtime, stage, seed=2, **optim)
            resume(engine, folder / f"truth{source}", runtime, HALF)
            train(engine, runtime, range(HALF, ALL))
            save(engine, folder / result, runtime, ALL)
            engine.close()
        if runtime.is_rank_zero:
            print(name, flush=True)  # the launch's deadline follows what it prints


def another_optimizer(out: Path, runtime: Runtime) -> None:
    """A fork of AdamW's run to LAMB and back keeps moments and step counters; one to another optimizer is refused."""
    folder = out / "another"
    for number, (name, before) in enumerate(
        (("adamw", None), ("lamb", "adamw"), ("adamw", "lamb"), ("timm:lion", "adamw"))
    ):
        engine = build(out, runtime, "3", seed=1, name=name)
        if before is not None:
            try:
                resume(engine, folder, runtime, number, (f"optim.name: {before} → {name}",))
            except ValueError as error:
                assert name == "timm:lion" and "restore optim.name" in str(error), error
                break
        states = engine.optimizer.state.values()
        assert {float(state["step"]) for state in states} == ({number} if number else set())
        train(engine, runtime, range(number, number + 1))
        save(engine, folder, runtime, number + 1)
        engine.close()
    else:
        raise AssertionError("not refused")


def main(out: Path) -> None:
    (out / "lamb").mkdir()
    (out / "lamb.json").write_text(json.dumps(measure(TRAINED, RESUMED, [2], out / "lamb")))
    for stage in STAGES:
        (out / f"zero{stage}.json").write_text(json.dumps(DEEPSPEED[stage]))
    launch(2, partial(by_name, out))
    launch(2, partial(another_optimizer, out))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
