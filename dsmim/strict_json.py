"""JSON that every reader accepts: NaN and Infinity, which Python writes, are not JSON (RFC 8259), and strict readers
such as JavaScript's refuse the whole file."""

from __future__ import annotations

import json
import math
from typing import Any

STATE = "_state"
"""Ending of the key that says what a null was."""
_NOT_FINITE = ("nan", "inf", "-inf")


def dumps(value: Any, **options: Any) -> str:
    """Return the value as JSON. Where a dictionary has a number that is not finite, the number becomes null and a
    second key, NAME_state, says what it was: {"loss": null, "loss_state": "nan"}. options: as of json.dumps."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def loads(text: str) -> Any:
    """Return what was given to `dumps`, with its numbers that are not finite. Raises ValueError as json.loads does."""
    return json.loads(text, object_hook=_restored)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        states = {f"{key}{STATE}": str(one) for key, one in value.items() if _is_not_finite(one)}
        return {key: _finite(one) for key, one in value.items()} | states
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if _is_not_finite(value) else value


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _restored(values: dict[str, Any]) -> dict[str, Any]:
    lost = [key for key, value in values.items() if value is None and values.get(f"{key}{STATE}") in _NOT_FINITE]
    numbers = {key: float(values.pop(f"{key}{STATE}")) for key in lost}
    return values | numbers
