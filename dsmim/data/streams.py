"""A sample's random stream.

Crops, flips and masks draw from Python's random(): a call costs a fiftieth of one to torch, and Python promises the
same numbers in every version, which torch does not.
"""

from __future__ import annotations

import random
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def own_stream():
    """What draws inside from `random` leaves the caller's stream untouched."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


def reseed(key: int) -> None:
    """Begin the random stream of that key."""
    random.seed(key)


@contextmanager
def seeded(key: int):
    """For what draws from elsewhere: Python's, NumPy's and torch's CPU generators, seeded by `key`; the caller's
    streams are left untouched. Takes a tenth of a millisecond."""
    numpy_state, torch_state = np.random.get_state(), torch.default_generator.get_state()
    with own_stream():
        reseed(key)
        np.random.seed(key % 2**32)
        torch.default_generator.manual_seed(key)  # torch.manual_seed would reseed a GPU's stream too, the model's
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            torch.default_generator.set_state(torch_state)


def fresh_key() -> int:
    """A key for `seeded`, drawn from the sample's stream."""
    return int(random.random() * 2**53)
