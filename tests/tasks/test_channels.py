"""model.in_chans: grey and RGBA images through decoding, augmentation, network, loss, export and dsmim.load."""

import io
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import resolve_data_config

import dsmim
from dsmim.recipe.reading import parse_recipe
from dsmim.tasks import build_task
from dsmim.weights.export import LAYOUTS, export
from tests.conftest import tiny_recipe
from tests.weights.weight_files import run_directory, scrambled

CLASSIFY = {"name": "classify", "num_classes": 3}
NETWORKS = {
    "swin": {"name": "swinv2_nano", "img_size": 32, "window_size": 4},
    "deit": {"name": "deit3_nano_patch16", "img_size": 32},
    "timm": {"name": "timm:vit_base_patch16_224", "img_size": 32,
             "options": {"embed_dim": 64, "depth": 2, "num_heads": 2}},
    "resnet": {"name": "timm:resnet10t", "img_size": 32},
}  # fmt: skip
NORMALISED = {"mean": [0.3, 0.4, 0.5, 0.9], "std": 0.25}


def recipe_of(folder, network: str, channels: int, task=CLASSIFY):
    tree = tiny_recipe(folder, task=task, model=NETWORKS[network] | {"in_chans": channels})
    tree["data"] |= {"augment": {"random_erasing": 0.5}} | (NORMALISED if channels == 4 else {})
    return parse_recipe(tree, "test")


def filled(recipe):
    torch.manual_seed(0)
    task = build_task(recipe)
    for _ in task.fill():
        pass
    return task


def batch_of(task, channels: int) -> dict:
    """Two samples as the loader makes them."""
    samples = []
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 48, channels), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels.squeeze()).save(buffer, "PNG")
        samples.append(task.train_sample(buffer.getvalue(), number))
    found = {key: torch.stack([torch.as_tensor(sample[key]) for sample in samples]) for key in samples[0]}
    return found | {"step": 0, "position": torch.arange(2), "weight": torch.ones(2)}


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_classifier_trains_and_is_loaded_again(tmp_path, network, channels):
    recipe = recipe_of(tmp_path, network, channels)
    task = filled(recipe)
    batch = batch_of(task, channels)
    assert batch["image"].shape == (2, channels, 32, 32) and batch["image"].dtype == torch.uint8
    task.training_loss(task.model, batch).backward()
    assert all(p.grad is not None for p in task.model.parameters())
    assert task.metrics(task.validation_sums(task.model, batch))["samples"] == 2
    model = scrambled(task.model)
    run = run_directory(tmp_path / "run", json.loads(recipe.model_dump_json()), model)
    line = export(run, tmp_path / "folder").splitlines()[-1]
    theirs = eval(line, {"timm": timm}).eval()
    found = resolve_data_config(model=theirs)
    assert (tuple(found["input_size"]), tuple(found["mean"])) == ((channels, 32, 32), task.normalise.mean)
    images = torch.randn(2, channels, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), model(images), rtol=1e-4, atol=1e-4)
        loaded = dsmim.load(run)
        assert torch.equal(loaded.model(images), model(images)) and loaded.transform.mean == task.normalise.mean


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("network", ["swin", "deit"])
def test_simmim_reconstructs_the_channels_that_it_sees(tmp_path, network, channels):
    recipe = recipe_of(tmp_path, network, channels, {"name": "simmim", "mask_patch": 16})
    task = filled(recipe)
    batch = batch_of(task, channels)
    task.training_loss(task.model, batch).backward()
    assert task.model.decoder[0].weight.grad.abs().max() > 0
    images = task.normalise(batch["image"])
    assert task.model.reconstruct(images, batch["mask"]).shape == images.shape
    sums = task.validation_sums(task.model, batch)
    assert sums[1] == task.model.hidden_pixels(batch["mask"]).sum() * channels
    run = run_directory(tmp_path / "run", json.loads(recipe.model_dump_json()), scrambled(task.model))
    for layout in LAYOUTS:
        export(run, out := tmp_path / f"{layout}.safetensors", layout)
        loaded = dsmim.load(out).model
        encoder = getattr(loaded, "encoder", loaded)
        with torch.no_grad():
            assert torch.equal(encoder(images), task.model.encoder(images))


def test_channels_of_a_run_cannot_change_at_a_resume(tmp_path):
    from dsmim.recipe.reading import differences

    old, new = (recipe_of(tmp_path, "swin", channels) for channels in (3, 1))
    assert differences(old, new) == ["model.in_chans: 3 → 1"]


def test_another_file_s_grey_network(tmp_path):
    network = scrambled(timm.create_model("vit_base_patch16_224", in_chans=1, img_size=32, num_classes=5,
                                          embed_dim=64, depth=2, num_heads=2))  # fmt: skip
    torch.save(network.state_dict(), tmp_path / "grey.pth")
    settings = NETWORKS["timm"] | {"in_chans": 1}
    model, transform = dsmim.load(tmp_path / "grey.pth", **settings)
    pixels = transform(Image.new("L", (40, 40), 255))
    assert torch.allclose(pixels, torch.ones(1, 32, 32))  # timm's mean and deviation for it are 0.5
    with torch.no_grad():
        assert torch.equal(model(pixels[None]), network(pixels[None]))
