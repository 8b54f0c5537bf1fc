"""A checkpoint goes on at another number of ranks and another ZeRO stage: the same state, bit for bit, and the same
losses afterwards. elastic_worker.py trains, saves, converts and places; here it is compared."""

import json
from pathlib import Path

import pytest
import torch

from dsmim.checkpoint.zero_shards import Shards, weights
from tests.conftest import ROOT, run
from tests.distributed.elastic_worker import KEYS, SAVED_AT, STAGES, STEPS, WORLDS, source_name, target

SOURCES = [(world, stage) for world in WORLDS for stage in STAGES]


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    run("python", Path(__file__).with_name("elastic_worker.py"), folder, PYTHONPATH=str(ROOT))
    return folder


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def assert_same_state(truth: dict, found: dict) -> None:
    """Everything but the losses, bit for bit."""
    assert truth.keys() - {"losses"} == found.keys() - {"losses", "said"}
    for name in truth.keys() - {"losses"}:
        if isinstance(truth[name], dict):
            assert truth[name].keys() == found[name].keys()
            different = [key for key, value in truth[name].items() if not torch.equal(value, found[name][key])]
            assert not different, (name, different)
        else:
            assert truth[name] == found[name], name


@pytest.mark.parametrize(("world", "stage"), SOURCES)
def test_every_checkpoint_is_read_as_it_lay_in_the_engine(out, world, stage):
    source = source_name(world, stage)
    truth, shards = load(out / "truth" / f"{source}.pt"), Shards(out / source)
    trained = truth.keys() - {"module", "steps", "counters", "losses"}
    assert (shards.stage, shards.world_size) == (int(stage), world)
    assert set(shards.names) == trained and shards.keys == ["fp32", *KEYS]
    assert shards.frozen == ["fixed.weight", "fixed.bias"] and shards.shared == {}
    assert shards.steps == dict.fromkeys(trained, SAVED_AT)
    for name in trained:
        for key in ("fp32", *KEYS):
            value = shards.tensor(name, key)
            assert value.shape == shards.shapes[name] and torch.equal(value, truth[name][key]), (name, key)
    module = truth["module"] | {"mean": truth["module"]["mean"]}
    state, average = weights(out / source), weights(out / source, "ema")
    assert state.keys() == average.keys() == module.keys()
    assert all(torch.equal(state[name], module[name]) and state[name].dtype == module[name].dtype for name in state)
    assert all(torch.equal(average[n], truth[n]["ema"] if n in trained else module[n]) for n in average)
    assert not torch.equal(average["first.weight"], state["first.weight"])


@pytest.mark.parametrize(("world", "stage"), SOURCES)
def test_it_goes_on_at_another_size_and_stage(out, world, stage):
    there, other = target(world, stage)
    assert there != world and other != stage
    source = source_name(world, stage)
    truth, found = load(out / "truth" / f"{source}.pt"), load(out / "found" / f"{source}.{other}.pt")
    assert_same_state(truth, found)
    assert found["losses"] == pytest.approx(truth["losses"], rel=2e-6) and len(truth["losses"]) == STEPS - SAVED_AT
    assert len(found["said"]) == 1 and f"{source} of {world} ranks at ZeRO stage {stage} becomes" in found["said"][0]


def test_every_size_goes_to_every_other():
    pairs = {(world, target(world, stage)[0]) for world, stage in SOURCES}
    assert pairs == {(a, b) for a in WORLDS for b in WORLDS if a != b}


def test_optimizer_in_host_memory(out):
    truth, found = (load(out / f"{name}.pt") for name in ("truth/world3_zero1", "found/world3_zero1.3_offload"))
    assert_same_state(truth, found)
    assert found["losses"] == pytest.approx(truth["losses"], rel=2e-6)
    assert found["said"] == []  # it was converted for another stage before


def test_deepspeed_s_own_loader_takes_it(out):
    """At stage 2 and one rank: see engine/scatter.py for where it does not work."""
    truth, found = (load(out / f"{name}.pt") for name in ("truth/world4_zero3", "found/world4_zero3.2_universal"))
    for name in truth.keys() - {"module", "losses", "counters", "steps"}:
        assert all(torch.equal(truth[name][key], found[name][key]) for key in ("fp32", *KEYS)), name
    assert found["steps"] == [SAVED_AT] and found["counters"] == truth["counters"]


@pytest.mark.parametrize("stage", ["2", "3"])
def test_the_format_is_deepspeed_s(out, stage):
    """Against deepspeed.checkpoint.ds_to_universal, which knows of no moving average, and at stage 3 writes flat
    tensors without a dictionary around them and no step: its loaders take both. At stage 2 it writes buffers and frozen
    parameters, too, which none of its loaders reads."""
    theirs, mine = out / f"theirs{stage}" / "zero", out / "universal" / source_name(3, stage) / "zero"
    names = Shards(out / source_name(3, stage)).names
    files = {path.relative_to(theirs) for name in names for path in (theirs / name).glob("*.pt")}
    assert len(files) == len(names) * (4 if stage == "2" else 3)
    assert files <= {path.relative_to(mine) for path in mine.rglob("*.pt")}
    for file in files:
        their, my = torch.load(theirs / file, weights_only=True), load(mine / file)
        if isinstance(their, dict):
            assert their.keys() == my.keys()
        their, my = (value["param"] if isinstance(value, dict) else value for value in (their, my))
        assert torch.equal(their.flatten(), my.flatten()), file


def test_mishaps(out):
    said = json.loads((out / "mishaps.json").read_text())
    assert len(said["after one that was killed"]) == 1 and said["second"] == []
    (error,) = said["damaged and placed"]
    assert "did not arrive as written: first.weight (fp32), first.weight (gathered); remove it" in error
    assert len(said["damaged"]) == 2 and "fp32.pt is damaged (its digest differs)" in said["damaged"][0]
    (error,) = said["other shape"]
    assert "is of another model" in error and "middle.weight: has shape [7, 7], here [8, 7]" in error
    (error,) = said["thawed"]
    assert "fixed.weight: the checkpoint has no such parameter that is trained" in error
    assert "fixed.weight: this run's model has no such frozen parameter" in error
    assert len(said["another source"]) == 1
    (error,) = said["a rank is missing"]
    assert "was written by 3 ranks and holds the optimizer files of 2" in error
    (error,) = said["unwritable"]
    assert "Not a directory" in error
