"""Run directories that older code wrote are resumed."""

import shutil
import subprocess

import pytest

from dsmim.cli.main import main
from tests.conftest import ROOT, dsmim, tiny_recipe, two_forked_ranks, two_ranks
from tests.distributed.runs import assert_same_bytes, metrics, write_recipe

BEFORE_THE_PACKAGES = "888806cf72a340da69c5c78831751b0b5041e9e3"
"""The last commit whose modules were in three flat packages."""


@pytest.fixture(scope="module")
def old_code(tmp_path_factory):
    """The package as that commit has it, out of this repository's history."""
    folder = tmp_path_factory.mktemp("old_code")
    archive = subprocess.run(
        ["git", "-C", ROOT, "archive", BEFORE_THE_PACKAGES, "dsmim", "ds_configs", "slurm"], capture_output=True
    )
    if archive.returncode:
        pytest.skip(f"this checkout has no history: {archive.stderr.decode().strip()}")
    subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
    assert (folder / "dsmim/engine/checkpoint.py").is_file()
    return folder


@pytest.fixture(scope="module")
def old_run(old_code, shards, tmp_path_factory):
    """A complete run of two ranks at ZeRO stage 3, of 6 steps with a checkpoint every second step."""
    folder = tmp_path_factory.mktemp("old_run")
    model = tiny_recipe(shards)["model"] | {"drop_path_rate": 0.0}  # older code drew other masks
    recipe = write_recipe(folder, shards, engine={"deepspeed": "zero3"}, model=model)
    train = ("-m", "dsmim", "train", recipe, "--run-dir", folder / "run")
    two_ranks(*train, "optim.ema_decay=0.9", cwd=old_code, PYTHONPATH=str(old_code))
    return folder


def resumed_at_step_4(old_run, copy):
    """A copy of the run as it was after 4 steps, with the log of all 6."""
    shutil.copytree(old_run / "run", copy)
    shutil.rmtree(copy / "checkpoints/step_00000006")
    return "train", old_run / "recipe.yaml", "--run-dir", copy, "optim.ema_decay=0.9"


def test_it_resumes_to_the_same_bytes(old_run, tmp_path):
    words = resumed_at_step_4(old_run, tmp_path / "run")
    done = two_forked_ranks(*words)
    assert "resumed from" in done.stderr and "step_00000004" in done.stderr
    last = "checkpoints/step_00000006"
    assert_same_bytes(old_run / "run" / last, tmp_path / "run" / last)
    assert metrics(old_run / "run") == metrics(tmp_path / "run")


def test_it_resumes_by_another_number_of_ranks_at_another_stage(old_run, tmp_path):
    dsmim(*resumed_at_step_4(old_run, tmp_path / "run"), "engine.deepspeed=zero0")
    losses = [[line["loss"] for line in metrics(run) if "lr" in line] for run in (old_run / "run", tmp_path / "run")]
    assert losses[1][:4] == losses[0][:4] and len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], abs=2e-6)  # a wrong state is off by 1e-2


def test_it_is_evaluated_and_exported(old_run, tmp_path, capsys):
    dsmim("evaluate", old_run / "run", "--ema", "--json", tmp_path / "figures.json")
    assert (tmp_path / "figures.json").is_file()
    assert main(["export", str(old_run / "run"), str(tmp_path / "weights.safetensors")]) == 0
