"""Parameter groups, layer-decay scales and learning rates against the authors' rules, written again here.

Sources: microsoft/SimMIM optimizer.py, microsoft/Swin-Transformer lr_scheduler.py, facebookresearch/mae
util/lr_decay.py, unilm/beit optim_factory.py.
"""

import re
from collections import Counter

import pytest
import timm
import torch
from timm.scheduler import CosineLRScheduler

from dsmim import load_recipe
from dsmim.engine.optim import parameter_groups
from dsmim.engine.schedule import resolve_schedule
from dsmim.models import SimMIM, create_model, layer_ids
from dsmim.recipe import Optim
from dsmim.tasks import build_task

IMAGENET = 1281167


def of_parameter(model, layers, optim):
    """Return parameter name → (scale, weight decay)."""
    groups = parameter_groups(model, layers, optim)
    names = [name for group in groups for name in group.names]
    assert Counter(names) == Counter(name for name, _ in model.named_parameters())
    return {name: (group.scale, group.weight_decay) for group in groups for name in group.names}


def test_all_426_parameters_of_the_pre_training():
    recipe = load_recipe("simmim_swinv2_base_192_pretrain")
    task = build_task(recipe)
    found = of_parameter(task.model, task.layers, recipe.optim)
    assert isinstance(task.model, SimMIM) and len(found) == 426
    for name, parameter in task.model.named_parameters():
        plain = parameter.ndim == 1 or name.endswith(".bias") or name == "mask_token"
        assert found[name] == (1.0, 0.0 if plain else 0.05), name


def test_all_425_parameters_of_the_fine_tuning():
    recipe = load_recipe("simmim_swinv2_base_224_finetune")
    task = build_task(recipe)
    found = of_parameter(task.model, task.layers, recipe.optim)
    assert len(found) == 425
    depths = (2, 2, 18, 2)

    def layer(name):  # get_swin_layer, whose downsampling ends a stage; in timm's names it begins the next one
        if name.startswith("patch_embed"):
            return 0
        if match := re.match(r"layers\.(\d+)\.downsample", name):
            return sum(depths[: int(match[1])])
        if match := re.match(r"layers\.(\d+)\.blocks\.(\d+)", name):
            return sum(depths[: int(match[1])]) + int(match[2]) + 1
        return 25

    for name, parameter in task.model.named_parameters():
        plain = parameter.ndim == 1 or "logit_scale" in name or "cpb_mlp" in name
        assert found[name] == (pytest.approx(0.75 ** (25 - layer(name))), 0.0 if plain else 0.05), name


# Family → network, layer decay of its authors' base model, and scales by name
FAMILIES = {
    "MAE, mean pooling": ("vit_base_patch16_224", {"global_pool": "avg"}, 0.65, ["fc_norm.weight", "head.weight"]),
    "MAE, class token": ("vit_base_patch16_224", {}, 0.65, ["norm.weight", "head.weight"]),
    "BEiT": ("beit_base_patch16_224", {}, 0.65, ["fc_norm.weight", "head.weight"]),
    "BEiT, class token": ("beit_base_patch16_224", {"global_pool": "token"}, 0.65, ["norm.weight", "head.bias"]),
    "SimMIM, Swin": ("swinv2_base_window12_192", {}, 0.75, ["norm.weight", "head.fc.weight"]),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_decay(family):
    name, options, decay, top = FAMILIES[family]
    small = {"embed_dim": 32, "num_classes": 2}
    swin = {"depths": (1, 1, 9, 1), "num_heads": (1, 2, 4, 8)}
    model = timm.create_model(name, **small, **(swin if "swin" in name else {"depth": 12, "num_heads": 1}), **options)
    found = of_parameter(model, layer_ids(model), Optim(lr=1e-3, layer_decay=decay, weight_decay=0.05))
    assert [found[key][0] for key in top] == [1.0, 1.0]
    last, first = ("layers.3.blocks.0", "layers.0.blocks.0") if "swin" in name else ("blocks.11", "blocks.0")
    assert found[f"{last}.mlp.fc1.weight"] == (pytest.approx(decay), 0.05)
    assert found[f"{first}.mlp.fc1.weight"] == (pytest.approx(decay**12), 0.05)
    assert found["patch_embed.proj.weight"] == (pytest.approx(decay**13), 0.05)


def rate_of(name):
    recipe = load_recipe(name)
    return resolve_schedule(recipe.schedule, recipe.optim, recipe.batch.global_batch, IMAGENET)


def test_learning_rates_of_the_pre_training():
    """MultiStepLRScheduler over 500,000 steps: a warm-up of 10 epochs, then a tenth after 700 of 800 epochs."""
    rate = rate_of("simmim_swinv2_base_192_pretrain")
    assert (rate.total, rate.warmup, rate.milestones) == (500000, 6250, (437500,))
    peak, first = 1e-4 * 2048 / 512, 5e-7 * 2048 / 512
    for step in [*range(0, 500000, 997), 6249, 6250, 437499, 437500, 499999]:
        expected = first + step * (peak - first) / 6250 if step < 6250 else peak * 0.1 ** (step >= 437500)
        assert rate.at(step) == pytest.approx(expected, rel=1e-12), step


def test_learning_rates_of_the_fine_tuning():
    """timm's scheduler, as microsoft/Swin-Transformer sets it up with WARMUP_PREFIX, for every layer."""
    rate = rate_of("simmim_swinv2_base_224_finetune")
    scales = [0.75**k for k in range(26)]
    peak, warmup_lr, min_lr = (value * 2048 / 512 for value in (1.25e-3, 2.5e-7, 2.5e-7))
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": peak * scale} for scale in scales])
    theirs = CosineLRScheduler(
        optimizer, t_initial=rate.total - rate.warmup, lr_min=min_lr, warmup_lr_init=warmup_lr, warmup_t=rate.warmup,
        cycle_limit=1, t_in_epochs=False, warmup_prefix=True,
    )  # fmt: skip
    assert abs(rate.warmup - rate.total / 5) <= 1
    for step in [*range(0, rate.total, 211), rate.warmup - 1, rate.warmup, rate.total - 1]:
        theirs.step_update(step)
        expected = [group["lr"] for group in optimizer.param_groups]
        assert [rate.at(step, scale) for scale in scales] == pytest.approx(expected, rel=1e-9), step


def test_the_head_of_beit_and_the_depth_of_the_base_models():
    """BEiT's new head is 0.02 × init_scale 0.001; MAE's is written as 2e-5 (tests/weights/test_heads.py)."""
    model = create_model("timm:beit_base_patch16_224", img_size=32, num_classes=1000, options={"depth": 1})
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.02)
