"""Windowed cosine attention: three implementations against a plain one, the position bias, and fp32 islands."""

import math

import pytest
import torch
from torch.nn import functional as F

from dsmim.models import create_model, fix_position_bias
from dsmim.models.attention import blockwise as blockwise_module
from dsmim.models.attention.cosine import attend, blockwise, fused, sequential
from tests.models.networks import perturbed


def eager(qkv, window, scale, bias, mask=None):
    """Cosine attention as timm writes it, on one window at a time."""
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


IMPLEMENTATIONS = {
    "blockwise": blockwise,
    "fused": fused,
    "sequential": lambda *inputs: sequential(*inputs, scores=3 * inputs[3].numel()),
}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("block", [1, 2**20], ids=["one window a block", "all in one block"])
def test_every_implementation_equals_the_eager_one(name, masked, block, monkeypatch):
    monkeypatch.setattr(blockwise_module, "BLOCK", block)
    torch.manual_seed(0)
    B, R, P, w, H, D = 3, 2, 4, 3, 2, 8
    qkv = torch.randn(B, R * w, P * w, 3, H, D, requires_grad=True)
    scale, bias = torch.tensor([5.0, 90.0]).view(H, 1, 1).requires_grad_(), torch.randn(H, 9, 9, requires_grad=True)
    mask = (torch.rand(R * P, 9, 9) < 0.3) * -100.0 if masked else None
    weight = torch.randn(B, R * w, P * w, H * D)
    results = []
    for attention in (IMPLEMENTATIONS[name], eager):
        out = attention(qkv, w, scale, bias, mask)
        results.append([out, *torch.autograd.grad((out * weight).sum(), (qkv, scale, bias))])
    for mine, expected in zip(*results, strict=True):
        assert (mine - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_query_or_key_of_zeros_gives_finite_results():
    """normalize(0) is 0, and its gradient is finite, in every implementation."""
    qkv = torch.randn(1, 2, 2, 3, 1, 4)
    qkv[0, 0, 0, :2] = 0
    for attention in IMPLEMENTATIONS.values():
        leaf = qkv.clone().requires_grad_()
        out = attention(leaf, 2, torch.ones(1, 1, 1), torch.zeros(1, 4, 4), None)
        out.sum().backward()
        assert out.isfinite().all() and leaf.grad.isfinite().all()
        assert torch.allclose(out, eager(qkv, 2, torch.ones(1, 1, 1), torch.zeros(1, 4, 4)), atol=1e-6)


def test_a_nan_does_not_stay_in_the_buffers():
    """The next call uses the same buffers."""
    qkv, scale, bias = torch.randn(1, 8, 8, 3, 2, 4), torch.ones(2, 1, 1), torch.zeros(2, 16, 16)
    before = attend(qkv, 4, scale, bias)
    assert attend(qkv * math.nan, 4, scale, bias).isnan().all()
    assert torch.equal(attend(qkv, 4, scale, bias), before)


def test_a_step_after_inference_mode_works():
    blockwise_module._LOCAL.__dict__.clear()
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


def test_the_fixed_bias_equals_the_computed_one_and_is_dropped_with_its_weights():
    model = perturbed(create_model("swinv2_nano", img_size=64, window_size=4, num_classes=3)).eval()
    images = torch.randn(1, 3, 64, 64)
    expected = model(images)
    fix_position_bias(model)
    attention = model.layers[0].blocks[0].attn
    assert attention.fixed_bias is not None and torch.equal(model(images), expected)
    model.load_state_dict(create_model("swinv2_nano", img_size=64, window_size=4, num_classes=3).state_dict())
    assert attention.fixed_bias is None and not torch.equal(model(images), expected)
    fix_position_bias(model)
    assert model.train().layers[0].blocks[0].attn.fixed_bias is None


def test_the_largest_position_bias_of_each_head_is_zero():
    model = perturbed(create_model("swinv2_nano", img_size=64, window_size=4))
    bias = model.layers[2].blocks[0].attn.position_bias()
    assert bias.shape == (4, 16, 16) and bias.flatten(1).amax(1).tolist() == [0.0] * 4


def test_fp32_islands_under_bf16():
    """Scale and bias reach the scores in fp32, and the result stays close to fp32's."""
    model = perturbed(create_model("swinv2_nano", img_size=64, window_size=4, num_classes=3))
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
