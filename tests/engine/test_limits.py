"""The limits on undecodable images, steps that are not finite and diverging losses."""

import json
import math

import pytest

from dsmim.engine.limits import FaultLimits
from dsmim.engine.zero import StepResult
from dsmim.health.outcome import Stopped
from dsmim.recipe.reading import parse_recipe
from tests.conftest import tiny_recipe


class LoneRuntime:
    """The only rank: no process group is needed for what it gathers."""

    rank = 0

    def gather(self, value):
        return [value]


def fault_limits(tmp_path, said, **changes):
    tree = tiny_recipe(tmp_path)
    tree["engine"] = {"max_skipped": 2}
    tree["data"]["max_undecodable"] = 0.1
    tree["engine"] |= changes.pop("engine", {})
    return FaultLimits(parse_recipe(tree | changes, "t"), LoneRuntime(), said.append, epoch_samples=50)


def test_too_many_undecodable_images_stop_the_run(tmp_path):
    limits = fault_limits(tmp_path, [])
    assert limits.count_undecodable(5, 8) == 5  # not more than 0.1 of an epoch of 50
    with pytest.raises(Stopped, match=r"6 undecodable images among 16 .*max_undecodable 0\.1"):
        limits.count_undecodable(1, 8)


def test_steps_that_are_not_finite_are_named_and_stop_the_run_after_the_limit(tmp_path):
    said = []
    limits = fault_limits(tmp_path, said)
    skipped = StepResult(math.inf, 1e-3, applied=False)
    limits.check_step(7, math.nan, math.nan, skipped, ["cat/1", "dog/2"])
    assert "step 7: loss nan" in said[0] and "rank 0: loss nan, samples cat/1 dog/2" in said[0]
    limits.check_step(8, 1.0, 1.0, StepResult(1.0, 1e-3, applied=True), [])
    limits.check_step(9, math.nan, math.nan, skipped, ["a"])
    limits.check_step(10, 1.0, 1.0, skipped, ["a"])
    with pytest.raises(Stopped, match="3 steps in a row were not finite"):
        limits.check_step(11, math.nan, math.nan, skipped, ["a"])


def test_a_loss_that_diverges_stops_the_run(tmp_path):
    fine, steps = StepResult(1.0, 1e-3, applied=True), 0
    limits = fault_limits(tmp_path, [])
    for step in range(40):  # one spike of a noisy loss is not a divergence
        limits.check_step(step, 2.0 if step != 30 else 60.0, 1.0, fine, [])
    resumed = fault_limits(tmp_path, [])
    resumed.load_state(json.loads(json.dumps(limits.state())))
    with pytest.raises(Stopped, match=r"the loss has diverged: .*max_loss_growth 3\); the last checkpoint is"):
        for step in range(40, 80):
            resumed.check_step(step, 7.0, 1.0, fine, [])
            steps += 1
    assert steps == 4  # with the fifth 7, its sum with the spike and fourteen 2 exceeds 20 × 3 × 2
    never = fault_limits(tmp_path, [], engine={"max_loss_growth": None})
    for step in range(100):
        never.check_step(step, 10.0**step, 1.0, fine, [])


CLASSIFY = {"task": {"name": "classify", "num_classes": 1000}}
BCE = {"task": CLASSIFY["task"] | {"loss": "bce"}}


@pytest.mark.parametrize(
    ("changes", "first", "fine", "diverged"),
    [({}, 0.01, 0.9, 1.1), ({}, 0.7, 2.0, 2.2), (CLASSIFY, 0.01, 6.8, 7.0), (BCE, 0.005, 0.69, 0.7)],
)
def test_a_run_that_starts_near_zero_has_not_diverged_below_an_untrained_loss(tmp_path, changes, first, fine, diverged):
    """ln(1000) is 6.91, ln(2) is 0.693."""
    applied, limits = StepResult(1.0, 1e-3, applied=True), fault_limits(tmp_path, [], **changes)
    for step in range(100):
        limits.check_step(step, first if step < 20 else fine, 1.0, applied, [])
    with pytest.raises(Stopped, match="the loss has diverged"):
        for step in range(100, 140):
            limits.check_step(step, diverged, 1.0, applied, [])
