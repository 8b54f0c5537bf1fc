"""Which checkpoint is the best one, and is therefore kept."""

import json
from pathlib import Path

from dsmim.checkpoint.reading import STATE_FORMAT, candidates, name_of
from dsmim.checkpoint.saving import best_of


def make(folder: Path, step: int, **validation) -> Path:
    path = folder / name_of(step)
    path.mkdir(parents=True)
    state = {"format": STATE_FORMAT, "step": step, "validation": validation or None}
    (path / "state.json").write_text(json.dumps(state))
    return path


def test_the_best_is_the_one_whose_own_validation_was(tmp_path):
    for step, figures in ((10, {"loss": 3.0}), (20, {"loss": 1.0}), (30, {}), (40, {"loss": 1.0}), (50, {"loss": 2.0})):
        make(tmp_path, step, **figures)
    found = candidates(tmp_path)
    assert [path.name for path in found] == [name_of(step) for step in (50, 40, 30, 20, 10)]
    assert best_of(found, "loss", "min").name == name_of(20)  # the older of equal ones, so that it does not change
    assert best_of(found, "loss", "max").name == name_of(10)
    assert best_of(found, "accuracy", "max") is None
    (tmp_path / name_of(20) / "state.json").write_text("{")
    assert best_of(found, "loss", "min").name == name_of(40)


def test_a_metric_that_is_not_finite_is_never_the_best(tmp_path):
    make(tmp_path, 10, loss=float("nan"))
    make(tmp_path, 20, loss=0.2)
    make(tmp_path, 30, loss=0.1)
    assert best_of(candidates(tmp_path), "loss", "min").name == name_of(30)
    assert best_of(candidates(tmp_path), "loss", "max").name == name_of(20)
