"""Mean and standard deviation of the pixels: timm's own for timm's networks, kept by a run for its whole life."""

import json

import pytest
import timm
import torch
from timm.data import resolve_data_config

from dsmim.checkpoint.run_directory import RunDirectory, changes_of
from dsmim.data.decode import decoder_name
from dsmim.data.normalisation import IMAGENET, Normalisation, normalisation, settled
from dsmim.recipe.errors import RecipeError
from dsmim.recipe.reading import parse_recipe, stored_recipe
from dsmim.tasks import build_task
from tests.conftest import tiny_recipe

CLASSIFY = {"name": "classify", "num_classes": 3}


def recipe_of(folder, model=None, **data):
    tree = tiny_recipe(folder, task=CLASSIFY)
    tree["model"] |= model or {}
    tree["data"] |= data
    return parse_recipe(tree, "test")


def of_timm(folder, name, options=None, **data):
    model = {"name": f"timm:{name}", "img_size": 32, "options": options or {}}
    tree = tiny_recipe(folder, task=CLASSIFY, model=model)
    tree["data"] |= data
    return parse_recipe(tree, "test")


SAME = {"data_fingerprint": "f", "decoder": decoder_name()}


def saved(folder, recipe: dict, **state) -> RunDirectory:
    """A run directory as far as its newest checkpoint's state."""
    checkpoint = folder / "checkpoints" / "step_00000002"
    checkpoint.mkdir(parents=True)
    state = {"format": 1, "step": 2, "data_fingerprint": "f", "recipe": recipe} | state
    (checkpoint / "state.json").write_text(json.dumps(state))
    return RunDirectory(folder)


SMALL = {"embed_dim": 32, "depth": 1, "num_heads": 2}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("beit_base_patch16_224", SMALL),
        ("beitv2_base_patch16_224", SMALL),
        ("vit_base_patch16_224", SMALL),
        ("vit_base_patch16_224.mae", SMALL),
        ("vit_base_patch16_clip_224.openai", SMALL),
        ("resnet18", {}),
    ],
)
def test_networks_of_timm_have_timm_s_figures(tmp_path, name, options):
    """Against the function that timm's users call, for the same network built by timm itself."""
    size = {"img_size": 32} if "patch" in name else {}
    theirs = resolve_data_config(model=timm.create_model(name, **options | size))
    task = build_task(of_timm(tmp_path, name, options))
    assert (task.normalise.mean, task.normalise.std) == (theirs["mean"], theirs["std"])


def test_beit_is_not_normalised_by_imagenet_s_figures(tmp_path):
    found = normalisation(of_timm(tmp_path, "beit_base_patch16_224", SMALL))
    assert found == Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)) and found != IMAGENET
    black_and_white = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    assert found(black_and_white)[:, 0, 0, 0].tolist() == [-1, 1]


def test_own_networks_have_imagenet_s_and_a_recipe_sets_others(tmp_path):
    assert normalisation(recipe_of(tmp_path)) == IMAGENET
    chosen = normalisation(recipe_of(tmp_path, mean=0.5, std=[0.25]))
    assert chosen == Normalisation((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    tree = recipe_of(tmp_path).model_dump(mode="json")
    tree["data"]["mean"] = [0.1, 0.2, 0.3]  # alone, as older checkpoints may have it
    assert normalisation(stored_recipe(tree, "checkpoint")) == Normalisation((0.1, 0.2, 0.3), IMAGENET.std)
    pixels = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    assert torch.equal(chosen.undo(chosen(pixels)), pixels)


def test_one_channel_has_the_average_of_the_three(tmp_path):
    found = normalisation(recipe_of(tmp_path, {"in_chans": 1}))
    assert found.mean == pytest.approx((0.449,)) and found.std == pytest.approx((0.226,))


@pytest.mark.parametrize(
    ("channels", "data", "message"),
    [
        (3, {"mean": [0.5, 0.5]}, "data.mean: has 2 numbers; give model.in_chans=3, or one for all channels"),
        (1, {"std": [0.5, 0.5, 0.5]}, "data.std: has 3 numbers; give model.in_chans=1, or one for all channels"),
        (4, {"std": 0.5}, "data.mean: has no default for model.in_chans=4; give 4 numbers, or one for all"),
        (3, {"mean": 123.7, "std": 0.2}, "data.mean[0]: pixels are on a scale from 0 to 1 here; divide by 255"),
        (3, {"mean": 0.5, "std": [58.4]}, "data.std[0]: pixels are on a scale from 0 to 1 here; divide by 255"),
        (3, {"mean": 0.5}, "data.mean: given without data.std; give both"),
        (1, {"std": 0.5}, "data.std: given without data.mean; give both"),
        (3, {"std": 0}, "data.std[0]: input should be greater than 0"),
        (2, {}, "model.in_chans: images are decoded to 1 channel (grey), 3 (RGB) or 4 (RGBA) (given: 2)"),
        (1, {"augment": {"rand_augment": "rand-m9"}}, "data.augment.rand_augment: works on RGB only, not with"),
    ],
)
def test_errors(tmp_path, channels, data, message):
    with pytest.raises(RecipeError) as caught:
        recipe_of(tmp_path, {"in_chans": channels}, **data)
    assert message in str(caught.value)


def test_a_run_of_before_the_keys_keeps_imagenet_s(tmp_path):
    """Its state.json has no data.mean; its recipe asks for a network to which timm gives 0.5."""
    recipe = of_timm(tmp_path, "beit_base_patch16_224", SMALL)
    before = recipe.model_dump(mode="json")
    del before["data"]["mean"], before["data"]["std"]
    resumed = saved(tmp_path / "run", before).completed(recipe)
    assert normalisation(resumed) == IMAGENET
    assert normalisation(RunDirectory(tmp_path / "new").completed(recipe)).mean == (0.5, 0.5, 0.5)


def test_a_resumed_run_keeps_its_figures_and_others_need_a_fork(tmp_path):
    recipe = settled(recipe_of(tmp_path, mean=0.5, std=0.5))
    directory = saved(tmp_path / "run", recipe.model_dump(mode="json"))
    state = {"recipe": recipe.model_dump(mode="json"), "data_fingerprint": "f"}
    silent = recipe_of(tmp_path)
    assert directory.completed(silent) == recipe and changes_of(state, silent, SAME) == []
    assert changes_of(state, recipe_of(tmp_path, mean=0.5, std=0.5), SAME) == []
    changed = changes_of(state, recipe_of(tmp_path, mean=0.4, std=0.5), SAME)
    assert changed == ["data.mean: [0.5, 0.5, 0.5] → [0.4, 0.4, 0.4]"]


def test_another_decoder_at_a_resume(tmp_path):
    recipe = settled(recipe_of(tmp_path))
    state = {"recipe": recipe.model_dump(mode="json"), "data_fingerprint": "f"}
    assert changes_of(state, recipe, SAME) == []  # a checkpoint of before the decoder was recorded
    (change,) = changes_of(state | {"decoder": "torchcodec"}, recipe, SAME)
    assert change.startswith("decoder: torchcodec → torchvision and Pillow, EXIF orientation not applied")
