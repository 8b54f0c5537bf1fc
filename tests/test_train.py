"""`fit` as a notebook calls it: several times in one process, with errors and interruptions in between."""

import json

import pytest
import torch

from benchmarks.kill_resume_compare import stream
from dsmim.checkpoint.reading import locate
from dsmim.checkpoint.zero_shards import read_weights
from tests.conftest import dsmim, run, tiny_recipe

NOTEBOOK = """
import gc, os, signal, sys, threading, time
from pathlib import Path
import psutil, torch
from deepspeed.runtime.engine import DeepSpeedEngine
from dsmim.recipe.reading import parse_recipe
from dsmim.train import fit
import json

folder, recipe = Path(sys.argv[1]), json.loads(sys.argv[2])

def tiny(stage, **changes):
    return parse_recipe(recipe | changes | {"engine": {"deepspeed": stage}}, "tiny")

def environment():
    return {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}

def interrupt_when(path):
    while not path.exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)

def left():
    # Return how many tensors and descriptors there are, after checking that nothing keeps an engine.
    gc.collect()
    objects = gc.get_objects()
    assert not [one for one in objects if type(one) is DeepSpeedEngine], "an engine is still in memory"
    return sum(isinstance(one, torch.Tensor) for one in objects), len(os.listdir("/proc/self/fd"))

before, after = environment(), []
for name, stage in [("first", "zero3"), ("second", "zero3"), ("third", "zero0"), ("fourth", "zero1")]:
    assert fit(tiny(stage), folder / name)
    assert environment() == before
    after.append(left())
for tensors, descriptors in after:
    assert (tensors, descriptors) == after[0], after

try:
    fit(tiny("zero3", seed=1), folder / "first")
    raise SystemExit("another recipe was accepted")
except ValueError as error:
    assert "seed" in str(error), error
assert fit(tiny("zero3"), folder / "first")  # neither lock nor process group is left behind

checkpoint = folder / "stopped/checkpoints/step_00000002"
changes = {"data": recipe["data"] | {"workers": 1}, "checkpoint": recipe["checkpoint"] | {"background": True}}
threading.Thread(target=interrupt_when, args=[checkpoint]).start()
try:
    fit(tiny("zero3", **changes), folder / "stopped")
    raise SystemExit("was not interrupted")
except KeyboardInterrupt as held:  # a notebook keeps the last error, and with it all that its traceback names
    assert not psutil.Process().children(), "data workers are still running"
    opened = {file.path for file in psutil.Process().open_files()}
    assert not [path for path in opened if path.endswith((".tar", ".jsonl"))], opened
    assert not [thread for thread in threading.enumerate() if "checkpoint" in thread.name], "the writer is running"
assert left() == after[0], (left(), after)
assert fit(tiny("zero3", **changes), folder / "stopped")
assert environment() == before
assert left() == after[0], (left(), after)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory, shards):
    folder = tmp_path_factory.mktemp("runs")
    recipe = json.dumps(tiny_recipe(shards, log={"every": 4, "tensorboard": False}))
    run("python", "-c", NOTEBOOK, folder, recipe)
    (folder / "recipe.yaml").write_text(recipe)  # JSON is YAML
    dsmim("train", folder / "recipe.yaml", "--run-dir", folder / "alone", "engine.deepspeed=zero3")
    return folder


@pytest.mark.parametrize("name", ["first", "second", "stopped"])
def test_each_run_equals_the_one_of_a_process_of_its_own(runs, name):
    one, other = (read_weights(locate(runs / run)) for run in (name, "alone"))
    assert one.keys() == other.keys() and len(one) > 100
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_another_stage_in_the_same_process_takes_the_same_steps(runs):
    losses = [
        [json.loads(line)["loss"] for line in (runs / name / "metrics.jsonl").read_text().splitlines() if "lr" in line]
        for name in ("third", "alone")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=2e-6) and len(losses[0]) == 2


def test_a_run_stopped_between_two_lines_of_the_log_writes_the_same_lines(runs):
    found = [stream(runs / name / "metrics.jsonl") for name in ("stopped", "alone")]
    assert found[0] == found[1] and [line["step"] for line in found[0]] == [3, 4, 6, 6]
    state = json.loads((runs / "alone/checkpoints/step_00000002/state.json").read_text())
    assert state["interval"]["applied"] == 2 and state["interval"]["skipped"] == 0
