"""Layer numbers for learning-rate decay: each family's as its authors count, in timm's networks too."""

import pytest
import timm

from dsmim.models import create_model, layer_ids

TINY = {"embed_dim": 32, "depth": 3, "num_heads": 1, "img_size": 32, "num_classes": 2}
SWIN = {"embed_dim": 32, "depths": (1, 2, 2, 1), "num_heads": (1, 2, 4, 8), "num_classes": 2}


def as_beit_mae_and_simmim_count(name: str, blocks: int) -> int:
    """get_layer_id_for_vit (BEiT, MAE), get_vit_layer (SimMIM): one rule."""
    if name in ("cls_token", "mask_token", "pos_embed") or name.startswith("patch_embed"):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks") else blocks + 1


VITS = [
    ("vit_base_patch16_224", {}),  # a class token, and the norm before the head
    ("vit_base_patch16_224", {"global_pool": "avg"}),  # fc_norm
    ("beit_base_patch16_224", {}),
    ("beit_base_patch16_224", {"global_pool": "token", "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
]


@pytest.mark.parametrize(("name", "options"), VITS)
def test_vits_of_timm(name, options):
    model = timm.create_model(name, **TINY, **options)
    ids = layer_ids(model)
    assert ids == {key: as_beit_mae_and_simmim_count(key, 3) for key, _ in model.named_parameters()}
    norm = "fc_norm.weight" if "fc_norm.weight" in ids else "norm.weight"
    assert ids[norm] == ids["head.weight"] == 4 and ids["blocks.2.norm1.weight"] == 3


def test_tokens_and_a_norm_before_the_blocks():
    registers = timm.create_model("vit_small_patch14_reg4_dinov2", **{**TINY, "img_size": 28})
    assert layer_ids(registers)["reg_token"] == 0 and layer_ids(registers)["norm.weight"] == 4
    clip = timm.create_model("vit_base_patch16_clip_224", **TINY)
    assert layer_ids(clip)["norm_pre.weight"] == 0 and layer_ids(clip)["norm.weight"] == 4


@pytest.mark.parametrize("name", ["swin_base_patch4_window7_224", "swinv2_base_window12_192"])
def test_swin_of_timm_counts_as_microsoft_simmim(name):
    """get_swin_layer, with the authors' place of the downsampling: at the end of a stage."""
    model, depths = timm.create_model(name, **SWIN), SWIN["depths"]

    def expected(key):
        if key.startswith("patch_embed"):
            return 0
        if not key.startswith("layers"):
            return sum(depths) + 1
        stage = int(key.split(".")[1])
        if key.split(".")[2] == "downsample":
            return sum(depths[:stage])  # that of the stage before, in the authors' files: depths[: layer_id + 1]
        return sum(depths[:stage]) + int(key.split(".")[3]) + 1

    assert layer_ids(model) == {key: expected(key) for key, _ in model.named_parameters()}


def test_other_networks_of_timm_count_as_timm_does():
    model = create_model("timm:convnext_atto", num_classes=2)
    assert layer_ids(model)["head.fc.weight"] == max(layer_ids(model).values())
