"""Trains a small model under every ZeRO stage on 1 to 4 ranks, saves, and resumes with other stages and world sizes.

Usage: elastic_worker.py OUT. The ranks of one world size are forks of this process, which has imported everything: 12
launches would take minutes. It writes

    OUT/SOURCE                    a checkpoint, see `source_name`
    OUT/truth/SOURCE.pt           the engine's state when it saved, from DeepSpeed's own getters, and the next losses
    OUT/universal/SOURCE          the converted checkpoint
    OUT/found/SOURCE.TARGET.pt    state and losses of the engine that loaded it
    OUT/errors.json               the messages when something is wrong
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dsmim.checkpoint.saved_layout import PARAMETER_ORDER
from dsmim.checkpoint.universal import convert
from dsmim.checkpoint.universal_loading import load_universal
from dsmim.cluster.placement import free_port
from dsmim.engine.runtime import Runtime, start, stop
from dsmim.engine.schedule import resolve_schedule
from dsmim.engine.zero import Engine
from dsmim.recipe.reading import parse_recipe

WORLDS = (1, 2, 3, 4)
SAVED_AT, STEPS, BATCH = 3, 6, 12
KEYS = ("exp_avg", "exp_avg_sq", "ema")
DEEPSPEED: dict[str, dict[str, Any]] = {
    "0": {"zero_optimization": {"stage": 0}},
    "1": {"zero_optimization": {"stage": 1}},
    "2": {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
    # Some parameters stay gathered, some do not; a group has several sub-groups.
    "3": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 20, "sub_group_size": 70}},
    "3_offload": {
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
        "zero_force_ds_cpu_optimizer": False,
    },
    "2_universal": {"zero_optimization": {"stage": 2}, "checkpoint": {"load_universal": True}},
}
# What deepspeed.initialize imports: without this, 2 s in each fork.
PRELOADED = (
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch._inductor.compile_fx",
)
STAGES = ("0", "1", "2", "3")


def source_name(world: int, stage: str) -> str:
    return f"world{world}_zero{stage}"


def target(world: int, stage: str) -> tuple[int, str]:
    """Where a checkpoint is resumed: from every world size with every other, from every stage with the next."""
    number = int(stage)
    return (world + number % 3) % 4 + 1, STAGES[(number + 1) % 4]


def recipe(out: Path, stage: str, **optim):
    tree = {
        "name": "elastic",
        "task": {"name": "simmim"},
        "model": {"name": "swinv2_nano", "img_size": 32, "window_size": 4},
        "batch": {"global_batch": BATCH},
        "optim": {"lr": 1e-2, "layer_decay": 0.5, "clip_grad": 0.5, "ema_decay": 0.9} | optim,
        "schedule": {"duration": {"steps": STEPS}, "warmup": {"steps": 2}},
        "engine": {"deepspeed": str(out / f"zero{stage}.json"), "precision": "fp32"},
    }
    return parse_recipe(tree, "elastic")


class Odd(nn.Module):
    """A model with sizes that 2 and 3 ranks do not divide, one of them smaller than both; a parameter that is never
    used; a frozen layer; buffers that are saved and one that is not."""

    def __init__(self, seed: int, width: int = 7):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.middle, self.last = nn.Linear(5, 7), nn.Linear(7, width), nn.Linear(7, 5)
        self.fixed = nn.Linear(width, 7).requires_grad_(False)
        self.scale, self.idle = nn.Parameter(torch.rand(1, 1)), nn.Parameter(torch.rand(3))
        self.register_buffer("mean", torch.randn(5))
        self.register_buffer("count", torch.tensor(seed))
        self.register_buffer("ones", torch.ones(7), persistent=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(inputs - self.mean)) * self.ones
        hidden = torch.tanh(self.fixed(self.middle(hidden)))
        return (self.last(hidden) * self.scale - inputs).square().mean()


def build(out: Path, runtime: Runtime, stage: str, seed: int, model: nn.Module | None = None, **optim: Any) -> Engine:
    settings, model = recipe(out, stage, **optim), model or Odd(seed)
    layers = {name: ("first", "scale", "idle", "middle", "fixed", "last").index(name.split(".")[0]) for name, _ in
              model.named_parameters()}  # fmt: skip
    rate = resolve_schedule(settings.schedule, settings.optim, BATCH, 1000)
    return Engine(model, layers, settings, runtime, 1, rate, model.modules())


def train(engine: Engine, runtime: Runtime, steps: range) -> list[float]:
    losses = []
    for step in steps:
        inputs = torch.randn(BATCH, 5, generator=torch.Generator().manual_seed(step))
        loss = engine(inputs.chunk(runtime.world_size)[runtime.rank])
        engine.backward(loss)
        losses.append(runtime.sum(loss.detach().double() / runtime.world_size).item())
        engine.step(step)
    return losses


def everything(engine: Engine) -> dict[str, Any]:
    """The whole state that a checkpoint must hold, on every rank, read without the code under test."""
    import deepspeed

    if engine.stage in (1, 2):
        engine.deepspeed.optimizer._hp_optimizer_states_linked = False  # else its getters read an old state
        engine.deepspeed.optimizer._lazy_init_hp_params_optimizer_state()
    trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    found: dict[str, Any] = {name: {"fp32": whole(engine, p, None)} for name, p in trained.items()}
    for name, parameter in trained.items():
        found[name] |= {key: whole(engine, parameter, key) for key in KEYS}
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=engine.stage == 3):
        found["module"] = {name: value.clone() for name, value in engine.module.state_dict().items()}
    found["steps"] = sorted({float(state["step"]) for state in engine.optimizer.state.values()})
    counters = [state["step"].data_ptr() for state in engine.optimizer.state.values()]
    assert len(set(counters)) == len(counters), "a step counter is shared"
    found["counters"] = [engine.deepspeed.global_steps, engine.deepspeed.global_samples, engine.deepspeed.skipped_steps]
    return found


def whole(engine: Engine, parameter: nn.Parameter, key: str | None) -> torch.Tensor:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if engine.stage == 0:
        return (parameter if key is None else engine.optimizer.state[parameter][key]).detach().clone()
    value = safe_get_full_optimizer_state(parameter, key) if key else safe_get_full_fp32_param(parameter)
    return value.detach().clone()


def save(out: Path, runtime: Runtime) -> None:
    for stage in STAGES:
        name = source_name(runtime.world_size, stage)
        engine = build(out, runtime, stage, seed=1)
        train(engine, runtime, range(SAVED_AT))
        truth = everything(engine)
        engine.save_checkpoint(out / name)
        runtime.gather(engine.writer.entries())  # waits until the files of all ranks are on disk
        if runtime.is_rank_zero:
            names = [list(group.names) for group in engine.groups]
            (out / name / "state.json").write_text(json.dumps({PARAMETER_ORDER: names}))
            (out / name / "manifest.json").write_text(json.dumps({"files": {}, "made_of": name}))
        truth["losses"] = train(engine, runtime, range(SAVED_AT, STEPS))
        report(out / "truth" / f"{name}.pt", truth, runtime)
        engine.close()


def resume(out: Path, runtime: Runtime) -> None:
    for world in WORLDS:
        for stage in STAGES:
            there, other = target(world, stage)
            if there == runtime.world_size:
                resume_from(out, runtime, source_name(world, stage), other)
    if runtime.world_size == 1:
        resume_from(out, runtime, source_name(4, "3"), "2_universal")
        (out / "errors.json").write_text(json.dumps(errors(out, runtime)))
    if runtime.world_size == 2:
        resume_from(out, runtime, source_name(3, "1"), "3_offload")


def resume_from(out: Path, runtime: Runtime, source: str, stage: str) -> None:
    engine = build(out, runtime, stage, seed=2)
    universal, said = out / "universal" / source, []
    convert(out / source, universal, runtime, said.append)
    groups = [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups]
    if stage == "2_universal":
        path, _ = engine.deepspeed.load_checkpoint(str(universal.parent), tag=source)
        assert path is not None
    else:
        load_universal(universal, engine, runtime)
        after = [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups]
        assert groups == after, "the groups' settings changed"
    found = everything(engine)
    found["losses"] = train(engine, runtime, range(SAVED_AT, STEPS))
    found["said"] = said
    report(out / "found" / f"{source}.{stage}.pt", found, runtime)
    engine.close()


def errors(out: Path, runtime: Runtime) -> dict[str, list[str]]:
    """The messages when a conversion is not the first, or something is wrong."""
    source, universal = out / source_name(3, "2"), out / "universal" / "errors"
    said: dict[str, list[str]] = {}

    def attempt(name: str, action: Callable[[list[str]], None]) -> None:
        try:
            action(said.setdefault(name, []))
        except ValueError as error:
            said[name].append(f"error: {error}")

    def convert_again(said: list[str]) -> None:
        convert(source, universal, runtime, said.append)

    def load_into(model: nn.Module) -> Callable[[list[str]], None]:
        return lambda said: load_universal(universal, build(out, runtime, "1", 3, model), runtime)

    (left := universal.with_name(".partial_errors") / "zero" / "left").mkdir(parents=True)
    attempt("after one that was killed", convert_again)
    assert not left.exists() and not (universal / "zero" / "left").exists()
    times = {path: path.stat().st_mtime_ns for path in universal.rglob("*.pt")}
    attempt("second", convert_again)
    assert times == {path: path.stat().st_mtime_ns for path in universal.rglob("*.pt")}
    flip(universal / "zero" / "first.weight" / "fp32.pt")
    attempt("damaged and loaded", load_into(Odd(2)))
    attempt("damaged", convert_again)
    attempt("other shape", load_into(Odd(2, width=8)))
    attempt("thawed", load_into(Odd(2).requires_grad_(True)))
    (source / "manifest.json").write_text(json.dumps({"files": {}, "made_of": "the same step, trained again"}))
    attempt("another source", convert_again)
    (source / "zero_pp_rank_1_mp_rank_00_optim_states.pt").rename(source / "away")
    (universal / "manifest.json").unlink()
    attempt("a rank is missing", convert_again)
    (source / "away").rename(source / "zero_pp_rank_1_mp_rank_00_optim_states.pt")
    universal = out / "zero1.json" / "universal"  # below a file
    attempt("unwritable", convert_again)
    return said


def flip(path: Path) -> None:
    """Change one weight, in the middle of the file's tensor."""
    whole = torch.load(path)["param"]
    data, value = bytearray(path.read_bytes()), whole.flatten()[17].numpy().tobytes()
    data[data.index(value)] ^= 1
    path.write_bytes(data)


def report(path: Path, found: dict[str, Any], runtime: Runtime) -> None:
    if runtime.is_rank_zero:
        path.parent.mkdir(exist_ok=True)
        torch.save(found, path)
        print(path, flush=True)  # the launch's deadline follows what it prints


def launch(out: Path, world: int, action: Callable[[Path, Runtime], None]) -> None:
    """Run `world` ranks, each a fork of this process with the environment that torchrun would set."""
    port = str(free_port())
    ranks = [multiprocessing.get_context("fork").Process(target=be_rank, args=(out, world, r, port, action)) for r in
             range(world)]  # fmt: skip
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert all(rank.exitcode == 0 for rank in ranks), (world, action, [rank.exitcode for rank in ranks])


def be_rank(out: Path, world: int, rank: int, port: str, action: Callable[[Path, Runtime], None]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    action(out, start())
    stop()


def main(out: Path) -> None:
    for stage, settings in DEEPSPEED.items():
        (out / f"zero{stage}.json").write_text(json.dumps(settings))
    for module in PRELOADED:
        importlib.import_module(module)
    for action in (save, resume):
        for world in WORLDS:
            launch(out, world, action)
    from deepspeed.checkpoint import ds_to_universal

    for stage in ("2", "3"):
        source, theirs = out / source_name(3, stage), out / f"theirs{stage}"
        ds_to_universal.main(
            Namespace(
                input_folder=str(source), output_folder=str(theirs), num_extract_workers=1, num_merge_workers=1,
                keep_temp_folder=False, strict=True, inject_missing_state=True,
            )
        )  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
