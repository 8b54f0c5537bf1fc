"""Is LAMB under ZeRO the optimizer that it is without? A small ViT takes 12 steps of dsmim's LAMB at every ZeRO stage
and number of ranks, also across checkpoints, and is compared with a plain loop on the whole batches with timm's LAMB.
Beside it: timm's LAMB handed to DeepSpeed as it is.

    python benchmarks/lamb_exactness.py           1, 2 and 3 ranks
    python benchmarks/lamb_exactness.py --quick   2 ranks

Figure: |weights - the plain loop's| / |the loop's update|. Rounding alone gives about 1e-6: an accumulated gradient is
summed in another order. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.optim import Lamb as TimmLamb

from benchmarks.exactness import (
    BATCH,
    DECAY,
    SmallViT,
    Weights,
    deepspeed_run,
    groups_of,
    launch,
    micro_batches,
    plain_step,
    preload,
    relative_error,
    weights_of,
)
from dsmim.checkpoint.resume import resume_engine
from dsmim.checkpoint.run_directory import RunDirectory
from dsmim.checkpoint.saved_layout import PARAMETER_ORDER
from dsmim.engine.runtime import Runtime
from dsmim.engine.schedule import LearningRate, resolve_schedule
from dsmim.engine.zero import Engine
from dsmim.recipe.reading import parse_recipe

STEPS, SAVED_AT, ACCUMULATION, CLIP = 12, 6, 2, 0.5
SMALL = 1500
"""Elements of a sub-group: the model has several of them."""
ZERO: dict[str, dict[str, Any]] = {
    "0": {"stage": 0},
    "1": {"stage": 1, "round_robin_gradients": True},
    "2": {"stage": 2},
    "3": {"stage": 3, "sub_group_size": SMALL, "stage3_param_persistence_threshold": 20},
    "1-offload": {"stage": 1, "offload_optimizer": {"device": "cpu"}},
    "2-round-robin": {"stage": 2, "round_robin_gradients": True},
    "3-offload": {"stage": 3, "sub_group_size": SMALL, "offload_optimizer": {"device": "cpu"}},
}
FORKED = ("cls_token", "pos_embed", "head.weight")
"""What a fork leaves without weight decay: head.weight changes its group and keeps its moments."""


class Case(NamedTuple):
    """One row: how it is trained, and from which checkpoint it begins (None: from the first weights)."""

    ranks: int
    zero: str
    source: str | None = None
    """Name of the folder that the checkpoint is in."""
    forked: bool = False
    precision: str = "fp32"

    def __str__(self) -> str:
        start = f", resumed from {self.source}" if self.source else ""
        bf16, forked = ", bf16" * (self.precision == "bf16"), ", forked" * self.forked
        return f"{self.ranks} ranks, ZeRO-{self.zero}{bf16}{start}{forked}"


def folder_name(ranks: int, zero: str) -> str:
    """Return the name of a checkpoint's folder."""
    return f"{ranks}-ranks-zero-{zero}"


def trained(worlds: list[int]) -> list[Case]:
    """Return the runs from the first weights; those of "0" to "3" save a checkpoint."""
    cases = [Case(ranks, zero) for ranks in worlds for zero in ("0", "1", "2", "3")]
    extra = ("1-offload", "2-round-robin", "3-offload")
    return cases + [Case(2, zero) for zero in extra] + [Case(2, zero, precision="bf16") for zero in ("0", "3")]


def resumed(worlds: list[int]) -> list[Case]:
    """Return the runs from a checkpoint: as it was saved; with the next stage and number of ranks; forked."""
    cases = []
    for number, ranks in enumerate(worlds):
        there = worlds[(number + 1) % len(worlds)]
        for zero in ("0", "1", "2", "3"):
            cases.append(Case(there, str((int(zero) + 1) % 4), folder_name(ranks, zero)))
            if ranks == 2:
                cases.append(Case(2, zero, folder_name(2, zero)))
                cases.append(Case(2, zero, folder_name(2, zero), forked=True))
    return cases


def settings(case: Case, out: Path) -> Any:
    """Return the recipe of a case. Its task and model are not used."""
    file = out / f"zero-{case.zero}.json"
    tree = {
        "name": "lamb",
        "task": {"name": "simmim"},
        "model": {"name": "swinv2_nano", "img_size": 32, "window_size": 4},
        "batch": {"global_batch": BATCH},
        "optim": {"name": "lamb", "lr": 4e-3, "weight_decay": DECAY, "clip_grad": CLIP}
        | ({"no_decay": [f"*{name}" for name in FORKED]} if case.forked else {}),
        "schedule": {"duration": {"steps": STEPS}, "warmup": {"steps": 2}, "min_lr": 1e-5},
        "engine": {"deepspeed": str(file), "precision": case.precision},
    }
    return parse_recipe(tree, "lamb")


def rate_of(recipe: Any) -> LearningRate:
    """Return the schedule."""
    return resolve_schedule(recipe.schedule, recipe.optim, BATCH, 1000)


def build_engine(case: Case, out: Path, runtime: Runtime) -> Engine:
    """Return dsmim's engine for the small ViT. Collective."""
    recipe, model = settings(case, out), SmallViT()
    layers = dict.fromkeys(dict(model.named_parameters()), 0)
    return Engine(model, layers, recipe, runtime, ACCUMULATION, rate_of(recipe), model.modules())


def train(engine: Engine, runtime: Runtime, steps: range) -> None:
    """Take steps. Collective."""
    for step in steps:
        for images, labels in micro_batches(step, runtime, ACCUMULATION):
            engine.backward(engine(images, labels))
        assert engine.step(step).applied


def run_case(case: Case, wanted: dict[bool, Weights], out: Path, runtime: Runtime) -> None:
    """Train one case, compare it, and write what was found. Collective."""
    engine = build_engine(case, out, runtime)
    if case.source is None:
        train(engine, runtime, range(SAVED_AT))
        if case.precision == "fp32" and case.zero in ("0", "1", "2", "3"):
            save(engine, out / folder_name(case.ranks, case.zero), runtime)
    else:
        resume(engine, out / case.source, runtime)
        counts = {float(state["step"]) for state in engine.optimizer.state.values()}
        assert counts == {SAVED_AT}, f"{case}: step counters {counts}"
    train(engine, runtime, range(SAVED_AT, STEPS))
    error = relative_error(weights_of(engine.module, engine.stage == 3), wanted[case.forked])
    engine.close()
    if runtime.is_rank_zero:
        print(f"{case}: {error:.1e}", flush=True)
        with (out / "found.jsonl").open("a") as file:
            file.write(json.dumps({"case": str(case), **case._asdict(), "error": error}) + "\n")


def save(engine: Engine, run: Path, runtime: Runtime, step: int = SAVED_AT) -> None:
    """Write a checkpoint as a run does, as far as a resume reads it. Collective."""
    folder = run / f"checkpoints/step_{step:08d}"
    engine.save_checkpoint(folder)
    runtime.gather(engine.writer.entries())  # waits until the files of all ranks are on disk
    if runtime.is_rank_zero:
        names = [list(group.names) for group in engine.groups]
        state = {PARAMETER_ORDER: names, "zero_stage": engine.stage, "world_size": runtime.world_size, "step": step}
        (folder / "state.json").write_text(json.dumps(state))
        (folder / "manifest.json").write_text(json.dumps({"files": {}}))


def resume(engine: Engine, run: Path, runtime: Runtime, step: int = SAVED_AT, changes: tuple[str, ...] = ()) -> None:
    """Load a checkpoint of `save`. changes: see RunDirectory. Collective."""
    found = run / f"checkpoints/step_{step:08d}"
    directory = RunDirectory(run, found, json.loads((found / "state.json").read_text()), changes=list(changes))
    resume_engine(directory, engine, runtime, lambda line: None)


def naive(ranks: int, wanted: Weights, out: Path, runtime: Runtime) -> None:
    """Measure timm's LAMB handed to DeepSpeed. Collective."""
    rate = rate_of(settings(Case(ranks, "0"), out)).at
    for zero in ("0", "1", "2", "3"):
        weights = deepspeed_run(timm_lamb, STEPS, CLIP, rate, ZERO[zero], runtime, ACCUMULATION)
        if runtime.is_rank_zero:
            with (out / "naive.jsonl").open("a") as file:
                entry = {"ranks": ranks, "zero": zero, "error": relative_error(weights, wanted)}
                file.write(json.dumps(entry) + "\n")


def timm_lamb(groups: list[dict[str, Any]]) -> TimmLamb:
    """Return timm's LAMB with the arguments of facebookresearch/deit; gradients are clipped outside of it."""
    return TimmLamb(groups, lr=0.0, eps=1e-8, max_grad_norm=None)


def plain(out: Path, runtime: Runtime) -> None:
    """Write the weights of the plain loop, and of one whose groups change as those of the forks."""
    rate = rate_of(settings(Case(1, "0"), out)).at
    for forked in (False, True):
        model = SmallViT()
        optimizer = timm_lamb(groups_of(model))
        for step in range(STEPS):
            if forked and step == SAVED_AT:
                for group, new in zip(optimizer.param_groups, groups_of(model, FORKED), strict=True):
                    group["params"] = new["params"]
            plain_step(model, optimizer, step, CLIP, rate)
        torch.save(weights_of(model), out / f"plain-{forked}.pt")


def work(cases: list[Case], out: Path, naive_too: bool, runtime: Runtime) -> None:
    """Run the cases of one world size. Collective."""
    wanted = {forked: torch.load(out / f"plain-{forked}.pt") for forked in (False, True)}
    for case in cases:
        run_case(case, wanted, out, runtime)
    if naive_too:
        naive(runtime.world_size, wanted[False], out, runtime)


def measure(first: list[Case], then: list[Case], naive_on: list[int], out: Path) -> dict[str, Any]:
    """Run cases from the first weights, then cases from the checkpoints of the former. Return the figures: `cases`, and
    `naive` by stage on these numbers of ranks."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    preload()
    for name, zero in ZERO.items():
        offload = {"zero_force_ds_cpu_optimizer": False} if "offload_optimizer" in zero else {}
        (out / f"zero-{name}.json").write_text(json.dumps({"zero_optimization": zero} | offload))
    launch(1, partial(plain, out))
    for cases, ranks_of_naive in ((first, naive_on), (then, [])):
        for ranks in sorted({case.ranks for case in cases}):
            own = [case for case in cases if case.ranks == ranks]
            launch(ranks, partial(work, own, out, ranks in ranks_of_naive))
    return {name: [json.loads(line) for line in (out / f"{file}.jsonl").read_text().splitlines()]
            for name, file in (("cases", "found"), ("naive", "naive"))}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only 2 ranks")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        worlds = [2] if options.quick else [1, 2, 3]
        found = measure(trained(worlds), resumed(worlds), worlds, Path(folder))
    handed = {(row["ranks"], row["zero"]): row["error"] for row in found["naive"]}
    print(f"\n{'':60} {'dsmim':>9} {'timm as it is':>14}")
    for row in found["cases"]:
        other = (
            handed.get((row["ranks"], row["zero"])) if row["source"] is None and row["precision"] == "fp32" else None
        )
        print(f"{row['case']:60} {row['error']:9.1e} {'' if other is None else format(other, '14.1e')}")
    exact = [row["error"] for row in found["cases"] if row["precision"] == "fp32"]
    naive_errors = [row["error"] for row in found["naive"] if row["zero"] != "0"]
    print(json.dumps({"max_relative_error": max(exact), "naive_max_relative_error": max(naive_errors), **found}))


if __name__ == "__main__":
    main()
