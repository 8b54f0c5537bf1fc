"""The learning rate as a function of the step."""

import pytest

from dsmim.engine.schedule import resolve_schedule
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
    with pytest.raises(ValueError, match="warmup: 20 steps are more than the whole duration of 10"):
        resolve_schedule(Schedule(duration=Duration(steps=10), warmup=Duration(steps=20)), Optim(lr=1e-3), 64, 1)
