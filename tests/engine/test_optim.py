"""Parameter groups and the optimizer that is made of them."""

import pytest
import torch
from torch import nn

from dsmim.engine.optim import build_optimizer, parameter_groups
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
