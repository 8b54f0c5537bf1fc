"""dsmim.load against what `dsmim evaluate` computes."""

import io
import json
import shutil
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from torch import nn

import dsmim
from dsmim.checkpoint.zero_shards import read_weights
from dsmim.models import SimMIM
from dsmim.models.swin_v2 import SwinTransformerV2
from dsmim.weights.export import export
from tests.conftest import dsmim as command
from tests.conftest import image_bytes, run, tiny_recipe
from tests.weights.weight_files import (
    deit_as_published,
    images,
    run_directory,
    saved,
    scrambled,
    swin_as_published,
    swin_as_simmim,
    timm_deit,
    timm_swin,
    timm_vit,
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


def others(folder: Path) -> dict[str, tuple[nn.Module, Path, dict]]:
    """Independent networks of timm, files of them as their authors publish, and what dsmim.load must be given."""
    swin, deit, vit = timm_swin(), timm_deit(), timm_vit()
    encoder = timm_swin(num_classes=0)
    return {
        "microsoft": (swin, saved(folder / "swin.pth", swin_as_published(swin)), SWIN),
        "SimMIM": (encoder, saved(folder / "simmim.pth", swin_as_simmim(encoder)), SWIN),
        "DeiT III": (deit, saved(folder / "deit.pth", deit_as_published(deit)), {
            "name": "deit3_nano_patch16", "img_size": 64}),
        "timm": (vit, saved(folder / "vit.pth", vit.state_dict()), {
            "name": "timm:vit_base_patch16_224", "img_size": 64,
            "options": {"embed_dim": 64, "depth": 2, "num_heads": 2}}),
    }  # fmt: skip


@pytest.mark.parametrize("whose", ["microsoft", "SimMIM", "DeiT III", "timm"])
def test_files_of_others(tmp_path, whose):
    network, path, settings = others(tmp_path)[whose]
    loaded = dsmim.load(path, **settings)
    assert torch.allclose(loaded.model(images()), network(images()), atol=1e-5)
    assert loaded.model(images()).shape == ((2, 256) if whose == "SimMIM" else (2, 5))  # the head is the file's
    assert loaded.recipe is None and loaded.report.used and loaded.transform.img_size == 64
    headless = dsmim.load(path, **settings, num_classes=0)
    assert headless.model(images()).shape[1] in (64, 96, 256)


def test_timm_says_how_its_images_are_prepared(tmp_path):
    _, path, settings = others(tmp_path)["timm"]
    theirs = timm.data.resolve_data_config(model=timm.create_model("vit_base_patch16_224"))
    transform = dsmim.load(path, **settings).transform
    assert transform.mean == theirs["mean"] == (0.5, 0.5, 0.5) and transform.std == theirs["std"]
    assert transform.augment.eval_crop_ratio == theirs["crop_pct"] == 0.9
    white = Image.new("RGB", (70, 70), "white")
    assert torch.allclose(transform(white), torch.ones(3, 64, 64))
    own = dsmim.load(path, **settings, eval_crop_ratio=1.0, eval_interpolation="bilinear").transform.augment
    assert (own.eval_crop_ratio, own.eval_interpolation) == (1.0, "bilinear")


def test_windows_that_a_file_does_not_say_are_warned_of(tmp_path):
    swin = timm_swin()
    path = saved(tmp_path / "swin.pth", swin.state_dict())
    with pytest.warns(UserWarning, match=r"swin\.pth: .*position coordinates taken as"):
        dsmim.load(path, **SWIN)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, 'give the network as create_model takes it, for example dsmim.load('),
        ({"name": "swinv2_nan"}, "no model 'swinv2_nan'; did you mean swinv2_nano?"),
        ({"name": "swinv2_nano"}, "model.window_size: swinv2_nano attends within windows, give their side"),
        ({"name": "swinv2_nano", "window_size": 4}, "does not say for which images its weights are; give img_size"),
        (SWIN | {"num_classes": 7}, "swin.pth has head.fc.bias of shape (5,), the model (7,); leave num_classes out"),
        (SWIN | {"num_classes": None}, "num_classes=None: give a whole number, 0 for the network without a head"),
        (SWIN | {"num_classes": -1}, "num_classes=-1: give a whole number"),
        (SWIN | {"num_classes": "5"}, "num_classes='5': give a whole number"),
        (SWIN | {"img_size": "64"}, "dsmim.load: img_size: input should be a valid integer (given: '64')"),
        (SWIN | {"window_size": 0}, "dsmim.load: window_size: input should be greater than or equal to 1 (given: 0)"),
        (SWIN | {"name": 3}, "dsmim.load: name: input should be a valid string (given: 3)"),
        (SWIN | {"eval_interpolation": "cubic"},
         "dsmim.load: eval_interpolation: input should be 'bilinear' or 'bicubic' (given: 'cubic')"),
        (SWIN | {"eval_crop_ratio": 0}, "dsmim.load: eval_crop_ratio: input should be greater than 0 (given: 0)"),
        (SWIN | {"num_class": 5}, "dsmim.load has no setting num_class; with name= there are img_size, window_size"),
        (SWIN | {"name": "swinv2_tiny"}, "swin.pth: has [1, 2, 4, 8] heads per stage"),
        (SWIN | {"ema": True}, "swin.pth: ema=True is for runs and checkpoints"),
    ],
)  # fmt: skip
def test_errors_of_files(tmp_path, given, message):
    path = saved(tmp_path / "swin.pth", swin_as_published(timm_swin()))
    with pytest.raises(ValueError) as caught:
        dsmim.load(path, **given)
    assert message in str(caught.value)


def test_a_number_of_classes_for_a_file_without_a_head(tmp_path):
    path = saved(tmp_path / "simmim.pth", swin_as_simmim(timm_swin(num_classes=0)))
    with pytest.raises(ValueError) as caught:
        dsmim.load(path, **SWIN, num_classes=5)
    assert str(caught.value) == f"num_classes=5: {path} has no classification head; leave num_classes out"


def test_an_export_without_its_head(tmp_path):
    model = scrambled(dsmim.create_model(**SWIN, num_classes=5))
    tree = tiny_recipe(tmp_path, task={"name": "classify", "num_classes": 5}, model=SWIN)
    export(run_directory(tmp_path / "run", tree, model), out := tmp_path / "model.pth")
    content = torch.load(out, weights_only=True)
    del content["model"]["head.fc.bias"], content["model"]["head.fc.weight"]
    torch.save(content, out)
    with pytest.raises(ValueError) as caught:
        dsmim.load(out)
    asked = "num_classes=5 in the file's recipe"
    assert str(caught.value) == f"{asked}: {out} has no classification head; export it again"


def test_windows_may_be_a_tuple_and_settings_none(tmp_path):
    path = saved(tmp_path / "swin.pth", swin_as_published(timm_swin()))
    given = {"drop_path_rate": None, "extra_norm_every": None, "pretrained_window_sizes": (4, 4, 4, 2)}
    assert dsmim.load(path, **SWIN, **given).model(images()).shape == (2, 5)


def test_what_was_loaded_is_a_key(pretrained):
    first, second = dsmim.load(pretrained[0]), dsmim.load(pretrained[0])
    assert {first: "first", second: "second"}[first] == "first" and first != second


def test_no_part_of_a_network_stays_untrained(tmp_path):
    vit = timm_vit(num_classes=0)
    path = saved(tmp_path / "vit.pth", vit.state_dict())
    options = {"embed_dim": 64, "depth": 2, "num_heads": 2}
    with pytest.raises(ValueError, match=r"vit\.pth: has no weights for fc_norm\.bias, fc_norm\.weight"):
        dsmim.load(path, "timm:vit_base_patch16_224", img_size=64, options=options | {"global_pool": "avg"})


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


@pytest.fixture
def transform(pretrained):
    return dsmim.load(pretrained[0]).transform


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_one_image_in_every_form(transform, tmp_path, kind):
    data = image_bytes(3, side=90, kind=kind)
    path = tmp_path / "image"
    path.write_bytes(data)
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)
    wanted = transform(data)
    assert wanted.shape == (3, 64, 64) and wanted.dtype == torch.float32
    for form in (bytearray(data), memoryview(data), path, str(path)):
        assert torch.equal(transform(form), wanted)
    # Pillow decodes JPEG and WebP by a library of its own.
    forms = [Image.open(path), pixels, pixels.contiguous()]
    assert all(torch.equal(transform(form), transform(forms[0])) for form in forms)
    assert torch.allclose(transform(forms[0]), wanted, atol=0 if kind == "PNG" else 0.05)


def test_grey_images(transform):
    grey = Image.open(io.BytesIO(image_bytes(3))).convert("L")
    pixels = torch.from_numpy(np.array(grey))[None]
    assert torch.equal(transform(grey), transform(pixels))
    assert torch.equal(transform(grey), transform(grey.convert("RGB")))


@pytest.mark.parametrize(
    "image", [torch.zeros(3, 8, 8), torch.zeros(4, 8, 8, dtype=torch.uint8), torch.zeros(1, 3, 8, 8).byte(), 7, None]
)
def test_what_is_no_image(transform, image):
    with pytest.raises(ValueError, match="an image is"):
        transform(image)


@pytest.mark.parametrize(
    "image",
    [Image.new("RGB", (5, 0)), Image.new("I;16", (5, 0)), *(torch.zeros(c, 0, 5, dtype=torch.uint8) for c in (1, 3))],
    ids=["PIL RGB", "PIL I;16", "tensor (1, 0, 5)", "tensor (3, 0, 5)"],
)
def test_images_without_pixels(transform, image):
    with pytest.raises(ValueError, match=r"at least one pixel high and wide, not 0 × 5 \(height × width\)"):
        transform(image)


def test_image_files_that_cannot_be_read(transform, tmp_path):
    (tmp_path / "image.png").write_bytes(b"rubbish")
    for name, said in (("image.png", "cannot be decoded: no known image format"), ("none.png", "No such file")):
        with pytest.raises(ValueError, match=rf"{name}: .*{said}"):
            transform(tmp_path / name)
    (tmp_path / "cut.jpg").write_bytes(image_bytes(3, side=200, kind="JPEG")[:2000])
    with pytest.raises(ValueError, match=r"cut\.jpg: cannot be decoded: image file is truncated"):
        transform(Image.open(tmp_path / "cut.jpg"))
