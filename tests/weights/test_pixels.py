"""What is said about weights that were trained on pixels of another normalisation."""

import json

import pytest
import torch

from dsmim.data.normalisation import IMAGENET, Normalisation
from dsmim.models import SimMIM, create_model
from dsmim.weights.export import LAYOUTS, export
from dsmim.weights.files import warm_start
from dsmim.weights.pixels import normalisation_note
from tests.conftest import tiny_recipe
from tests.weights.weight_files import beit_as_pretrained, run_directory, saved, scrambled, timm_beit

SWIN = {"name": "swinv2_nano", "img_size": 64, "window_size": 4}
HALF = Normalisation((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def test_files_of_beit_with_imagenet_s_normalisation(tmp_path):
    model = timm_beit()
    path = saved(tmp_path / "beit.pth", beit_as_pretrained(model))
    report, _ = warm_start(model, path, "drop")
    note = normalisation_note(path, report.layout, IMAGENET)
    assert note.startswith(f"{path}: BEiT was trained on images normalised by mean 0.5 and standard deviation 0.5")
    assert note.endswith("unless these weights are v2's, set data.mean=0.5 data.std=0.5")
    assert normalisation_note(path, report.layout, Normalisation((0.5,) * 3, (0.5,) * 3)) is None
    assert normalisation_note(path, "MAE, pre-trained", IMAGENET) is None


@pytest.fixture
def trained(tmp_path):
    """A run whose images were normalised by HALF."""
    tree = tiny_recipe(tmp_path, model=SWIN)
    tree["data"] |= {"mean": list(HALF.mean), "std": list(HALF.std)}
    return run_directory(tmp_path / "run", tree, scrambled(SimMIM(create_model(**SWIN))))


def sources(trained, folder):
    yield trained
    yield trained / "checkpoints/step_00000007"
    for layout in LAYOUTS:
        for suffix in (".safetensors", ".pth"):
            if (layout, suffix) != ("authors", ".pth"):  # as the authors write it: without metadata
                export(trained, out := folder / f"{layout}{suffix}", layout)
                yield out


def test_dsmim_s_own_weights_say_how_they_were_trained(trained, tmp_path):
    count = 0
    for path in sources(trained, tmp_path):
        note = normalisation_note(path, "", IMAGENET)
        fix = "'data.mean=[0.5, 0.5, 0.5]' 'data.std=[0.25, 0.25, 0.25]'"
        assert str(path) in note and note.endswith(f"for the former set {fix}"), path
        assert normalisation_note(path, "", HALF) is None
        count += 1
    assert count == 7


def test_weights_of_before_the_keys_were_normalised_by_imagenet_s_figures(trained):
    checkpoint = trained / "checkpoints/step_00000007"
    state = json.loads((checkpoint / "state.json").read_text())
    del state["recipe"]["data"]["mean"], state["recipe"]["data"]["std"]
    (checkpoint / "state.json").write_text(json.dumps(state))
    assert normalisation_note(trained, "", IMAGENET) is None
    assert "normalised by mean 0.485, 0.456, 0.406" in normalisation_note(trained, "", HALF)


def test_other_files_and_other_channels_say_nothing(trained, tmp_path):
    torch.save({"model": {"weight": torch.zeros(1)}}, tmp_path / "other.pth")
    assert normalisation_note(tmp_path / "other.pth", "timm", HALF) is None
    assert normalisation_note(trained, "", Normalisation((0.5,), (0.5,))) is None
