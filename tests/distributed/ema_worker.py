"""Trains with a moving average of the weights that the validation measures too. torchrun starts it on two ranks.

Usage: ema_worker.py OUT SHARDS. Whole runs with and without validation.ema are in OUT/STAGE-{with,without}; what the
engine does at each stage is checked here.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from dsmim.engine.runtime import Runtime, joined
from dsmim.engine.zero import Engine
from dsmim.evaluate import evaluate
from dsmim.recipe.reading import parse_recipe
from dsmim.train import fit
from tests.conftest import tiny_recipe
from tests.distributed.elastic_worker import BATCH, DEEPSPEED, Odd, build, everything, train

STAGES = ("zero0", "zero3")
DECAY = {"lr": 1e-2, "layer_decay": 0.9, "ema_decay": 0.9}


def run_recipe(shards: Path, stage: str, measured: bool):
    changes = {
        "task": {"name": "classify", "num_classes": 3, "loss": "bce", "mixup": 0.8},
        "optim": DECAY | {"ema_warmup": True},
        "engine": {"deepspeed": stage},
        "validation": {"every": {"steps": 2}, "ema": measured},
        "schedule": {"duration": {"steps": 4}, "warmup": {"steps": 1}},
    }
    if measured:
        changes["checkpoint"] = {"every": {"steps": 4}, "keep_best": {"metric": "ema_accuracy", "mode": "max"}}
    return parse_recipe(tiny_recipe(shards, **changes), "tiny")


def whole_runs(out: Path, shards: Path) -> None:
    for stage in STAGES:
        for measured in (True, False):
            folder = out / f"{stage}-{'with' if measured else 'without'}"
            assert fit(run_recipe(shards, stage, measured), folder)
            print("trained", folder, flush=True)  # the launch's deadline follows what it prints
        figures = evaluate(out / f"{stage}-with/checkpoints/step_00000004", [], "ema")
        if os.environ["RANK"] == "0":
            (out / f"{stage}-figures.json").write_text(json.dumps(figures))


def same(one: dict, other: dict) -> bool:
    flat = [{(name, key): value for name, values in state.items() if isinstance(values, dict) for key, value in
             values.items()} for state in (one, other)]  # fmt: skip
    return flat[0].keys() == flat[1].keys() and all(torch.equal(value, flat[1][key]) for key, value in flat[0].items())


def loss_of(engine: Engine, runtime: Runtime) -> float:
    inputs = torch.randn(BATCH, 5, generator=torch.Generator().manual_seed(99))
    engine.eval()
    with torch.no_grad():
        loss = engine(inputs.chunk(runtime.world_size)[runtime.rank]).double() / runtime.world_size
    engine.train()
    return runtime.sum(loss).item()


def each_stage(out: Path, runtime: Runtime) -> None:
    """Within `averaged` the forward pass uses the average; afterwards every bit is as before, and so are the next
    steps."""
    for stage in ("0", "1", "2", "3", "3_offload"):
        undisturbed, engine = (build(out, runtime, stage, seed=1, **DECAY) for _ in range(2))
        with engine.averaged():
            first = loss_of(engine, runtime)
        assert first == loss_of(engine, runtime), stage  # no step, no average: the weights
        losses = train(undisturbed, runtime, range(3))
        assert train(engine, runtime, range(3)) == losses
        before, plain = everything(engine), loss_of(engine, runtime)
        with engine.averaged():
            averaged = loss_of(engine, runtime)
        assert same(before, everything(engine)) and loss_of(engine, runtime) == plain, stage
        model = Odd(1)
        model.load_state_dict(
            before["module"] | {name: state["ema"] for name, state in before.items() if "ema" in state}
        )
        inputs = torch.randn(BATCH, 5, generator=torch.Generator().manual_seed(99))
        expected = sum(model(half).item() for half in inputs.chunk(runtime.world_size)) / runtime.world_size
        assert abs(averaged - expected) < 1e-6 < abs(averaged - plain), (stage, averaged, expected, plain)
        assert train(engine, runtime, range(3, 6)) == train(undisturbed, runtime, range(3, 6)), stage
        assert same(everything(engine), everything(undisturbed)), stage
        for one in (engine, undisturbed):
            one.close()
        print("engine, stage", stage, flush=True)


def main(out: Path, shards: Path) -> None:
    for stage, settings in DEEPSPEED.items() if os.environ["RANK"] == "0" else ():
        (out / f"zero{stage}.json").write_text(json.dumps(settings))
    whole_runs(out, shards)
    with joined() as runtime:
        each_stage(out, runtime)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
