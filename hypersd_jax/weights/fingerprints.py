"""Names for weights, by which runs, caches and references know what they belong to."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils

FORMS = 2
# Rows of a parameter that are summed at a time, so that they stay in the processor's caches.
ROWS = 256


def fingerprint(params: Mapping[str, jax.Array | np.ndarray]) -> str:
    """Name these weights, in 64 hexadecimal digits, without gathering them.

    Values enter rounded to bfloat16, so that one model has one name whether it was loaded in float32 or in bfloat16, on
    whatever devices and mesh: of arrays that are spread over processes, which all call this together, each reads its
    own parts. Of each parameter that is the sum of bits(p) w_1(p_1) ... w_d(p_d) modulo 2^64 over its positions p,
    twice, with fixed odd numbers w that are different for each axis and index; parts can be summed apart, and two
    models have one name by a chance of the order of 2^-90. The name is the SHA-256 of paths, shapes and sums. It finds
    mix-ups, not forgers. Some seconds for a billion parameters.
    """
    paths = sorted(params)
    sums = np.zeros((len(paths), FORMS), np.uint64)
    for number, path in enumerate(paths):
        for index, part in _own_parts(params[path]):
            sums[number] += _weighted_sums(part, index)
    if any(isinstance(value, jax.Array) and not value.is_fully_addressable for value in params.values()):
        halves = multihost_utils.process_allgather(sums.view(np.uint32))  # JAX would cut 64 bits in two
        sums = np.sum(np.asarray(halves).view(np.uint64), axis=0, dtype=np.uint64)
    digest = hashlib.sha256()
    for path, words in zip(paths, sums, strict=True):
        digest.update(f"{path} {tuple(np.shape(params[path]))} {' '.join(map(str, words))}\n".encode())
    return digest.hexdigest()


def _own_parts(value: Any) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """Yield the parts that lie on this process's devices, each once over all processes, with where they belong."""
    if not isinstance(value, jax.Array):
        yield tuple(slice(0, length) for length in np.shape(value)), np.asarray(value)
        return
    for shard in value.addressable_shards:
        if shard.replica_id == 0:
            yield shard.index, np.asarray(shard.data)


def _weighted_sums(part: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
    """The sums of `fingerprint` over a part, uint64 (FORMS,)."""
    bits = np.asarray(part.astype(ml_dtypes.bfloat16), order="C").view(np.uint16)
    columns = bits.shape[-1] if bits.ndim else 1
    rows = bits.reshape(-1, columns)
    found = np.empty(FORMS, np.uint64)
    for form in range(FORMS):
        weights = [
            _axis_weights(axis, form, place.start or 0, length)
            for axis, (place, length) in enumerate(zip(index, bits.shape, strict=True))
        ]
        last = weights[-1] if weights else np.ones(1, np.uint64)
        sums = np.concatenate(
            [rows[at : at + ROWS].astype(np.uint64) @ last for at in range(0, max(len(rows), 1), ROWS)]
        )
        sums = sums.reshape(bits.shape[:-1])
        for each in reversed(weights[:-1]):
            sums = sums @ each
        found[form] = sums.reshape(())
    return found


@functools.lru_cache(maxsize=1024)
def _axis_weights(axis: int, form: int, start: int, length: int) -> np.ndarray:
    """Odd numbers, uint64 (length,), for the indices from ``start`` of an axis: outputs of SplitMix64."""
    index = np.arange(start, start + length, dtype=np.uint64)
    state = (index + (np.uint64(axis * FORMS + form + 1) << np.uint64(40))) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (state ^ (state >> np.uint64(31))) | np.uint64(1)
