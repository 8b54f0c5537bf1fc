"""The learning rate as a function of the step."""

import math

import numpy as np
import pytest
import torch
from timm.scheduler import CosineLRScheduler

from dsmim.engine.schedule import LearningRate, resolve_schedule
from dsmim.recipe import Duration, Optim, Schedule


def test_cosine_after_linear_warmup():
    schedule = Schedule(duration=Duration(steps=110), warmup=Duration(steps=10), warmup_lr=0.1, min_lr=0.2)
    rate = resolve_schedule(schedule, Optim(lr=2.0), 64, 1000)
    assert [rate.at(0), rate.at(5), rate.at(10)] == pytest.approx([0.1, 1.05, 2.0])
    assert rate.at(60) == pytest.approx((2.0 + 0.2) / 2) and rate.at(110) == pytest.approx(0.2)
    assert rate.at(10, scale=0.5) == pytest.approx(1.0) and rate.at(110, scale=0.01) == pytest.approx(0.02)


def test_the_scaling_rule_is_explicit():
    schedule = Schedule(duration=Duration(steps=10))
    assert resolve_schedule(schedule, Optim(lr=1e-3), 2048, 1).peak == 1e-3
    assert resolve_schedule(schedule, Optim(lr=1e-3, lr_scaling="linear"), 2048, 1).peak == pytest.approx(4e-3)
    with pytest.raises(
        ValueError, match="warmup: 20 steps are more than the whole duration of 10 steps; give a shorter"
    ):
        resolve_schedule(Schedule(duration=Duration(steps=10), warmup=Duration(steps=20)), Optim(lr=1e-3), 64, 1)


def multistep(*milestones: Duration, steps: int = 1000) -> Schedule:
    return Schedule(name="multistep", duration=Duration(steps=steps), milestones=list(milestones))


def test_milestones_lower_the_rate_by_gamma_each():
    schedule = multistep(Duration(epochs=4), Duration(steps=800), Duration(samples=57_600))
    rate = resolve_schedule(schedule, Optim(lr=1.0), 64, 6400)  # epoch 4 is step 400, 57,600 samples are step 900
    assert rate.milestones == (400, 800, 900)
    found = [rate.at(step) for step in (399, 400, 799, 800, 899, 900, 999)]
    assert found == pytest.approx([1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


@pytest.mark.parametrize(
    ("milestones", "message"),
    [
        (
            [Duration(epochs=8), Duration(steps=400)],
            r"milestones\[0\] \(epochs: 8\) is step 800, .*milestones\[1\] \(steps: 400\) is step 400: each must be",
        ),
        (
            [Duration(epochs=4), Duration(samples=25_600)],
            r"\(epochs: 4\) is step 400, .*\(samples: 25600\) is step 400",
        ),
        (
            [Duration(steps=400), Duration(steps=1000)],
            r"milestones\[1\] \(steps: 1000\) is step 1000, but training ends",
        ),
        ([Duration(steps=9), Duration(steps=8), Duration(steps=7)], r"step 9, .* step 8: .*step 8, .* step 7: each"),
    ],
)
def test_milestones_out_of_order_or_after_the_end_are_named(milestones, message):
    with pytest.raises(ValueError, match=message):
        resolve_schedule(multistep(*milestones), Optim(lr=1.0), 64, 6400)


def timm_after_each_epoch(epochs: int, peak: float, first: float, last: float, warmup: int) -> list[float]:
    """The rate of each epoch in facebookresearch/deit (main.py): lr_scheduler.step(epoch) comes after epoch `epoch`,
    for a scheduler that timm's create_scheduler makes of --epochs, --warmup-epochs, --warmup-lr and --min-lr."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=epochs, lr_min=last, warmup_lr_init=first, warmup_t=warmup, cycle_limit=1,
        t_in_epochs=True,
    )  # fmt: skip
    rates = []
    for epoch in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(epoch)
    return rates


def deit3(epochs: int, peak: float, epoch_steps: int = 625, **changes) -> LearningRate:
    settings = {
        "duration": {"steps": epochs * epoch_steps}, "warmup": {"steps": 5 * epoch_steps}, "warmup_lr": 1e-6,
        "min_lr": 1e-5, "cosine": "whole", "update": "epoch", "epoch": {"steps": epoch_steps},
    }  # fmt: skip
    return resolve_schedule(Schedule(**settings | changes), Optim(lr=peak), 2048, 1281167)


@pytest.mark.parametrize(("epochs", "peak"), [(800, 3e-3), (400, 4e-3), (90, 1e-3), (50, 3e-4), (20, 1e-5)])
def test_deit_3_has_timm_s_rate_of_the_epoch_before(epochs, peak):
    rate, theirs = deit3(epochs, peak), timm_after_each_epoch(epochs, peak, 1e-6, 1e-5, 5)
    for epoch, expected in enumerate(theirs):
        begin = 625 * epoch
        assert [rate.at(step) for step in (begin, begin + 1, begin + 624)] == [pytest.approx(expected, rel=1e-12)] * 3
    assert rate.at(0) == rate.at(625) == rate.at(1249) == 1e-6 < rate.at(1250)  # epochs 0 and 1
    if epochs == 800:
        assert rate.at(5 * 625) == pytest.approx(1e-6 + 4 * (peak - 1e-6) / 5)  # t = 4, the last epoch of the warm-up
        cosine = 1e-5 + (peak - 1e-5) * (1 + math.cos(math.pi * 5 / 800)) / 2  # t = 5: nothing of the warm-up is left
        assert rate.at(6 * 625) == pytest.approx(cosine) and rate.at(6 * 625) < peak
        last = 1e-5 + (peak - 1e-5) * (1 + math.cos(math.pi * 798 / 800)) / 2  # no cool-down
        assert rate.at(799 * 625) == pytest.approx(last)
    if epochs == 20:  # FixRes fine-tuning, lr = min_lr: constant after the warm-up
        assert {rate.at(step) for step in range(6 * 625, 20 * 625, 625)} == {1e-5}


def test_an_epoch_without_a_length_is_one_of_the_training_set():
    settings = {"duration": {"epochs": 6}, "warmup": {"epochs": 2}, "cosine": "whole", "update": "epoch"}
    rate = resolve_schedule(Schedule(**settings), Optim(lr=1.0), 64, 1000)
    assert (rate.epoch, rate.total, rate.warmup) == (16, 94, 32)  # 15.6 and 93.75 and 31.25 steps, rounded up
    rates = [rate.at(step) for step in range(94)]
    assert all(rates[step] == rates[step - step % 16] for step in range(94)) and len(set(rates)) == 5
    assert rates[0] == rates[16] == 0 and rates[32] == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"duration": {"steps": 1250}, "warmup": {"steps": 0}}, "1250 steps has no third one .an epoch has 625 steps"),
        ({"epoch": {"steps": 0}}, r"schedule\.epoch: an epoch has at least 1 step"),
    ],
)
def test_epochs_in_which_the_rate_would_never_change(changes, message):
    with pytest.raises(ValueError, match=message):
        deit3(800, 3e-3, **changes)


def test_the_cosine_of_microsoft_simmim_begins_at_step_0():
    """Without WARMUP_PREFIX: right after a warm-up of a fifth the rate is 0.905 of the peak."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = CosineLRScheduler(
        optimizer, t_initial=500, lr_min=1e-3, warmup_lr_init=1e-2, warmup_t=100, cycle_limit=1, t_in_epochs=False
    )
    for cosine, prefix in (("whole", False), ("after_warmup", True)):
        theirs.warmup_prefix, theirs.t_initial = prefix, 400 if prefix else 500
        schedule = Schedule(duration={"steps": 500}, warmup={"steps": 100}, warmup_lr=1e-2, min_lr=1e-3, cosine=cosine)
        rate = resolve_schedule(schedule, Optim(lr=1.0), 64, 1000)
        for step in (0, 1, 50, 99, 100, 101, 250, 499):
            theirs.step_update(step)
            assert rate.at(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12), (cosine, step)
    whole = resolve_schedule(schedule.model_copy(update={"cosine": "whole"}), Optim(lr=1.0), 64, 1000)
    assert (whole.at(100) - 1e-3) / (1 - 1e-3) == pytest.approx(0.9045, abs=1e-4) and rate.at(100) == 1.0


def test_the_rates_of_mae_are_scaled_whole():
    """util/lr_sched.py of facebookresearch/mae: fractional epochs, a cosine after the warm-up, and lr_scale on all."""
    steps, peak, last, warmup, epochs = 1251, 2e-3, 1e-6, 5, 50
    schedule = Schedule(
        duration={"steps": epochs * steps}, warmup={"steps": warmup * steps}, min_lr=last, layer_scale="rate"
    )
    rate = resolve_schedule(schedule, Optim(lr=peak, layer_decay=0.75), 1024, 1281167)
    for step in (0, 1, steps, 5 * steps - 1, 5 * steps, 5 * steps + 1, 20 * steps + 7, epochs * steps - 1):
        epoch = step % steps / steps + step // steps
        expected = peak * epoch / warmup
        if epoch >= warmup:
            expected = last + (peak - last) * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))
        for scale in (1.0, 0.75**25):
            assert rate.at(step, scale) == pytest.approx(expected * scale, rel=1e-9), (step, scale)
    shared = resolve_schedule(schedule.model_copy(update={"layer_scale": "peak"}), Optim(lr=peak), 1024, 1281167)
    assert shared.at(epochs * steps, 0.1) == pytest.approx(last) and rate.at(epochs * steps, 0.1) < 0.11 * last


def test_the_table_of_beit_ends_its_warm_up_one_step_earlier():
    """utils.py of unilm/beit: numpy.linspace includes the peak, which the cosine's first step has again. So a step of
    the warm-up is ahead of ours by less than one step's rise; every later rate is equal."""
    warmup, total, peak, last = 40, 200, 4e-3, 1e-6
    cosine = [
        last + 0.5 * (peak - last) * (1 + math.cos(math.pi * i / (total - warmup))) for i in range(total - warmup)
    ]
    table = [*np.linspace(0, peak, warmup), *cosine]
    schedule = Schedule(duration={"steps": total}, warmup={"steps": warmup}, min_lr=last, layer_scale="rate")
    rate = resolve_schedule(schedule, Optim(lr=peak), 1024, 1000)
    for step in range(total):
        ours = rate.at(step, 0.65)
        assert ours == pytest.approx(table[step] * 0.65, rel=1e-9) or 0 < table[step] * 0.65 - ours < peak / warmup
        assert step < warmup or ours == pytest.approx(table[step] * 0.65, rel=1e-9)
