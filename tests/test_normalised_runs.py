"""Runs of a network of timm: what the log says, what a resume keeps, and what an older run has."""

import hashlib
import json
import shutil

import pytest
import yaml

from tests.conftest import dsmim, tiny_recipe

BEIT = {"name": "timm:beit_base_patch16_224", "img_size": 32,
        "options": {"embed_dim": 32, "depth": 1, "num_heads": 2}}  # fmt: skip
HALF = "images: 3 channels, normalised by mean 0.5, 0.5, 0.5 and standard deviation 0.5, 0.5, 0.5"
IMAGENET = "images: 3 channels, normalised by mean 0.485, 0.456, 0.406 and standard deviation 0.229, 0.224, 0.225"
LAST = "checkpoints/step_00000002"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shards):
    """A finished run of two steps and its recipe, which does not name mean and deviation."""
    folder = tmp_path_factory.mktemp("beit")
    tree = tiny_recipe(shards, task={"name": "classify", "num_classes": 3}, model=BEIT)
    tree |= {"schedule": {"duration": {"steps": 2}, "warmup": {"steps": 0}}, "optim": {"lr": 1e-3}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    done = dsmim("train", folder / "recipe.yaml", "--run-dir", folder / "run")
    return folder, done.stdout + done.stderr


def changed(folder, copy, change):
    """A copy of the run with another state.json in its only checkpoint."""
    shutil.copytree(folder / "run", copy)
    path = copy / LAST / "state.json"
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))
    manifest = json.loads((copy / LAST / "manifest.json").read_text())
    data = path.read_bytes()
    manifest["files"]["state.json"] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (copy / LAST / "manifest.json").write_text(json.dumps(manifest))
    return "train", folder / "recipe.yaml", "--run-dir", copy


def test_the_log_and_the_checkpoint_name_timm_s_figures(trained):
    folder, said = trained
    assert HALF in said
    state = json.loads((folder / "run" / LAST / "state.json").read_text())
    assert state["recipe"]["data"]["mean"] == state["recipe"]["data"]["std"] == [0.5, 0.5, 0.5]
    assert state["decoder"].startswith("torchvision and Pillow, EXIF orientation not applied, ")
    assert yaml.safe_load((folder / "run/recipe.yaml").read_text())["data"]["mean"] == [0.5, 0.5, 0.5]


def test_a_run_of_before_the_keys_is_resumed_with_imagenet_s(trained, tmp_path):
    def older(state):
        del state["decoder"], state["recipe"]["data"]["mean"], state["recipe"]["data"]["std"]

    words = changed(trained[0], tmp_path / "run", older)
    done = dsmim(*words)
    assert IMAGENET in done.stdout + done.stderr and "complete at step 2 of 2" in done.stdout + done.stderr
    refused = dsmim(*words, "data.mean=0.5", "data.std=0.5", check=False)
    assert refused.returncode == 1 and "data.mean: [0.485, 0.456, 0.406] → [0.5, 0.5, 0.5]" in refused.stderr


def test_another_decoder_needs_a_fork(trained, tmp_path):
    words = changed(trained[0], tmp_path / "run", lambda state: state.update(decoder="torchcodec, orientation applied"))
    refused = dsmim(*words, check=False)
    assert refused.returncode == 1 and "decoder: torchcodec, orientation applied → torchvision and" in refused.stderr
    assert "the same images have other pixels now" in refused.stderr and "--fork" in refused.stderr
    done = dsmim(*words, "--fork")
    assert "forked: decoder: torchcodec" in done.stdout + done.stderr
