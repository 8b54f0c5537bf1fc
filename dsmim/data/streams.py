"""The random stream of a sample.

Crops, flips and masks draw from Python's random(). A call costs a fiftieth of one to torch, and Python promises the
same numbers in every version, which torch does not.
"""

from __future__ import annotations

import random
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def own_stream():
    """Restore the caller's stream of `random` at the end, so that draws inside leave it unchanged."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


def reseed(key: int) -> None:
    """Begin the random stream of a key."""
    random.seed(key)


@contextmanager
def seeded(key: int):
    """Seed Python's, NumPy's and torch's CPU generators by `key`, and restore the caller's streams at the end.

    It is for code that does not draw from `random`, and takes a tenth of a millisecond.
    """
    numpy_state, torch_state = np.random.get_state(), torch.default_generator.get_state()
    with own_stream():
        reseed(key)
        np.random.seed(key % 2**32)
        torch.default_generator.manual_seed(key)  # torch.manual_seed would also reseed the GPU's, which the model uses
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            torch.default_generator.set_state(torch_state)


def uniform(low: float, high: float) -> float:
    """Draw from [low, high) by random(), the only function whose numbers Python keeps the same across versions."""
    return low + (high - low) * random.random()


def fresh_key() -> int:
    """Draw a key for `seeded` from the sample's stream."""
    return int(random.random() * 2**53)
