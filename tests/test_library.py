"""dsmim.load against what `dsmim evaluate` computes."""

import json
import shutil
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch
import yaml

import dsmim
from dsmim.checkpoint.zero_shards import read_weights
from dsmim.models import SimMIM
from dsmim.models.swin_v2 import SwinTransformerV2
from dsmim.weights.export import export
from tests.conftest import dsmim as command
from tests.conftest import image_bytes, run, tiny_recipe
from tests.weights.weight_files import (
    images,
    run_directory,
    scrambled,
)

SWIN = {"name": "swinv2_nano", "img_size": 64, "window_size": 4}

# `dsmim evaluate`, which also writes what it feeds to the network and what comes out.
WATCHED = """
import json, sys, torch
from pathlib import Path
from dsmim.evaluate import evaluate
from dsmim.tasks.classify import Classify

seen, validation_sums = [], Classify.validation_sums

def watched(task, forward, batch):
    def keep(images):
        seen.append((images, forward(images)))
        return seen[-1][1]
    return validation_sums(task, keep, batch)

Classify.validation_sums = watched
print(json.dumps(evaluate(Path(sys.argv[1]), [])))
torch.save(seen, sys.argv[2])
"""


class Trained(NamedTuple):
    run_dir: Path
    figures: dict
    batches: list[tuple[torch.Tensor, torch.Tensor]]
    """What evaluation fed to the network, and its logits."""


@pytest.fixture(autouse=True)
def one_thread():
    """As evaluation's process has: more of them add up in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shards) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    tree = tiny_recipe(
        shards, task={"name": "classify", "num_classes": 3}, optim={"lr": 1e-3, "ema_decay": 0.5},
        data=tiny_recipe(shards)["data"] | {"augment": {"eval_crop_ratio": 0.9}},
    )  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    command("train", folder / "recipe.yaml", "--run-dir", folder / "run")
    done = run(sys.executable, "-c", WATCHED, folder / "run", folder / "seen.pt")
    return Trained(folder / "run", json.loads(done.stdout.splitlines()[-1]), torch.load(folder / "seen.pt"))


@pytest.fixture(scope="module")
def validation(shards) -> list[tuple[bytes, int]]:
    """The validation set as a user would read it: encoded images and labels, in the order of the shards."""
    samples = []
    for shard in sorted(shards.glob("val-*.tar")):
        with tarfile.open(shard) as archive:
            read = {member.name: archive.extractfile(member).read() for member in archive}
        samples += [(read[name], int(read[name.replace(".png", ".cls")])) for name in read if name.endswith(".png")]
    return samples


@torch.no_grad()
def assert_evaluation_s_logits(loaded, trained: Trained, validation) -> None:
    """Inputs and logits of every validation image, bit for bit."""
    model, transform = loaded
    begin = 0
    for fed, logits in trained.batches:
        batch = torch.stack([transform(image) for image, _ in validation[begin : begin + len(fed)]])
        assert batch.dtype == torch.float32 and torch.equal(batch, fed)
        assert torch.equal(model(batch), logits)
        begin += len(fed)
    assert begin == len(validation) == 13


def test_a_run_gives_what_evaluation_computes(trained, validation):
    loaded = dsmim.load(trained.run_dir)
    assert_evaluation_s_logits(loaded, trained, validation)
    model, transform = loaded
    right = sum(model(transform(image)[None]).argmax().item() == label for image, label in validation)
    assert right / len(validation) == trained.figures["accuracy"] and trained.figures["samples"] == 13
    assert loaded.source == trained.figures["checkpoint"] and loaded.recipe.data.augment.eval_crop_ratio == 0.9


def test_the_model_is_ready_to_use_and_to_train(trained):
    model = dsmim.load(str(trained.run_dir)).model
    assert isinstance(model, SwinTransformerV2) and not any(module.training for module in model.modules())
    assert all(p.dtype == torch.float32 and p.device.type == "cpu" and p.requires_grad for p in model.parameters())
    model(torch.randn(1, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_checkpoint_and_the_moving_average(trained):
    older, newest = (trained.run_dir / f"checkpoints/step_{step:08d}" for step in (4, 6))
    first = dsmim.load(older)
    assert first.source == str(older)
    for folder, ema, which in ((older, False, "fp32"), (newest, False, "fp32"), (trained.run_dir, True, "ema")):
        state, wanted = dsmim.load(folder, ema=ema).model.state_dict(), read_weights(newest if ema else folder, which)
        assert state.keys() == wanted.keys() and all(torch.equal(state[name], wanted[name]) for name in state)
    assert not torch.equal(read_weights(newest)["head.fc.weight"], read_weights(newest, "ema")["head.fc.weight"])
    assert not torch.equal(read_weights(newest)["head.fc.weight"], read_weights(older)["head.fc.weight"])


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("layout", ["timm", "dsmim", "authors"])
def test_exported_files(trained, validation, tmp_path, layout, suffix):
    out = tmp_path / f"model{suffix}"
    export(trained.run_dir, out, layout)
    named = {}
    if (layout, suffix) == ("authors", ".pth"):  # as the authors write it: nothing beside the weights
        with pytest.raises(ValueError, match="does not say which network its weights belong to") as caught:
            dsmim.load(out)
        assert f'dsmim.load({str(out)!r}, name="swinv2_base", img_size=192, window_size=12)' in str(caught.value)
        named = {"name": "swinv2_nano", "img_size": 32, "window_size": 4, "eval_crop_ratio": 0.9}
    loaded = dsmim.load(out, **named)
    assert_evaluation_s_logits(loaded, trained, validation)
    assert loaded.source == str(out) and (loaded.recipe is None) == bool(named)
    assert loaded.report.fresh == []


def test_an_export_says_nothing_of_where_files_are(trained, tmp_path):
    export(trained.run_dir, out := tmp_path / "model.safetensors")
    assert str(trained.run_dir.parent) not in out.read_bytes().decode(errors="ignore")
    recipe = dsmim.load(out).recipe
    assert recipe.data.train is None and recipe.optim.ema_decay == 0.5


@pytest.fixture
def pretrained(tmp_path) -> tuple[Path, SimMIM]:
    model = scrambled(SimMIM(dsmim.create_model(**SWIN, num_classes=0)))
    return run_directory(tmp_path / "simmim", tiny_recipe(tmp_path, model=SWIN), model), model


def test_a_pretrained_run(pretrained, tmp_path):
    run_dir, model = pretrained
    pixels, mask = images(), torch.rand(2, 16, 16) < 0.6
    export(run_dir, whole := tmp_path / "whole.pth", "dsmim")
    export(run_dir, theirs := tmp_path / "theirs.safetensors", "authors")
    for path in (run_dir, whole, theirs):
        loaded = dsmim.load(path).model
        assert isinstance(loaded, SimMIM) and torch.equal(loaded(pixels, mask), model(pixels, mask))
        assert torch.equal(loaded.encoder(pixels), model.encoder(pixels))
    export(run_dir, encoder := tmp_path / "encoder.safetensors", "timm")
    loaded = dsmim.load(encoder)
    assert isinstance(loaded.model, SwinTransformerV2) and torch.equal(loaded.model(pixels), model.encoder(pixels))
    assert loaded.transform(image_bytes(1)).shape == (3, 64, 64)


def test_what_speeds_up_training_is_left_out(pretrained):
    run_dir, model = pretrained
    changes = SWIN | {"grad_checkpointing": 1, "compile": True}
    shutil.rmtree(run_dir)
    loaded = dsmim.load(run_directory(run_dir, tiny_recipe(run_dir, model=changes), model))
    assert loaded.recipe.model.compile and loaded.recipe.model.grad_checkpointing == 1
    assert not any("forward" in vars(module) for module in loaded.model.modules())  # as compile_blocks sets it
    assert torch.equal(loaded.model.encoder(images()), model.encoder(images()))


def test_a_run_of_a_timm_network(tmp_path):
    settings = {"name": "timm:resnet10t", "img_size": 64}
    model = scrambled(timm.create_model("resnet10t", num_classes=5))
    tree = tiny_recipe(tmp_path, task={"name": "classify", "num_classes": 5}, model=settings)
    run_dir = run_directory(tmp_path / "run", tree, model)
    export(run_dir, out := tmp_path / "model.pth")
    for path in (run_dir, out):
        assert torch.equal(dsmim.load(path).model(images()), model(images()))


def test_what_was_loaded_is_a_key(pretrained):
    first, second = dsmim.load(pretrained[0]), dsmim.load(pretrained[0])
    assert {first: "first", second: "second"}[first] == "first" and first != second


def test_errors_of_places(trained, tmp_path):
    wanted = "give a run directory, one of its checkpoints, or a file that `dsmim export` wrote"
    for path, said in (
        (tmp_path / "nowhere", "no such file or directory"),
        (tmp_path, "holds no valid checkpoint"),
    ):
        with pytest.raises(ValueError) as caught:
            dsmim.load(path)
        assert f"{path}: {said}" in str(caught.value) and wanted in str(caught.value)
    (tmp_path / "notes.txt").write_text("no weights")
    with pytest.raises(ValueError, match=r"notes\.txt: is not weights; give a run directory, a checkpoint, or a file"):
        dsmim.load(tmp_path / "notes.txt")
    (tmp_path / "cut.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"cut\.safetensors: cannot be read"):
        dsmim.load(tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match="a run says which network it is; leave out name, img_size"):
        dsmim.load(trained.run_dir, "swinv2_nano", img_size=32)


def test_damaged_checkpoints(trained, tmp_path):
    folder = shutil.copytree(trained.run_dir, tmp_path / "run")
    newest = folder / "checkpoints/step_00000006"
    shard = next(newest.glob("*optim_states.pt"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{newest}: {shard.name} is damaged") as caught:
        dsmim.load(newest)
    assert "give a run directory" in str(caught.value)
    assert dsmim.load(folder).source.endswith("step_00000004")  # the newest valid one


def test_no_moving_average(pretrained):
    with pytest.raises(ValueError, match=r"holds no moving average; a run without optim\.ema_decay saved it"):
        dsmim.load(pretrained[0], ema=True)


def test_a_simmim_export_cut_short(pretrained, tmp_path):
    export(pretrained[0], out := tmp_path / "model.pth", "dsmim")
    content = torch.load(out, weights_only=True)
    del content["model"]["decoder.0.bias"], content["model"]["decoder.0.weight"]
    torch.save(content, out)
    with pytest.raises(ValueError, match=r"model\.pth: has no weights for decoder\.0\.bias, decoder\.0\.weight"):
        dsmim.load(out)
