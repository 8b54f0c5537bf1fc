"""Parameter groups and the optimizer that is made of them."""

import pytest
import torch
from torch import nn

from dsmim.engine.optim import build_optimizer, check_patterns, parameter_groups
from dsmim.models import create_model, layer_ids
from dsmim.recipe import Optim


def test_groups_are_merged_by_equal_scale_and_decay():
    model = create_model("swinv2_nano", img_size=32, window_size=4, num_classes=3)
    optim = Optim(lr=1e-3, layer_decay=0.5, weight_decay=0.3)
    groups = parameter_groups(model, layer_ids(model), optim)
    assert len(groups) == len({(g.scale, g.weight_decay) for g in groups}) == 2 * 8  # ids 0 … 7
    names = [name for group in groups for name in group.names]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    of = {name: group for group in groups for name in group.names}
    assert of["head.fc.weight"].scale == 1 and of["patch_embed.proj.weight"].scale == pytest.approx(0.5**7)
    for name, parameter in model.named_parameters():
        plain = parameter.ndim == 1 or "logit_scale" in name or "cpb_mlp" in name
        assert of[name].weight_decay == (0.0 if plain else 0.3), name
    optimizer = build_optimizer(model, groups, optim, peak=1e-3)
    assert [g["lr_scale"] for g in optimizer.param_groups] == [g.scale for g in groups]


SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 1}
NETWORKS = {  # network of timm: options, and what it names besides what optim.no_decay matches
    "beit_base_patch16_224": (SMALL, ["blocks.0.attn.relative_position_bias_table"]),
    "swin_tiny_patch4_window7_224": (
        {"embed_dim": 32, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)},
        ["layers.0.blocks.0.attn.relative_position_bias_table"],
    ),
    "vit_tiny_patch16_224": (SMALL | {"reg_tokens": 4}, ["reg_token"]),
    "deit_tiny_distilled_patch16_224": (SMALL, ["dist_token"]),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_a_network_of_timm_names_itself_has_no_weight_decay(name):
    """As timm's own optimizers and groups: compared by timm.optim.param_groups_weight_decay."""
    from timm.optim import param_groups_weight_decay

    options, named = NETWORKS[name]
    model = create_model(f"timm:{name}", num_classes=2, options=options)
    plain, alone = (_without_decay(model, model_no_decay=own) for own in (True, False))
    assert plain - alone >= set(named) and not alone & set(named)
    theirs = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
    numbers = {id(p) for group in theirs if not group["weight_decay"] for p in group["params"]}
    assert plain == {key for key, parameter in model.named_parameters() if id(parameter) in numbers}


def _without_decay(model, **optim) -> set[str]:
    groups = parameter_groups(model, layer_ids(model), Optim(lr=1e-3, weight_decay=0.1, **optim))
    return {name for group in groups if not group.weight_decay for name in group.names}


@pytest.mark.parametrize("name", ["deit3_nano_patch16", "swinv2_nano"])
def test_dsmim_s_own_networks_follow_the_recipe_s_patterns_alone(name):
    """The defaults are the published sets: pos_embed and cls_token of DeiT III (models_v2.py), logit_scale and cpb_mlp
    of Swin V2 in fine-tuning (swin_transformer_v2.py), beside what has one dimension or is called bias."""
    sizes = {"img_size": 32, "num_classes": 2} | ({"window_size": 4} if name.startswith("swin") else {})
    model = create_model(name, **sizes)
    published = ("logit_scale", "cpb_mlp") if name.startswith("swin") else ("pos_embed", "cls_token")
    flat = {key for key, parameter in model.named_parameters() if parameter.ndim == 1 or key.endswith(".bias")}
    listed = {key for key, _ in model.named_parameters() if any(word in key for word in published)}
    assert _without_decay(model) == flat | listed and listed - flat
    assert _without_decay(model, no_decay=[]) == flat


def test_a_parameter_without_dimensions_is_refused_by_name():
    """DeepSpeed fails on it in deepspeed.initialize, with a message that names nothing."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Module())
    model[1].scale = nn.Parameter(torch.tensor(1.0))
    layers = dict.fromkeys(dict(model.named_parameters()), 0)
    with pytest.raises(ValueError, match=r"model\.name: .* parameters of shape \(\): 1\.scale\. .*shape \(1,\)$"):
        parameter_groups(model, layers, Optim(lr=1e-3))
    for number in range(7):
        model[1].register_parameter(f"scale{number}", nn.Parameter(torch.tensor(1.0)))
    layers = dict.fromkeys(dict(model.named_parameters()), 0)
    with pytest.raises(ValueError, match=r"1\.scale, 1\.scale0, .*, 1\.scale3 and 3 more\."):
        parameter_groups(model, layers, Optim(lr=1e-3))
    for name, parameter in list(model[1].named_parameters()):
        model[1].register_parameter(name, nn.Parameter(parameter.detach().reshape(1)))
    assert len(parameter_groups(model, layers, Optim(lr=1e-3))) == 2
    model[1].scale = nn.Parameter(torch.tensor(1.0), requires_grad=False)  # frozen: not given to DeepSpeed's optimizer
    assert "1.scale" not in [name for group in parameter_groups(model, layers, Optim(lr=1e-3)) for name in group.names]


def test_a_pattern_that_a_recipe_gives_must_be_of_a_parameter():
    model = create_model("deit3_nano_patch16", "meta", img_size=32, num_classes=3)
    check_patterns(model, Optim(lr=1))  # the default's are for several networks
    check_patterns(model, Optim(lr=1, no_decay=["pos_embed", "*cls_token", "*logit_scale"]))
    with pytest.raises(ValueError, match=r"optim\.no_decay: 'pos_embd' is the name of no .*; did you mean pos_embed\?"):
        check_patterns(model, Optim(lr=1, no_decay=["pos_embd"]))


@pytest.mark.parametrize("options", [{"momentum": "high"}, {"momentum": 0}])
def test_options_with_wrong_values_are_told_by_key(options):
    model = create_model("deit3_nano_patch16", img_size=32, num_classes=3)
    groups = parameter_groups(model, layer_ids(model), optim := Optim(lr=1, name="timm:sgd", options=options))
    with pytest.raises(ValueError, match=r"optim\.options: timm:sgd does not take \{'momentum': "):
        build_optimizer(model, groups, optim, 1.0)
