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
