"""Names of weights, worked out with Python's whole numbers."""

from __future__ import annotations

import hashlib
import itertools

import ml_dtypes
import numpy as np
import pytest

from hypersd_jax.weights import fingerprint

WORD = 2**64


def weight(axis: int, form: int, index: int) -> int:
    """Output of SplitMix64 for a state that says axis, form and index, made odd."""
    state = (index + ((axis * 2 + form + 1) << 40)) * 0x9E3779B97F4A7C15 % WORD
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % WORD
    return (state ^ (state >> 31)) | 1


def by_hand(name: str, values: np.ndarray) -> str:
    bits = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    sums = []
    for form in range(2):
        total = 0
        for place in itertools.product(*map(range, values.shape)):
            term = int(bits[place])
            for axis, index in enumerate(place):
                term *= weight(axis, form, index)
            total = (total + term) % WORD
        sums.append(total)
    return hashlib.sha256(f"{name} {values.shape} {sums[0]} {sums[1]}\n".encode()).hexdigest()


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 2, 5), (600, 2)])
def test_it_is_the_sum_of_weighted_bits(shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    assert fingerprint({"name": values}) == by_hand("name", np.asarray(values))


def test_what_has_moved_has_another_name() -> None:
    """Rows or columns exchanged, one value at another place, signs changed."""
    values = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
    others = [values[::-1], values[:, ::-1], np.roll(values, 1), -values, values.T.reshape(6, 8), 2 * values]
    names = {fingerprint({"name": np.ascontiguousarray(each)}) for each in [values, *others]}
    assert len(names) == 1 + len(others)
