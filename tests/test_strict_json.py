"""JSON that strict readers accept, with what it cannot hold kept beside."""

import json
import math

import pytest

from dsmim import strict_json


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def test_numbers_that_are_not_finite_are_null_and_come_back():
    given = {"step": 3, "loss": math.nan, "inner": {"norm": math.inf, "low": -math.inf}, "list": [{"x": math.nan}, 1.5]}
    text = strict_json.dumps(given)
    read = json.loads(text, parse_constant=refuse)
    assert (read["loss"], read["loss_state"]) == (None, "nan")
    assert read["inner"] == {"norm": None, "norm_state": "inf", "low": None, "low_state": "-inf"}
    again = strict_json.loads(text)
    assert repr(again) == repr(given)


@pytest.mark.parametrize("value", [{"a": 1, "b": [0.1, None, "x"]}, {"loss": None}, {"gpu": None, "gpu_state": "idle"}])
def test_everything_else_is_written_as_json_does(value):
    assert strict_json.dumps(value, indent=1) == json.dumps(value, indent=1)
    assert strict_json.loads(strict_json.dumps(value)) == value
