"""What plain timm makes of an export: its own transform gives the pixels of `dsmim evaluate`, and the same logits."""

import io
import json

import pytest
import safetensors
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

import dsmim
from dsmim.models import create_model
from dsmim.models.vit import DeiT3, ParallelThingsBlock
from dsmim.weights.export import export
from tests.conftest import image_bytes, make_shards, run, tiny_recipe
from tests.weights.weight_files import VIT, run_directory, scrambled, timm_beit

NETWORKS = {
    "swin": {"name": "swinv2_nano", "img_size": 64, "window_size": 4, "pretrained_window_sizes": [2, 2, 2, 2]},
    "deit": {"name": "deit3_nano_patch16", "img_size": 48},
    "beit": {"name": "timm:beit_base_patch16_224", "img_size": 64,
             "options": {"embed_dim": 64, "depth": 2, "num_heads": 2}},
    "resnet": {"name": "timm:resnet10t", "img_size": 40},
}  # fmt: skip
PREPARED = {"augment": {"eval_crop_ratio": 0.8, "eval_interpolation": "bilinear"}}


def run_of(folder, network: str, data: dict | None = None, classes: int = 5):
    settings = NETWORKS[network]
    if network == "beit":
        model = timm_beit()
    elif network == "resnet":
        model = scrambled(timm.create_model("resnet10t", num_classes=classes))
    else:
        model = scrambled(create_model(num_classes=classes, **settings))
    task = {"name": "classify", "num_classes": classes}
    tree = tiny_recipe(folder, task=task, model=settings)
    tree["data"] |= PREPARED | (data or {})
    return run_directory(folder / "run", tree, model), model


def same_as_evaluate(theirs, trained) -> None:
    """timm's whole path from a picture to logits against dsmim.load's, which is `dsmim evaluate`'s bit for bit."""
    transform = create_transform(**resolve_data_config(model=theirs))
    ours, own = dsmim.load(trained)
    worst = 0.0
    for number in range(8):
        data = image_bytes(number, side=90)
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        a, b = transform(picture), own(data)
        assert a.shape == b.shape
        worst = max(worst, ((a - b).abs() * torch.tensor(own.std).view(-1, 1, 1) * 255).max().item())
        with torch.no_grad():
            torch.testing.assert_close(theirs(b[None]), ours(b[None]), rtol=1e-4, atol=1e-4)
    assert worst < 2.5  # of 255: Pillow and torchvision round an antialiased resize differently


@pytest.mark.parametrize("network", NETWORKS)
def test_a_folder_is_loaded_by_one_line_of_timm(tmp_path, network):
    trained, _ = run_of(tmp_path, network, {"mean": [0.4, 0.5, 0.6], "std": 0.25})
    line = export(trained, out := tmp_path / "exported").splitlines()[-1]
    assert line == f"timm.create_model('local-dir:{out}', pretrained=True)"
    theirs = eval(line, {"timm": timm}).eval()
    assert type(theirs).__module__.startswith("timm.")
    found = {key: tuple(v) if isinstance(v, list) else v for key, v in resolve_data_config(model=theirs).items()}
    size = NETWORKS[network]["img_size"]
    assert found == {
        "input_size": (3, size, size), "interpolation": "bilinear", "crop_pct": 0.8, "crop_mode": "center",
        "mean": (0.4, 0.5, 0.6), "std": (0.25, 0.25, 0.25),
    }  # fmt: skip
    same_as_evaluate(theirs, trained)
    assert torch.equal(dsmim.load(out).transform(image_bytes(1)), dsmim.load(trained).transform(image_bytes(1)))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("network", NETWORKS)
def test_the_line_of_a_file_prepares_images_too(tmp_path, network, suffix):
    trained, _ = run_of(tmp_path, network)
    theirs = eval(export(trained, tmp_path / f"model{suffix}"), {"timm": timm}).eval()
    same_as_evaluate(theirs, trained)


def test_the_file_says_how_images_are_prepared(tmp_path):
    trained, _ = run_of(tmp_path, "swin", {"mean": 0.5, "std": 0.5})
    export(trained, out := tmp_path / "model.safetensors")
    with safetensors.safe_open(out, framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["pretrained_cfg"]) == {
        "input_size": [3, 64, 64], "interpolation": "bilinear", "crop_pct": 0.8, "crop_mode": "center",
        "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "num_classes": 5,
    }  # fmt: skip
    assert dsmim.load(out).transform.mean == (0.5, 0.5, 0.5)


def test_a_file_of_before_the_keys_has_imagenet_s_normalisation(tmp_path):
    trained, _ = run_of(tmp_path, "beit", {"mean": 0.5, "std": 0.5})
    export(trained, out := tmp_path / "model.pth", "dsmim")
    content = torch.load(out, weights_only=True)
    recipe = json.loads(content["metadata"]["recipe"])
    del recipe["data"]["mean"], recipe["data"]["std"]
    content["metadata"]["recipe"] = json.dumps(recipe)
    torch.save(content, out)
    assert dsmim.load(out).transform.mean == (0.485, 0.456, 0.406)


def test_the_names_of_classes(tmp_path):
    make_shards(tmp_path / "shards", [4])
    trained, _ = run_of(tmp_path, "swin", {"train": f"{tmp_path}/shards/train-*.tar"})
    names = tmp_path / "shards/classes.json"
    assert export(trained, tmp_path / "unnamed").startswith("# no label_names: ")
    for there, wanted in ((["a", "b"], None), (["a", "b", "c", "d", "e"], ("a", "b", "c", "d", "e"))):
        names.write_text(json.dumps(there))
        line = export(trained, tmp_path / "named").splitlines()[-1]
        found = eval(line, {"timm": timm}).pretrained_cfg.get("label_names")
        assert (found and tuple(found)) == wanted


def test_parallel_blocks_cannot_be_in_a_folder_but_in_a_file(tmp_path):
    settings = {"name": "deit3_small_patch16_18x2", "img_size": 32}
    model = DeiT3(0.0, 16, img_size=32, num_classes=5, block_fn=ParallelThingsBlock, **VIT)
    tree = tiny_recipe(tmp_path, task={"name": "classify", "num_classes": 5}, model=settings)
    trained = run_directory(tmp_path / "run", tree, model)
    with pytest.raises(ValueError, match="a folder for timm cannot hold its argument block_fn"):
        export(trained, tmp_path / "folder")
    line = export(trained, tmp_path / "model.safetensors")
    assert "block_fn=timm.models.vision_transformer.ParallelThingsBlock, " in line


@pytest.mark.parametrize(("layout", "name"), [("timm", "model.v1"), ("authors", "model"), ("dsmim", "folder")])
def test_names_that_are_neither_a_file_nor_a_folder(tmp_path, layout, name):
    trained, _ = run_of(tmp_path, "deit")
    with pytest.raises(
        ValueError, match=r"the suffix decides the kind of file; it must be one of \.safetensors, \.pth"
    ):
        export(trained, tmp_path / name, layout)


def test_standard_output_holds_the_line_alone(tmp_path):
    """Without DS_ACCELERATOR DeepSpeed warns, when it is imported, that it found no accelerator."""
    trained, _ = run_of(tmp_path, "deit")
    done = run("env", "-u", "DS_ACCELERATOR", "dsmim", "export", trained, tmp_path / "model.safetensors")
    assert done.stdout.startswith("timm.create_model('deit3_base_patch16_224', ") and len(done.stdout.splitlines()) == 1


def test_deepspeed_s_messages_are_on_standard_error():
    code = "import dsmim.engine, deepspeed; deepspeed.utils.logger.warning('said'); print('result')"
    done = run("python", "-c", code)
    assert done.stdout == "result\n" and "DeepSpeed: [WARNING] said\n" in done.stderr
