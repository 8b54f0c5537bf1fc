"""Models by name: unknown names and wrong options, layer ids."""

import pytest

from dsmim.models import create_model, layer_ids, model_names


def test_unknown_model_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean swinv2_base"):
        create_model("swinv2_bass")
    with pytest.raises(ValueError, match=r"^model\.name: no model 'foo'\. Known: .*, timm:NAME$"):
        create_model("foo")
    with pytest.raises(ValueError, match="multiple of 32"):
        create_model("swinv2_nano", img_size=100)
    assert "swinv2_nano" in model_names()


def test_wrong_options_name_the_key():
    cases = [
        ({"window_size": None}, "model.window_size: swinv2_nano attends within windows"),
        ({"pretrained_window_sizes": (4, 4)}, "has 4 stages, got 2 sizes"),
        ({"options": {"global_pool": "avg"}}, "model.options: swinv2_nano is not a network of timm"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            create_model("swinv2_nano", **{"img_size": 64, "window_size": 4} | options)


def test_windows_are_refused():
    with pytest.raises(ValueError, match=r"model\.window_size: deit3_nano_patch16 has no windows"):
        create_model("deit3_nano_patch16", img_size=64, window_size=4)


def test_layer_ids_of_the_base_model():
    ids = layer_ids(create_model("swinv2_base", img_size=192, window_size=12, num_classes=10))
    assert ids["patch_embed.proj.weight"] == 0 and ids["layers.0.blocks.0.attn.qkv.weight"] == 1
    # downsampling goes with the last block before it; timm names it after the next stage
    assert ids["layers.1.downsample.reduction.weight"] == 2 == ids["layers.0.blocks.1.norm1.weight"]
    assert ids["layers.3.downsample.norm.bias"] == 22 == ids["layers.2.blocks.17.mlp.fc1.weight"]
    assert ids["head.fc.weight"] == ids["norm.weight"] == 25


def test_layer_ids_of_a_vit():
    ids = layer_ids(create_model("deit3_nano_patch16", "meta", img_size=64, num_classes=5))
    assert {ids[name] for name in ("cls_token", "pos_embed", "patch_embed.proj.weight")} == {0}
    assert ids["blocks.0.norm1.weight"] == 1 and ids["blocks.3.ls2.gamma"] == 4
    assert ids["norm.weight"] == ids["head.bias"] == 5
