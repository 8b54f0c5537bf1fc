"""dsmim.load of files that do not say which network their weights are of: others' releases."""

from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import nn

import dsmim
from dsmim.weights.export import export
from tests.conftest import tiny_recipe
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
        (SWIN | {"num_class": 5}, "dsmim.load has no setting num_class; with name= there are img_size, "),
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


def test_no_part_of_a_network_stays_untrained(tmp_path):
    vit = timm_vit(num_classes=0)
    path = saved(tmp_path / "vit.pth", vit.state_dict())
    options = {"embed_dim": 64, "depth": 2, "num_heads": 2}
    with pytest.raises(ValueError, match=r"vit\.pth: has no weights for fc_norm\.bias, fc_norm\.weight"):
        dsmim.load(path, "timm:vit_base_patch16_224", img_size=64, options=options | {"global_pool": "avg"})


def test_the_normalisation_of_a_file_can_be_given(tmp_path):
    path = saved(tmp_path / "swin.pth", swin_as_published(timm_swin()))
    assert dsmim.load(path, **SWIN).transform.mean == (0.485, 0.456, 0.406)
    chosen = dsmim.load(path, **SWIN, mean=0.5, std=(0.1, 0.2, 0.3)).transform
    assert (chosen.mean, chosen.std) == ((0.5, 0.5, 0.5), (0.1, 0.2, 0.3))
    for given, message in (
        ({"mean": (0.5, 0.5)}, "data.mean: has 2 numbers; give model.in_chans=3, or one for all channels"),
        ({"std": 58}, r"std\[0\]: pixels are on a scale from 0 to 1 here; divide by 255 \(given: 58\)"),
    ):
        with pytest.raises(ValueError, match=message):
            dsmim.load(path, **SWIN, **given)
