"""Parameter groups and the optimizer that is made of them."""

import pytest

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
    optimizer = build_optimizer(model, groups, optim)
    assert [g["lr_scale"] for g in optimizer.param_groups] == [g.scale for g in groups]
