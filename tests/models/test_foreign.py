"""Networks of timm by name: wrong names, tags and options end in one message with the fix."""

import pytest

from dsmim.models import create_model, timm_arguments

VIT = "timm:vit_tiny_patch16_224"


def test_a_wrong_tag_lists_the_tags_that_exist():
    message = r"no tag 'foo' of vit_tiny_patch16_224; its tags: augreg_in21k_ft_in1k, augreg_in21k"
    with pytest.raises(ValueError, match=message):
        create_model(f"{VIT}.foo", img_size=32)
    with pytest.raises(ValueError, match=message):
        timm_arguments(f"{VIT}.foo", img_size=32)
    with pytest.raises(ValueError, match=r"no model 'vit_tiny_patch16_225'; did you mean timm:vit_tiny_patch16_224\?"):
        create_model("timm:vit_tiny_patch16_225", img_size=32)
    assert create_model(f"{VIT}.augreg_in21k", img_size=32, num_classes=2).num_classes == 2


def test_options_that_a_key_of_the_recipe_sets():
    owned = {
        "in_chans": (1, r"model\.in_chans"),
        "img_size": ([32, 64], r"model\.img_size; images are square"),
        "num_classes": (7, r"task\.num_classes"),
        "drop_path_rate": (0.1, r"model\.drop_path_rate"),
        "pretrained": (True, r"model\.weights to a file; nothing is downloaded"),
        "checkpoint_path": ("x.pth", r"model\.weights"),
        "head_init_scale": (0.001, r"model\.head_init_std"),
    }
    for key, (value, recipe_key) in owned.items():
        with pytest.raises(ValueError, match=rf"model\.options: not {key} \(set {recipe_key}"):
            create_model(VIT, img_size=32, options={key: value, "global_pool": "avg"})
    with pytest.raises(ValueError, match=r"not in_chans \(set .*\), num_classes \(set task\.num_classes\)"):
        create_model(VIT, img_size=32, options={"in_chans": 1, "num_classes": 7})


@pytest.mark.parametrize(
    ("options", "named"),
    [({"foo": 1}, "'foo'"), ({"depth": "x"}, "depth='x'"), ({"global_pool": "no"}, "global_pool='no'")],
)
def test_what_timm_does_not_take_is_named(options, named):
    with pytest.raises(ValueError, match=f"vit_tiny_patch16_224 does not take these settings: .*{named}"):
        create_model(VIT, img_size=32, options=options)


def test_a_drop_path_rate_that_a_network_does_not_have():
    with pytest.raises(ValueError, match=r"vgg11 does not take these settings: .*drop_path_rate=0\.1"):
        create_model("timm:vgg11", drop_path_rate=0.1, num_classes=2)
