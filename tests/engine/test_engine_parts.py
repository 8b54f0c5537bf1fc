"""Schedule, parameter groups, the watch: what needs no process group."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from dsmim.engine.construct import autocast_modules, move_buffers
from dsmim.engine.optim import build_optimizer, parameter_groups
from dsmim.engine.schedule import resolve
from dsmim.engine.watch import Watch
from dsmim.engine.zero import StepResult
from dsmim.health.outcome import Stopped
from dsmim.models import create_model, layer_ids
from dsmim.recipe import Duration, Optim, Schedule
from dsmim.recipe.reading import parse_recipe
from tests.conftest import tiny_recipe


def test_cosine_after_linear_warmup():
    schedule = Schedule(duration=Duration(steps=110), warmup=Duration(steps=10), warmup_lr=0.1, min_lr=0.2)
    rate = resolve(schedule, Optim(lr=2.0), 64, 1000)
    assert [rate.at(0), rate.at(5), rate.at(10)] == pytest.approx([0.1, 1.05, 2.0])
    assert rate.at(60) == pytest.approx((2.0 + 0.2) / 2) and rate.at(110) == pytest.approx(0.2)
    assert rate.at(10, scale=0.5) == pytest.approx(1.0) and rate.at(110, scale=0.01) == pytest.approx(0.02)


def test_scaling_rule_is_explicit():
    schedule = Schedule(duration=Duration(steps=10))
    assert resolve(schedule, Optim(lr=1e-3), 2048, 1).peak == 1e-3
    assert resolve(schedule, Optim(lr=1e-3, lr_scaling="linear"), 2048, 1).peak == pytest.approx(4e-3)
    with pytest.raises(ValueError, match="warmup: 20 steps are more than the whole duration of 10"):
        resolve(Schedule(duration=Duration(steps=10), warmup=Duration(steps=20)), Optim(lr=1e-3), 64, 1)


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


class LoneRuntime(SimpleNamespace):
    rank = 0

    def gather(self, value):
        return [value]


def watch(tmp_path, said, **changes):
    tree = tiny_recipe(tmp_path)
    tree["engine"] = {"max_skipped": 2}
    tree["data"]["max_undecodable"] = 0.1
    tree["engine"] |= changes.pop("engine", {})
    return Watch(parse_recipe(tree | changes, "t"), LoneRuntime(), said.append, epoch_samples=50)


def test_too_many_undecodable_images_stop_the_run(tmp_path):
    guard = watch(tmp_path, [])
    assert guard.count(5, 8) == 5  # of an epoch of 50: not beyond 0.1
    with pytest.raises(Stopped, match=r"6 undecodable images among 16 .*max_undecodable 0\.1"):
        guard.count(1, 8)


def test_nonfinite_steps_are_named_and_stop_the_run_after_the_limit(tmp_path):
    said = []
    guard = watch(tmp_path, said)
    skipped = StepResult(math.inf, 1e-3, applied=False)
    guard.finite(7, math.nan, math.nan, skipped, ["cat/1", "dog/2"])
    assert "step 7: loss nan" in said[0] and "rank 0: loss nan, samples cat/1 dog/2" in said[0]
    guard.finite(8, 1.0, 1.0, StepResult(1.0, 1e-3, applied=True), [])
    guard.finite(9, math.nan, math.nan, skipped, ["a"])
    guard.finite(10, 1.0, 1.0, skipped, ["a"])
    with pytest.raises(Stopped, match="3 steps in a row were not finite"):
        guard.finite(11, math.nan, math.nan, skipped, ["a"])


def test_a_loss_that_diverges_stops_the_run(tmp_path):
    fine, applied = StepResult(1.0, 1e-3, applied=True), 0
    guard = watch(tmp_path, [])
    for step in range(40):  # one spike of a noisy loss is no divergence
        guard.finite(step, 2.0 if step != 30 else 60.0, 1.0, fine, [])
    resumed = watch(tmp_path, [])
    resumed.restore(json.loads(json.dumps(guard.state())))
    with pytest.raises(Stopped, match=r"the loss has diverged: .*max_loss_growth 3\); the last checkpoint stands"):
        for step in range(40, 80):
            resumed.finite(step, 7.0, 1.0, fine, [])
            applied += 1
    assert applied == 4  # the fifth 7, the spike and fourteen 2 are more than 20 × 3 × 2
    never = watch(tmp_path, [], engine={"max_loss_growth": None})
    for step in range(100):
        never.finite(step, 10.0**step, 1.0, fine, [])


def test_buffers_go_to_the_device_of_the_parameters():
    """At ZeRO-3 DeepSpeed does not move them; "meta" stands for a GPU here."""
    model = create_model("swinv2_nano", img_size=64, window_size=4, drop_path_rate=0.1)
    saved = model.state_dict().keys()
    assert {buffer.device.type for buffer in model.buffers()} == {"cpu"}
    move_buffers(model, torch.device("meta"))
    assert {buffer.device.type for buffer in model.buffers()} == {"meta"} and len(list(model.buffers())) > 10
    assert model.state_dict().keys() == saved  # those that were not saved still are not


def test_modules_that_may_send_bfloat16_are_named_by_their_exact_classes():
    """DeepSpeed compares classes, not subclasses; the position-bias MLP is an fp32 island."""
    named = autocast_modules(create_model("swinv2_nano", "meta", img_size=64, window_size=4))
    assert "torch.nn.modules.linear.Linear" in named and "torch.nn.modules.conv.Conv2d" in named
    assert "dsmim.models.attention.window._Projection" in named and not any("Exact" in name for name in named)


def test_mixing_pairs_neighbours_whatever_the_micro_batch():
    from dsmim.recipe import ClassifyTask
    from dsmim.tasks.mixing import mix

    settings = ClassifyTask(name="classify", num_classes=4, mixup=0.8, cutmix=1.0)
    images, targets = torch.rand(8, 3, 8, 8), torch.eye(4).repeat(2, 1)
    for step in range(6):  # both mixup and CutMix come up
        whole = mix(images, targets, settings, seed=0, step=step)
        halves = [mix(images[i : i + 4], targets[i : i + 4], settings, seed=0, step=step) for i in (0, 4)]
        for index in (0, 1):
            assert torch.equal(whole[index], torch.cat([half[index] for half in halves]))
        assert torch.allclose(whole[1].sum(1), torch.ones(8))
        share = whole[1][0, 0].item()  # sample 0 has class 0, its neighbour class 1
        assert whole[1][0, 1].item() == pytest.approx(1 - share, abs=1e-6)
