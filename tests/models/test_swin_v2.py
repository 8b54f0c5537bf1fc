"""Swin V2 against timm's: outputs, gradients, first weights, extra norms."""

import pytest
import timm
import torch
from packaging.version import Version
from timm.models.swin_transformer_v2 import SwinTransformerV2 as Timm
from torch.nn import functional as F

from dsmim.models import create_model
from dsmim.models.swin_sizes import SIZES
from tests.models.networks import gradients, perturbed


def pair(img_size: int, window_size: int, pretrained=None, **options):
    """Return (ours, timm's) with the same weights."""
    sizes = {"img_size": img_size, "window_size": window_size, "num_classes": 3}
    ours = perturbed(create_model("swinv2_nano", **sizes, pretrained_window_sizes=pretrained, **options))
    theirs = Timm(**sizes, pretrained_window_sizes=pretrained or (0,) * 4, drop_path_rate=0.0, **SIZES["swinv2_nano"])
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


PADDED = pytest.mark.skipif(
    Version(timm.__version__) < Version("1.0.31"),
    reason="timm's Swin V2 fails where the window does not divide the map",
)


@pytest.mark.parametrize(
    ("img_size", "window", "pretrained"),
    [(64, 4, None), (96, 6, (4, 4, 4, 2)), pytest.param(96, 5, None, marks=PADDED), (128, 16, None)],
    ids=["shifted", "another pre-trained window", "padded", "clamped"],
)
def test_outputs_and_gradients_equal_timm_s(img_size, window, pretrained):
    torch.manual_seed(0)  # the gradient of a scale is a sum that can cancel almost to zero
    ours, theirs = pair(img_size, window, pretrained)
    images, weight = torch.randn(2, 3, img_size, img_size), torch.randn(2, 3)
    (mine, own), (other, expected) = gradients(ours, images, weight), gradients(theirs, images, weight)
    assert torch.allclose(mine, other, rtol=1e-5, atol=1e-5)
    for name, value in expected.items():
        assert (own[name] - value).abs().max() <= 1e-4 * value.abs().max(), name


def test_every_parameter_is_initialised_and_respostnorm_starts_at_zero():
    model = create_model("swinv2_nano", img_size=64, window_size=4, num_classes=3)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert all(p.abs().sum() == 0 for n, p in model.named_parameters() if ".norm1." in n or ".norm2." in n)
    assert model.layers[0].blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_parameters_and_windows_of_the_paper_s_finetuning_model():
    model = create_model("swinv2_base", img_size=224, window_size=14, num_classes=1000)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(87.92, abs=0.006)
    assert [stage.blocks[0].attn.window for stage in model.layers] == [14, 14, 14, 7]


def test_extra_norms_are_where_the_authors_put_them():
    """Every sixth block of a stage: in stage 3 blocks 5, 11 and 17 (data of microsoft's later code)."""
    model = create_model("swinv2_huge", "meta", img_size=192, window_size=12, extra_norm_every=6)
    found = [name for name in model.state_dict() if ".enorm.weight" in name]
    assert found == [f"layers.2.blocks.{block}.enorm.weight" for block in (5, 11, 17)]
    small = perturbed(create_model("swinv2_nano", img_size=64, window_size=4, extra_norm_every=3))
    block, x = small.layers[2].blocks[2], torch.randn(1, 4, 4, 128)
    plain, block.enorm = block.enorm, None
    without = block(x)
    block.enorm = plain
    assert torch.equal(block(x), F.layer_norm(without, (128,), plain.weight, plain.bias))
