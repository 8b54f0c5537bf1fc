"""ViTs as DeiT III trains them, SimMIM with a ViT, and networks of timm by name."""

import pytest
import timm
import torch
from timm.layers import LayerScale
from torch import nn

from dsmim.data.masking import RandomMask
from dsmim.models import Recompute, SimMIM, compile_blocks, create_model, layer_ids, set_recompute, timm_arguments
from tests.models.networks import perturbed
from tests.models.test_simmim import slow_loss


def test_first_weights_are_those_of_the_authors_code():
    torch.manual_seed(0)
    model = create_model("deit3_tiny_patch16", img_size=224, num_classes=1000)
    spread = {name: p.std().item() for name, p in model.named_parameters() if p.numel() > 100 and p.ndim > 1}
    for name in ("cls_token", "pos_embed", "head.weight", "blocks.3.attn.qkv.weight", "blocks.11.mlp.fc2.weight"):
        assert spread[name] == pytest.approx(0.02, rel=0.15), name
    assert model.patch_embed.proj.weight.std().item() == pytest.approx((1 / 3 / 768) ** 0.5, rel=0.1)  # torch's own
    gammas = [m.gamma for m in model.modules() if isinstance(m, LayerScale)]
    assert len(gammas) == 24 and all((gamma == 1e-4).all() for gamma in gammas)
    assert model.pos_embed.shape == (1, 196, 192)  # no position for the class token
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith("bias") and "patch" not in name)


def test_images_that_are_not_a_multiple_of_the_patch():
    model = create_model("deit3_huge_patch14", "meta", img_size=160, num_classes=10)
    assert model.pos_embed.shape[1] == 121 and model(torch.empty(1, 3, 160, 160, device="meta")).shape == (1, 10)
    assert create_model("deit3_huge_patch14", "meta", img_size=126).pos_embed.shape[1] == 81


def test_parallel_branches_are_a_sum():
    """models_v2.py: x += gamma_1 attn(norm1 x) + gamma_1_1 attn1(norm11 x), then the same of two MLPs."""
    model = create_model("deit3_small_patch16_18x2", "meta", img_size=32)
    block = perturbed(model.blocks[0].to_empty(device="cpu").apply(_restart))
    x = torch.randn(2, 5, 384)
    expected = x + sum(a.ls(a.attn(a.norm(x))) for a in block.attns)
    expected = expected + sum(f.ls(f.mlp(f.norm(expected))) for f in block.ffns)
    assert torch.allclose(block(x), expected, atol=1e-6)


def _restart(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        nn.init.normal_(parameter, std=0.02)


def test_logits_equal_timm_s():
    ours = perturbed(create_model("deit3_nano_patch16", img_size=64, num_classes=5)).eval()
    entry, arguments = timm_arguments("deit3_nano_patch16", img_size=64, num_classes=5)
    theirs = timm.create_model(entry, **arguments).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert torch.allclose(ours(images), theirs(images), atol=1e-6)


def test_simmim_with_a_vit():
    torch.manual_seed(0)
    model = perturbed(SimMIM(create_model("deit3_nano_patch16", img_size=64), target_window=7)).eval()
    images, mask = torch.randn(2, 3, 64, 64), torch.stack([RandomMask(64, 32, 16, 0.5)() for _ in range(2)])
    assert model.reconstruct(images, mask).shape == images.shape
    assert model(images, mask).item() == pytest.approx(slow_loss(model, images, mask), rel=1e-5)
    changed = images + 100 * model.hidden_pixels(mask)
    assert torch.equal(model.reconstruct(images, mask), model.reconstruct(changed, mask))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("timm:beit_base_patch16_224", {"depth": 2, "embed_dim": 64, "num_heads": 2}),
        ("timm:vit_tiny_patch16_224", {"depth": 2, "global_pool": "avg"}),
        ("timm:convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}),
    ],
)
def test_networks_of_timm(name, options):
    model = create_model(name, img_size=64, num_classes=3, drop_path_rate=0.1, options=options).eval()
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 3)
    ids = layer_ids(model)
    assert ids.keys() == dict(model.named_parameters()).keys()
    head = next(name for name in ids if name.startswith("head"))
    assert min(ids.values()) == 0 and ids[head] == max(ids.values()) > 1
    entry, arguments = timm_arguments(name, img_size=64, num_classes=3, drop_path_rate=0.1, options=options)
    assert timm.create_model(entry, **arguments).state_dict().keys() == model.state_dict().keys()
    set_recompute(model, Recompute(1))
    with pytest.raises(ValueError, match=r"model\.grad_checkpointing: a network of timm recomputes every block"):
        set_recompute(model, Recompute(2))


def test_networks_of_timm_without_drop_path_or_layers():
    model = create_model("timm:ghostnet_050", img_size=64, num_classes=3)
    assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 3)
    with pytest.raises(ValueError, match="timm gives no layer numbers for this network"):
        layer_ids(nn.Linear(2, 2))


def test_errors_for_what_timm_does_not_take():
    with pytest.raises(ValueError, match="did you mean timm:vit_tiny_patch16_224"):
        create_model("timm:vit_tiny_patch16_22", img_size=64)
    with pytest.raises(ValueError, match="does not take these settings"):
        create_model("timm:vit_tiny_patch16_224", img_size=64, options={"nonsense": 1})
    with pytest.raises(ValueError, match="has no windows"):
        create_model("timm:vit_tiny_patch16_224", img_size=64, window_size=7)
    with pytest.raises(ValueError, match="simmim pre-trains dsmim's own networks"):
        SimMIM(create_model("timm:vit_tiny_patch16_224", img_size=64, options={"depth": 1}))
    with pytest.raises(ValueError, match=r"model\.compile: this network of timm has no blocks"):
        compile_blocks(nn.Linear(2, 2))
