"""The streams of a run's randomness, told apart by what is folded into a key."""

from __future__ import annotations

import enum

import jax


class Stream(enum.IntEnum):
    """Of a stage, from the run's seed."""

    ADAPTER = 0  # the student's first factors
    NOISE = 1  # what the training step draws
    ENCODER = 2  # the latents' posterior
    FAKE = 3  # the fake-score model's first factors
    PAIR = 4  # noise of pairs that are computed once


class Draw(enum.IntEnum):
    """Within a step, from its key, beside samples' indices, none of which comes near."""

    DISCRIMINATOR = 2**32 - 1
    DROPOUT = 2**32 - 2
    ANCHOR = 2**32 - 3
    REAL = 2**32 - 4
    R1 = 2**32 - 5


def stream(seed: int, name: Stream, index: int) -> jax.Array:
    """The key of one stream, for the stage at this place."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), int(name)), index)


def drawn_from(key: jax.Array, name: Draw) -> jax.Array:
    """The key of one draw of a step."""
    return jax.random.fold_in(key, int(name))
