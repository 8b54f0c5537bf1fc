"""Our Swin V2 against timm's, which computes eagerly what we compute in three other ways."""

import math

import pytest
import torch
from timm.models.swin_transformer_v2 import SwinTransformerV2 as Timm
from torch.nn import functional as F

from dsmim.models import Recompute, create_model, fix_position_bias, set_recompute
from dsmim.models.attention import blockwise as blocks
from dsmim.models.attention.cosine import attend, blockwise, fused, sequential
from dsmim.models.swin_sizes import SIZES


def awake(model, seed: int = 0):
    """Every parameter away from its first value, residual branches included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def pair(img_size: int, window_size: int, pretrained=None, **options):
    """(ours, timm's) with the same weights."""
    sizes = {"img_size": img_size, "window_size": window_size, "num_classes": 3}
    ours = awake(create_model("swinv2_nano", **sizes, pretrained_window_sizes=pretrained, **options))
    theirs = Timm(**sizes, pretrained_window_sizes=pretrained or (0,) * 4, drop_path_rate=0.0, **SIZES["swinv2_nano"])
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def gradients(model, images, weight):
    inputs = images.clone().requires_grad_()
    logits = model(inputs)
    names = ["images", *(name for name, _ in model.named_parameters())]
    found = torch.autograd.grad((logits * weight).sum(), [inputs, *model.parameters()])
    return logits, dict(zip(names, found, strict=True))


@pytest.mark.parametrize(
    ("img_size", "window", "pretrained"),
    [(64, 4, None), (96, 6, (4, 4, 4, 2)), (96, 5, None), (128, 16, None)],
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


def eager(qkv, window, scale, bias, mask=None):
    """Cosine attention as timm writes it, on windows cut out one by one."""
    B, height, width, _, H, D = qkv.shape
    out = torch.zeros(B, height, width, H * D)
    for number, (y, x) in enumerate(
        (y, x) for y in range(0, height, window) for x in range(0, width, window)
    ):  # row by row
        place = (slice(None), slice(y, y + window), slice(x, x + window))
        q, k, v = qkv[place].flatten(1, 2).permute(2, 0, 3, 1, 4)  # (B, H, N, D) each
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * scale + bias
        scores = scores if mask is None else scores + mask[number]
        out[place] = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, window, window, H * D)
    return out


WAYS = {
    "blockwise": blockwise,
    "fused": fused,
    "sequential": lambda *inputs: sequential(*inputs, scores=3 * inputs[3].numel()),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("block", [1, 2**20], ids=["one window a block", "all in one block"])
def test_every_way_to_attend_equals_the_eager_one(way, masked, block, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", block)
    torch.manual_seed(0)
    B, R, P, w, H, D = 3, 2, 4, 3, 2, 8
    qkv = torch.randn(B, R * w, P * w, 3, H, D, requires_grad=True)
    scale, bias = torch.tensor([5.0, 90.0]).view(H, 1, 1).requires_grad_(), torch.randn(H, 9, 9, requires_grad=True)
    mask = (torch.rand(R * P, 9, 9) < 0.3) * -100.0 if masked else None
    weight = torch.randn(B, R * w, P * w, H * D)
    results = []
    for attention in (WAYS[way], eager):
        out = attention(qkv, w, scale, bias, mask)
        results.append([out, *torch.autograd.grad((out * weight).sum(), (qkv, scale, bias))])
    for mine, expected in zip(*results, strict=True):
        assert (mine - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_vanished_query_or_key_does_no_harm():
    """normalize(0) is 0, and its gradient finite, in every way."""
    qkv = torch.randn(1, 2, 2, 3, 1, 4)
    qkv[0, 0, 0, :2] = 0
    for attention in WAYS.values():
        leaf = qkv.clone().requires_grad_()
        out = attention(leaf, 2, torch.ones(1, 1, 1), torch.zeros(1, 4, 4), None)
        out.sum().backward()
        assert out.isfinite().all() and leaf.grad.isfinite().all()
        assert torch.allclose(out, eager(qkv, 2, torch.ones(1, 1, 1), torch.zeros(1, 4, 4)), atol=1e-6)


def test_a_nan_does_not_stay_behind():
    """Buffers are kept from call to call."""
    qkv, scale, bias = torch.randn(1, 8, 8, 3, 2, 4), torch.ones(2, 1, 1), torch.zeros(2, 16, 16)
    before = attend(qkv, 4, scale, bias)
    assert attend(qkv * math.nan, 4, scale, bias).isnan().all()
    assert torch.equal(attend(qkv, 4, scale, bias), before)


def test_inference_mode_spoils_no_later_step():
    blocks._LOCAL.__dict__.clear()
    qkv, scale, bias = torch.randn(1, 8, 8, 3, 2, 4), torch.ones(2, 1, 1), torch.zeros(2, 16, 16)
    with torch.inference_mode():
        before = attend(qkv, 4, scale, bias).clone()
    assert torch.equal(attend(qkv, 4, scale, bias), before)


def test_sequential_stages_change_nothing():
    one, other = (create_model("swinv2_nano", img_size=64, window_size=4, sequential_stages=n) for n in (0, 2))
    assert [block.attn.in_sequence for stage in other.layers for block in stage.blocks] == [True] * 2 + [False] * 4
    other.load_state_dict(one.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(one(images), other(images))


def test_the_fixed_bias_is_the_computed_one_and_goes_with_the_weights():
    model = awake(create_model("swinv2_nano", img_size=64, window_size=4, num_classes=3)).eval()
    images = torch.randn(1, 3, 64, 64)
    expected = model(images)
    fix_position_bias(model)
    attention = model.layers[0].blocks[0].attn
    assert attention.fixed_bias is not None and torch.equal(model(images), expected)
    model.load_state_dict(create_model("swinv2_nano", img_size=64, window_size=4, num_classes=3).state_dict())
    assert attention.fixed_bias is None and not torch.equal(model(images), expected)
    fix_position_bias(model)
    assert model.train().layers[0].blocks[0].attn.fixed_bias is None


def test_the_bias_s_shift_is_none_to_the_softmax_and_keeps_digits():
    model = awake(create_model("swinv2_nano", img_size=64, window_size=4))
    bias = model.layers[2].blocks[0].attn.position_bias()
    assert bias.shape == (4, 16, 16) and bias.flatten(1).amax(1).tolist() == [0.0] * 4


def test_fp32_islands_under_bf16():
    """What reaches the scores from scale and bias is computed in fp32, and the result stays close to fp32's."""
    model = awake(create_model("swinv2_nano", img_size=64, window_size=4, num_classes=3))
    images, seen = torch.randn(2, 3, 64, 64), []
    from dsmim.models.attention import window as module

    def spy(qkv, window, scale, bias, *rest):
        seen.append((qkv.dtype, scale.dtype, bias.dtype))
        return attend(qkv, window, scale, bias, *rest)

    original, module.attend = module.attend, spy
    try:
        with torch.autocast("cpu", torch.bfloat16):
            low = model(images)
    finally:
        module.attend = original
    assert set(seen) == {(torch.bfloat16, torch.float32, torch.float32)}
    assert (low.float() - model(images)).abs().max() < 0.05 * model(images).abs().max()
    assert all(getattr(layer, "keep_fp32", False) for layer in model.layers[0].blocks[0].attn.cpb_mlp[::2])


def test_extra_norms_stand_where_the_authors_put_them():
    """Every sixth block of a stage: in stage 3 blocks 5, 11 and 17 (data of microsoft's later code)."""
    model = create_model("swinv2_huge", "meta", img_size=192, window_size=12, extra_norm_every=6)
    found = [name for name in model.state_dict() if ".enorm.weight" in name]
    assert found == [f"layers.2.blocks.{block}.enorm.weight" for block in (5, 11, 17)]
    small = awake(create_model("swinv2_nano", img_size=64, window_size=4, extra_norm_every=3))
    block, x = small.layers[2].blocks[2], torch.randn(1, 4, 4, 128)
    plain, block.enorm = block.enorm, None
    without = block(x)
    block.enorm = plain
    assert torch.equal(block(x), F.layer_norm(without, (128,), plain.weight, plain.bias))


@pytest.mark.parametrize("choice", [Recompute(1), Recompute(2), Recompute(1, stages=2)])
@pytest.mark.parametrize(("name", "options"), [("swinv2_nano", {"window_size": 4}), ("deit3_nano_patch16", {})])
def test_recomputing_changes_no_gradient(name, options, choice):
    """Drop path draws the same both times."""
    model = awake(create_model(name, img_size=64, num_classes=3, drop_path_rate=0.5, **options)).train()
    images, weight, results = torch.randn(4, 3, 64, 64), torch.randn(4, 3), []
    for recompute in (Recompute(), choice):
        set_recompute(model, recompute)
        torch.manual_seed(7)
        results.append(gradients(model, images, weight))
    assert torch.equal(results[0][0], results[1][0])
    for name, value in results[0][1].items():
        assert torch.equal(value, results[1][1][name]), name


def test_which_blocks_are_recomputed():
    assert [Recompute(2)(block) for block in range(4)] == [False, True, False, True]
    assert [Recompute(1, stages=1)(0, stage) for stage in (0, 1)] == [True, False]
    assert not Recompute()(0)


def test_wrong_options_name_the_key():
    cases = [
        ({"window_size": None}, "model.window_size: swinv2_nano attends within windows"),
        ({"pretrained_window_sizes": (4, 4)}, "has 4 stages, got 2 sizes"),
        ({"options": {"global_pool": "avg"}}, "model.options: swinv2_nano is not a network of timm"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            create_model("swinv2_nano", **{"img_size": 64, "window_size": 4} | options)
