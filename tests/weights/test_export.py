"""Exported weights: each layout is what its readers expect; export and reading back give equal weights, bit for bit."""

import json
import os
import re
import stat

import pytest
import safetensors
import timm
import torch

from dsmim.cli.main import main
from dsmim.models import SimMIM, create_model
from dsmim.models.vit import DeiT3, ParallelThingsBlock
from dsmim.weights.export import LAYOUTS, export, swin_as_authors
from dsmim.weights.files import read, warm_start
from dsmim.weights.layouts import to_deit, to_native
from dsmim.weights.match import Weights, match
from tests.conftest import tiny_recipe
from tests.weights.weight_files import (
    VIT,
    deit_as_published,
    images,
    nano,
    nano_deit,
    nano_simmim,
    run_directory,
    scrambled,
    swin_as_published,
    timm_deit,
    timm_swin,
)

SWIN = {"name": "swinv2_nano", "img_size": 64, "window_size": 4}
CLASSIFY = {"name": "classify", "num_classes": 5}


def simmim_run(folder, **changes):
    settings = SWIN | changes
    model = scrambled(SimMIM(create_model(**settings)))
    return run_directory(folder / "run", tiny_recipe(folder, model=settings), model), model


def classifier_run(folder, settings):
    model = scrambled(create_model(num_classes=5, **settings))
    return run_directory(folder / "run", tiny_recipe(folder, task=CLASSIFY, model=settings), model), model


def assert_identical(state, model):
    own = model.state_dict()
    assert state.keys() == own.keys() and all(torch.equal(state[key], own[key]) for key in own)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_and_back_is_the_identity(tmp_path, layout, suffix):
    run, model = simmim_run(tmp_path)
    line = export(run, out := tmp_path / f"simmim{suffix}", layout)
    report, state = warm_start(nano_simmim(), out)
    if layout == "timm":
        assert line.startswith("# left out (timm has no place for it): mask_token, decoder.0.weight, decoder.0.bias\n")
        assert report.fresh == ["decoder.0.bias", "decoder.0.weight", "mask_token"]
        assert_identical({key.removeprefix("encoder."): value for key, value in state.items()}, model.encoder)
    else:
        assert_identical(state, model)
    assert report.notes == []  # the file names its windows
    other, classifier = classifier_run(tmp_path / "fine", SWIN)
    export(other, out := tmp_path / f"classifier{suffix}", layout)
    assert_identical(warm_start(nano(), out, "keep")[1], classifier)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_deit3_export_and_back(tmp_path, layout, suffix):
    run, model = classifier_run(tmp_path, {"name": "deit3_nano_patch16", "img_size": 64})
    export(run, out := tmp_path / f"deit{suffix}", layout)
    assert_identical(warm_start(nano_deit(), out, "keep")[1], model)
    assert any("gamma_1" in key for key in read(out).tensors) == (layout == "authors")


def test_parallel_blocks_export_and_back():
    model = scrambled(DeiT3(0.0, 16, img_size=64, num_classes=5, block_fn=ParallelThingsBlock, **VIT))
    state = {to_deit(key): value for key, value in model.state_dict().items()}
    assert set(state) == set(deit_as_published(timm_deit(parallel=True)))
    assert_identical(to_native(state, model.state_dict(), "test").tensors, model)


def test_the_line_for_timm_gives_the_same_logits(tmp_path):
    run, model = classifier_run(tmp_path, SWIN | {"window_size": 2, "pretrained_window_sizes": [4, 4, 4, 2]})
    for suffix in (".pth", ".safetensors"):
        theirs = eval(export(run, tmp_path / f"model{suffix}"), {"timm": timm}).eval()
        assert type(theirs).__module__.startswith("timm.")
        with torch.no_grad():
            torch.testing.assert_close(theirs(images()), model(images()), rtol=1e-4, atol=1e-4)
    with safetensors.safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["architecture"].startswith("swinv2_") and metadata["source"] == "tiny"
    assert json.loads(metadata["model_args"])["window_size"] == 2
    report, _ = warm_start(nano(window_size=3, pretrained_window_sizes=(4, 4, 4, 2)), tmp_path / "model.pth", "keep")
    assert report.changed == {"attention windows": "[2,2,2,2] → [3,3,3,2], coordinates unchanged"}
    with pytest.raises(ValueError, match=r"pretrained_window_sizes=\[4,4,4,2\]"):
        warm_start(nano(window_size=2), tmp_path / "model.safetensors", "keep")


def test_the_authors_layout_holds_their_buffers(tmp_path):
    """At 128 pixels the second block of stage 3 is shifted, so that there is a mask too."""
    run, model = classifier_run(tmp_path, SWIN | {"img_size": 128})
    export(run, out := tmp_path / "model.pth", "authors")
    content = torch.load(out, weights_only=True)
    theirs = timm_swin(img_size=128)
    expected = swin_as_published(theirs)
    assert set(content) == {"model"} and set(content["model"]) == set(expected)
    assert "layers.2.blocks.1.attn_mask" in expected
    for key, value in content["model"].items():
        assert value.shape == expected[key].shape and value.dtype == expected[key].dtype, key
        if re.search("coords_table|position_index|attn_mask", key):
            torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-6)
    theirs.load_state_dict(match(theirs, Weights(content["model"], "test"), "keep")[1])
    with torch.no_grad():
        torch.testing.assert_close(theirs(images(128)), model(images(128)), rtol=1e-4, atol=1e-4)


def published_names_of_base() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the released simmim_swinv2_base files (192 pixels, window 12)."""
    shapes = {"encoder.mask_token": (1, 1, 128), "decoder.0.weight": (3072, 1024, 1, 1), "decoder.0.bias": (3072,)}
    shapes |= {"encoder.patch_embed.proj.weight": (128, 3, 4, 4), "encoder.patch_embed.proj.bias": (128,)}
    shapes |= {f"encoder.patch_embed.norm.{part}": (128,) for part in ("weight", "bias")}
    shapes |= {f"encoder.norm.{part}": (1024,) for part in ("weight", "bias")}
    stages = zip((2, 2, 18, 2), (128, 256, 512, 1024), (4, 8, 16, 32), (12, 12, 12, 6), strict=True)
    for stage, (depth, C, heads, W) in enumerate(stages):
        if stage < 3:
            name = f"encoder.layers.{stage}.downsample"
            shapes |= {f"{name}.reduction.weight": (2 * C, 4 * C), f"{name}.norm.weight": (2 * C,)}
            shapes[f"{name}.norm.bias"] = (2 * C,)
        for block in range(depth):
            name = f"encoder.layers.{stage}.blocks.{block}"
            own = {f"norm{i}.{part}": (C,) for i in (1, 2) for part in ("weight", "bias")}
            own |= {"attn.logit_scale": (heads, 1, 1), "attn.q_bias": (C,), "attn.v_bias": (C,)}
            own |= {"attn.relative_coords_table": (1, 2 * W - 1, 2 * W - 1, 2)}
            own |= {"attn.relative_position_index": (W**2, W**2)}
            own |= {"attn.rpe_mlp.0.weight": (512, 2), "attn.rpe_mlp.0.bias": (512,)}
            own |= {"attn.rpe_mlp.2.weight": (heads, 512), "attn.qkv.weight": (3 * C, C)}
            own |= {"attn.proj.weight": (C, C), "attn.proj.bias": (C,)}
            own |= {"mlp.fc1.weight": (4 * C, C), "mlp.fc1.bias": (4 * C,)}
            own |= {"mlp.fc2.weight": (C, 4 * C), "mlp.fc2.bias": (C,)}
            if stage < 2 and block == 1:
                own["attn_mask"] = ((16, 4)[stage], 144, 144)
            shapes |= {f"{name}.{key}": shape for key, shape in own.items()}
    return shapes


def test_keys_and_shapes_of_the_released_base_model():
    model = SimMIM(create_model("swinv2_base", device="meta", img_size=192, window_size=12))
    weights = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in model.state_dict().items()}
    state = swin_as_authors(model.encoder, weights, simmim=True)
    expected = published_names_of_base()
    assert len(state) == len(expected) == 476  # microsoft/SimMIM: 426 parameters and 50 buffers
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected
    assert len(state) - len(weights) == 50
    assert state["encoder.layers.0.blocks.0.attn.relative_position_index"].dtype == torch.int64
    report, back = match(model, Weights(state, "test"))
    assert report.fresh == [] and back.keys() == weights.keys() and len(report.dropped) == 50
    finetune = create_model("swinv2_base", device="meta", img_size=224, window_size=14, num_classes=1000,
                            pretrained_window_sizes=(12, 12, 12, 6))  # fmt: skip
    report, _ = match(finetune, Weights(state, "test"))
    assert report.changed == {"attention windows": "[12,12,12,6] → [14,14,14,7], coordinates unchanged"}
    weights = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in finetune.state_dict().items()}
    assert len(swin_as_authors(finetune, weights, simmim=False)) == 475


def test_a_model_with_extra_norms_is_exported_for_its_authors_but_not_for_timm(tmp_path):
    run, model = simmim_run(tmp_path, extra_norm_every=2)
    with pytest.raises(ValueError, match=r"no extra norm"):
        export(run, tmp_path / "model.pth")
    for layout in ("authors", "dsmim"):
        export(run, out := tmp_path / f"{layout}.pth", layout)
        assert_identical(warm_start(nano_simmim(extra_norm_every=2), out)[1], model)
        with pytest.raises(ValueError, match=r"set model\.extra_norm_every=2"):
            warm_start(nano_simmim(), out)


def test_what_cannot_be_exported(tmp_path):
    run, _ = simmim_run(tmp_path)
    with pytest.raises(
        ValueError, match=r"model\.onnx: the suffix decides the kind of file; it must be one of \.safetensors, \.pth"
    ):
        export(run, tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="holds no valid checkpoint"):
        export(tmp_path, tmp_path / "model.pth")
    foreign = {"name": "timm:resnet10t", "img_size": 64}
    recipe = tiny_recipe(tmp_path, task=CLASSIFY, model=foreign)
    run = run_directory(tmp_path / "foreign", recipe, timm.create_model("resnet10t", num_classes=5))
    with pytest.raises(ValueError, match="no authors' layout for networks of timm; use --to timm"):
        export(run, tmp_path / "model.pth", "authors")
    assert not (tmp_path / "model.pth").exists()


def test_the_command(tmp_path, capsys):
    run, model = simmim_run(tmp_path)
    out = tmp_path / "deep" / "model.safetensors"
    assert main(["export", str(run), "--to", "dsmim", str(out)]) == 0
    assert f"model.weights={out}" in capsys.readouterr().out
    assert_identical(warm_start(nano_simmim(), out)[1], model)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_the_umask_decides_who_may_read_an_export(tmp_path, suffix, umask, mode):
    run, model = simmim_run(tmp_path)
    before = os.umask(umask)
    try:
        export(run, out := tmp_path / f"model{suffix}", "dsmim")
        export(run, out, "dsmim")  # over an older one
    finally:
        os.umask(before)
    assert stat.S_IMODE(out.stat().st_mode) == mode and list(tmp_path.glob(".*")) == []
    assert_identical(warm_start(nano_simmim(), out)[1], model)
