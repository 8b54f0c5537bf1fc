"""metrics.jsonl of a run that was interrupted, the mean of the losses between two lines, and the ETA."""

import json
import math

import pytest

from dsmim import log as log_module
from dsmim.engine.zero import StepResult
from dsmim.log import Clock, Log
from dsmim.record import Interval, Step
from tests.test_strict_json import refuse


@pytest.mark.parametrize("validation_due", [False, True])
def test_lines_after_the_checkpoint_are_removed(tmp_path, validation_due):
    lines = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.9}, {"step": 2, "val_loss": 0.8, "val_samples": 3}]
    text = "".join(json.dumps(line) + "\n" for line in [*lines, {"step": 3, "loss": 0.7}])
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 2, "los')  # cut short by the kill
    log = Log(tmp_path, True, 2, 4, False, validation_due)
    log.validation(2, {"loss": 0.8, "samples": 3})
    log.close()
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert found == (lines if validation_due else [*lines, lines[-1]])


def taken(loss: float, norm: float = 1.0, applied: bool = True) -> Step:
    return Step(loss, loss, StepResult(norm, 1e-3, applied), 0)


def test_the_loss_of_a_line_is_the_mean_since_the_line_before_also_after_a_resume():
    losses = [0.1, 0.7, 0.3, 0.12345678901234567, 5.0, 1e-9, 0.2]
    whole, first = Interval(), Interval()
    for loss in losses:
        whole.add(taken(loss))
    for loss in losses[:3]:
        first.add(taken(loss))
    resumed = Interval(json.loads(json.dumps(first.state())))
    for loss in losses[3:]:
        resumed.add(taken(loss))
    figures = whole.read(taken(0.2))
    assert figures == resumed.read(taken(0.2)) and figures["loss"] == sum(losses) / 7 and "skipped" not in figures
    whole.add(taken(4.0))
    assert whole.read(taken(4.0, norm=3.0)) == {"loss": 4.0, "lr": 1e-3, "grad_norm": 3.0, "undecodable": 0}


def test_skipped_steps_have_no_share_in_the_mean():
    interval = Interval()
    for step in (taken(2.0), taken(math.nan, math.inf, False), taken(100.0, math.inf, False), taken(4.0)):
        interval.add(step)
    figures = interval.read(taken(4.0))
    assert (figures["loss"], figures["skipped"]) == (3.0, 2)
    interval.add(skipped := taken(math.nan, math.inf, False))
    figures = interval.read(skipped)
    assert math.isnan(figures["loss"]) and figures["skipped"] == 1


def test_every_line_is_strict_json_and_says_what_was_not_finite(tmp_path, capsys):
    log = Log(tmp_path, True, 0, 100, False)
    figures = {"loss": math.nan, "lr": 1e-3, "grad_norm": math.inf, "images_per_second": 5.0, "data_wait": 0.0}
    log.step(10, figures, 2.0)
    log.validation(10, {"loss": math.nan, "samples": 0})
    log.host(10, {"rss": math.inf})
    log.close()
    files = [tmp_path / "metrics.jsonl", tmp_path / "host.jsonl"]
    lines = [json.loads(line, parse_constant=refuse) for file in files for line in file.read_text().splitlines()]
    assert (lines[0]["loss"], lines[0]["loss_state"], lines[0]["grad_norm_state"]) == (None, "nan", "inf")
    assert (lines[1]["val_loss"], lines[1]["val_loss_state"]) == (None, "nan") and lines[2]["rss_state"] == "inf"
    assert "loss nan" in (said := capsys.readouterr().err) and "ETA 3m00s" in said


def test_the_eta_leaves_out_the_first_step_and_what_is_not_training(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(log_module.time, "monotonic", lambda: now)
    clock = Clock()
    for seconds, what in [
        (500, "restart"), (90, "stepped"), (2, "stepped"), (300, "restart"), (2, "stepped"), (5, "stepped"),
    ]:  # fmt: skip
        now += seconds
        if what == "stepped" and seconds == 90:
            assert clock.seconds_per_step is None
        getattr(clock, what)()
    assert clock.seconds_per_step == pytest.approx((2 + 2 + 5) / 3)
    assert clock.read(8)["images_per_second"] == pytest.approx(8 * 2 / 7)
