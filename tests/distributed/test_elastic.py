"""A run resumes with another number of ranks and another ZeRO stage: its state is the same bit for bit, and its next
losses agree. elastic_worker.py trains, saves, converts and loads; the tests here compare what it wrote."""

import json
from pathlib import Path

import pytest
import torch

from dsmim.checkpoint.zero_shards import ZeroShards, read_weights
from dsmim.log import counted
from tests.conftest import ROOT, run
from tests.distributed import fork_worker
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
def test_every_checkpoint_is_read_as_it_was_in_the_engine(out, world, stage):
    source = source_name(world, stage)
    truth, shards = load(out / "truth" / f"{source}.pt"), ZeroShards(out / source)
    trained = truth.keys() - {"module", "steps", "counters", "losses"}
    assert (shards.stage, shards.world_size) == (int(stage), world)
    assert set(shards.names) == trained and shards.keys == ["fp32", *KEYS]
    assert shards.frozen == ["fixed.weight", "fixed.bias"] and shards.shared == {}
    assert {name: float(found["step"]) for name, found in shards.scalars.items()} == dict.fromkeys(trained, SAVED_AT)
    for name in trained:
        for key in ("fp32", *KEYS):
            value = shards.tensor(name, key)
            assert value.shape == shards.shapes[name] and torch.equal(value, truth[name][key]), (name, key)
    module = truth["module"] | {"mean": truth["module"]["mean"]}
    state, average = read_weights(out / source), read_weights(out / source, "ema")
    assert state.keys() == average.keys() == module.keys()
    assert all(torch.equal(state[name], module[name]) and state[name].dtype == module[name].dtype for name in state)
    assert all(torch.equal(average[n], truth[n]["ema"] if n in trained else module[n]) for n in average)
    assert not torch.equal(average["first.weight"], state["first.weight"])


@pytest.mark.parametrize(("world", "stage"), SOURCES)
def test_a_run_resumes_with_another_size_and_stage(out, world, stage):
    there, other = target(world, stage)
    assert there != world and other != stage
    source = source_name(world, stage)
    truth, found = load(out / "truth" / f"{source}.pt"), load(out / "found" / f"{source}.{other}.pt")
    assert_same_state(truth, found)
    assert found["losses"] == pytest.approx(truth["losses"], rel=2e-6) and len(truth["losses"]) == STEPS - SAVED_AT
    (said,) = found["said"]
    assert said.startswith(f"converting {source} of {counted(world, 'rank')} at ZeRO stage {stage} to ")


def test_every_size_resumes_with_every_other():
    pairs = {(world, target(world, stage)[0]) for world, stage in SOURCES}
    assert pairs == {(a, b) for a in WORLDS for b in WORLDS if a != b}


def test_optimizer_in_host_memory(out):
    truth, found = (load(out / f"{name}.pt") for name in ("truth/world3_zero1", "found/world3_zero1.3_offload"))
    assert_same_state(truth, found)
    assert found["losses"] == pytest.approx(truth["losses"], rel=2e-6)
    assert found["said"] == []  # another test's engine has converted it before


def test_deepspeed_s_own_loader_reads_it(out):
    """At stage 2 and one rank: checkpoint/universal_loading.py says where it does not work."""
    truth, found = (load(out / f"{name}.pt") for name in ("truth/world4_zero3", "found/world4_zero3.2_universal"))
    for name in truth.keys() - {"module", "losses", "counters", "steps"}:
        assert all(torch.equal(truth[name][key], found[name][key]) for key in ("fp32", *KEYS)), name
    assert found["steps"] == [SAVED_AT] and found["counters"] == truth["counters"]


@pytest.mark.parametrize("stage", ["2", "3"])
def test_the_format_is_deepspeed_s(out, stage):
    """Compared with deepspeed.checkpoint.ds_to_universal. That does not write the moving average. At stage 3 it writes
    flat tensors without a dictionary around them, and no step: its loaders read both forms. At stage 2 it also writes
    buffers and frozen parameters, which none of its loaders reads."""
    theirs, ours = out / f"theirs{stage}" / "zero", out / "universal" / source_name(3, stage) / "zero"
    names = ZeroShards(out / source_name(3, stage)).names
    files = {path.relative_to(theirs) for name in names for path in (theirs / name).glob("*.pt")}
    assert len(files) == len(names) * (4 if stage == "2" else 3)
    assert files <= {path.relative_to(ours) for path in ours.rglob("*.pt")}
    for file in files:
        their, our = torch.load(theirs / file, weights_only=True), load(ours / file)
        if isinstance(their, dict):
            assert their.keys() == our.keys()
        their, our = (value["param"] if isinstance(value, dict) else value for value in (their, our))
        assert torch.equal(their.flatten(), our.flatten()), file


def test_errors(out):
    said = json.loads((out / "errors.json").read_text())
    assert len(said["after one that was killed"]) == 1 and said["second"] == []
    (error,) = said["damaged and loaded"]
    assert "differ after loading: first.weight (fp32), first.weight (gathered); remove that folder" in error
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


@pytest.fixture(scope="module")
def forks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("forks")
    run("python", fork_worker.__file__, folder, PYTHONPATH=str(ROOT))
    return folder


@pytest.mark.parametrize(("stage", "fork"), fork_worker.VARIANTS)
def test_a_fork_loads_every_tensor_by_its_name(forks, stage, fork):
    """Parameter groups, the order of modules, or the cuts of the flat tensors differ from the checkpoint's."""
    truth, found = load(forks / f"truth/{stage}.pt"), load(forks / f"found/{stage}.{fork}.pt")
    if fork == "cut" and stage != "3":  # DeepSpeed's getters read wrong places with round_robin_gradients
        truth, found = ({k: both[k] for k in ("module", "losses")} | extra for both, extra in
                        ((truth, {}), (found, {"said": found["said"]})))  # fmt: skip
    assert_same_state(truth, found)
    if fork in ("same", "modules", "cut"):  # others change the rates or the decay of the next steps
        assert found["losses"] == pytest.approx(truth["losses"], rel=2e-6)
    by_name = [line for line in found["said"] if "in other groups or another order: it is loaded by name" in line]
    assert len(by_name) == (fork != "same")


@pytest.mark.parametrize("stage", fork_worker.CUTS)
def test_weights_are_read_however_the_flat_tensors_are_cut(forks, stage):
    module, found = load(forks / f"truth/{stage}.pt")["module"], read_weights(forks / "cut" / stage)
    assert module.keys() == found.keys() and all(torch.equal(module[name], found[name]) for name in module)


@pytest.mark.parametrize("stage", STAGES)
def test_weights_of_another_model_are_refused_by_key(forks, stage):
    errors = json.loads((forks / f"errors{stage}.json").read_text())
    for error in errors.values():
        assert f"step_{SAVED_AT:08d}: its weights do not fit the model" in error
        assert "middle.weight: has shape [7, 7], here [8, 7]" in error and f"model.weights={forks}/run{stage}" in error
    assert "these keys differ:\n  model.img_size: 32 → 64\nTensors" in errors["keys"]
    assert "Give these keys their old values, or start a new run" in errors["keys"]
    assert "this installation builds from the same recipe" in errors["no key"] and "optim.lr" not in errors["no key"]
