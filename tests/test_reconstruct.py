"""dsmim reconstruct: what is drawn, and which mask hides what."""

import base64
import io
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import dsmim
from dsmim.cli.main import main
from dsmim.data.normalisation import IMAGENET as normalise
from dsmim.evaluate import evaluate
from dsmim.models import SimMIM
from dsmim.reconstruct import GREY, Drawing, reconstruct
from tests.conftest import image_bytes, make_shards, tiny_recipe
from tests.weights.weight_files import run_directory, scrambled

WINDOW = 15


class Home(NamedTuple):
    run_dir: Path
    folder: Path
    model: SimMIM


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Home:
    folder = tmp_path_factory.mktemp("home")
    make_shards(folder, [12], name="val")
    model = scrambled(SimMIM(dsmim.create_model("swinv2_nano", img_size=32, window_size=4, num_classes=0), WINDOW))
    tree = tiny_recipe(folder, task={"name": "simmim", "mask_patch": 8, "target_window": WINDOW})
    return Home(run_directory(folder / "run", tree, model), folder, model.eval())


def hidden(drawing: Drawing) -> torch.Tensor:
    """What is grey in the masked image and not in the image, (H, W)."""
    return (drawing.masked != drawing.image).any(dim=0)


def assert_same_pixels(one: torch.Tensor, other: torch.Tensor) -> None:
    """Up to the last digit: a batch of another size adds up in another order."""
    assert (one.int() - other.int()).abs().max() <= 1


def test_pixels_survive_normalisation():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, -1, -1)
    assert torch.equal(normalise.undo(normalise(pixels)), pixels)
    out_of_range = normalise.undo(normalise(pixels) * torch.tensor([-100.0, 100.0, 1.0]).view(1, 3, 1, 1))
    assert out_of_range.min() == 0 and out_of_range.max() == 255


def test_undoing_the_target_gives_the_images():
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 + 1
    for window in (None, WINDOW):
        model = SimMIM(dsmim.create_model("swinv2_nano", img_size=32, window_size=4, num_classes=0), window)
        torch.testing.assert_close(model.undo_target(model.target(images), images), images, rtol=0, atol=1e-4)


def test_hidden_pixels_are_the_network_s(home):
    drawings, there, faults = reconstruct(home.run_dir, [], [], count=5)
    assert (len(drawings), there, faults) == (5, 12, [])
    transform = dsmim.load(home.run_dir).transform
    for number, drawing in enumerate(drawings):
        assert drawing.name == f"k{number:05d}"
        image = transform(image_bytes(number))[None]
        assert torch.equal(normalise.undo(image)[0], drawing.image)
        mask = hidden(drawing)
        assert 0.5 < mask.float().mean() <= 0.625  # 10 of 16 patches; a pixel may be grey by itself
        assert (drawing.masked[:, mask] == GREY).all()
        assert torch.equal(drawing.reconstruction[:, ~mask], drawing.image[:, ~mask])
        tokens = torch.nn.functional.max_pool2d(mask[None, None].float(), 4)[0, 0].bool()
        with torch.no_grad():
            answer = home.model.reconstruct(image, tokens[None])
        wanted = normalise.undo(home.model.undo_target(answer, image))[0]
        assert_same_pixels(drawing.reconstruction[:, mask], wanted[:, mask])


def test_masks_are_those_of_validation(home):
    """The mean error over what is hidden in the drawings is the validation loss."""
    drawings, *_ = reconstruct(home.run_dir, [], [], count=12)
    images = normalise(torch.stack([drawing.image for drawing in drawings]))
    mask = torch.stack([hidden(drawing) for drawing in drawings])
    tokens = torch.nn.functional.max_pool2d(mask[:, None].float(), 4)[:, 0].bool()
    with torch.no_grad():
        loss = home.model(images, tokens)
    assert loss.item() == pytest.approx(evaluate(home.run_dir, [])["loss"], rel=1e-4)


def test_files_have_a_mask_of_their_name(home, tmp_path):
    for name in ("k00003.png", "other.png"):
        (tmp_path / name).write_bytes(image_bytes(3))
    (tmp_path / "broken.png").write_bytes(b"broken")
    first, again = (reconstruct(home.run_dir, [str(tmp_path)], [], count=9) for _ in range(2))
    assert [Path(drawing.name).name for drawing in first[0]] == ["k00003.png", "other.png"] and first[1] == 3
    assert len(first[2]) == 1 and "broken.png: cannot be decoded" in first[2][0]
    assert all(torch.equal(a.masked, b.masked) for a, b in zip(first[0], again[0], strict=True))
    sample = reconstruct(home.run_dir, [], [], count=4)[0][3]  # the same image and key in a shard
    assert_same_pixels(first[0][0].reconstruction, sample.reconstruction)
    assert not torch.equal(first[0][1].masked, sample.masked)


def test_a_picture(home, tmp_path, capsys):
    out = tmp_path / "new/picture.png"
    assert main(["reconstruct", str(home.run_dir), "--out", str(out), "--count", "4"]) == 0
    assert capsys.readouterr().out == f"{out}: 4 of 12 images, more by --count N\n"
    grid = np.asarray(Image.open(out))
    assert grid.shape == (2 * 35 + 3, 6 * 35 + 3, 3)  # two rows of two images, three tiles each, 3 pixels apart
    drawings, *_ = reconstruct(home.run_dir, [], [], count=4)
    assert np.array_equal(grid[38:70, 3:35], drawings[2].image.permute(1, 2, 0))
    assert np.array_equal(grid[3:35, 178:210], drawings[1].reconstruction.permute(1, 2, 0))


def test_a_page(home, tmp_path, capsys):
    (tmp_path / "a<b>.png").write_bytes(image_bytes(1))
    out = tmp_path / "page.html"
    words = ["--out", str(out), str(tmp_path / "a<b>.png"), "batch.eval_batch=1"]
    assert main(["reconstruct", str(home.run_dir), *words]) == 0
    assert capsys.readouterr().out == f"{out}: 1 of 1 images\n"
    text = out.read_text()
    assert "a&lt;b&gt;.png" in text and "<b>" not in text and "http" not in text
    tiles = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in re.findall(r"base64,([^\"]+)", text)
    ]
    drawing = reconstruct(home.run_dir, [str(tmp_path / "a<b>.png")], [], count=1)[0][0]
    for tile, tensor in zip(tiles, (drawing.image, drawing.masked, drawing.reconstruction), strict=True):
        assert np.array_equal(tile, tensor.permute(1, 2, 0))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "a.jpg"], "--out a.jpg: the suffix decides the kind of file; it must be .png or .html"),
        (["--out", "{tmp}/a.png", "{tmp}/broken.png"], "a.png: no image could be decoded, so there is nothing to draw"),
        (["--out", "a.png", "nothing.png"], "no image found: nothing.png"),
        (["--out", "a.png", "data.val=null"], "data.val: missing, the run has no validation images; give images"),
    ],
)
def test_errors(home, tmp_path, capsys, words, message):
    (tmp_path / "broken.png").write_bytes(b"broken")
    assert main(["reconstruct", str(home.run_dir), *(word.format(tmp=tmp_path) for word in words)]) == 1
    assert message in capsys.readouterr().err


def test_a_classifier_reconstructs_nothing(home, tmp_path):
    tree = tiny_recipe(home.folder, task={"name": "classify", "num_classes": 3})
    run_dir = run_directory(tmp_path / "run", tree, torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="the run's task is classify; only a SimMIM run reconstructs images"):
        reconstruct(run_dir, [], [], count=1)
