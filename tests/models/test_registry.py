"""Models by name: unknown names and wrong options, layer ids."""

import pytest
import torch

from dsmim.models import create_model, layer_ids, materialise, model_names


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


@pytest.mark.parametrize("name", ["swinv2_nano", "deit3_nano_patch16", "timm:vit_tiny_patch16_224"])
def test_an_unknown_option_names_the_nearest(name):
    with pytest.raises(
        ValueError, match=r"no option num_clases; did you mean num_classes\? Options: img_size, in_chans"
    ):
        create_model(name, img_size=64, num_clases=5)
    with pytest.raises(ValueError, match=r"no option global_pool, foo; .* options=\{'global_pool': …\}"):
        create_model(name, img_size=64, global_pool="avg", foo=1)


@pytest.mark.parametrize("name", ["swinv2_nano", "deit3_nano_patch16"])
def test_within_torchs_context_a_network_is_built_there(name):
    options = {"img_size": 64, "window_size": 4 if name.startswith("swin") else None}
    with torch.device("meta"):
        model = create_model(name, **options)
        filled = create_model(name, "cpu", **options)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(tensor.is_meta for tensor in [*filled.parameters(), *filled.buffers()])
    list(materialise(model))
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 64)).isfinite().all()


@pytest.mark.parametrize("name", ["deit3_nano_patch16", "timm:vit_tiny_patch16_224", "timm:beit_base_patch16_224"])
def test_a_border_that_no_patch_sees_is_named(name):
    with pytest.warns(
        UserWarning, match=r"img_size: 33 pixels.*patch of .* \(16\): the last 1 rows and columns.* 32 pix"
    ):
        create_model(name, img_size=33)
    with pytest.raises(ValueError, match=r"model\.img_size: 8 is less than a patch of .* \(16 pixels\)"):
        create_model(name, img_size=8)


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
