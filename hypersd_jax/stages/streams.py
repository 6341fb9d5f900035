"""Named random streams of a run, each with its own number to fold into a key."""

from __future__ import annotations

import enum

import jax


class Stream(enum.IntEnum):
    """Random streams of a stage, from the run's seed."""

    ADAPTER = 0  # the student's first factors
    NOISE = 1  # of the training step
    ENCODER = 2  # the latents' posterior
    FAKE = 3  # the fake score model's first factors
    ODE_PAIR = 4  # noise and order of ODE pairs
    FEEDBACK = 5  # the feedback LoRA's first factors
    STYLE = 6  # a style LoRA's first factors, beside another


class Draw(enum.IntEnum):
    """Random streams within a step, from its key; no batch index is as large as these numbers."""

    DISCRIMINATOR = 2**32 - 1
    DROPOUT = 2**32 - 2
    REGULARISER = 2**32 - 3
    REAL = 2**32 - 4
    R1 = 2**32 - 5
    REDRAW = 2**32 - 6
    STRUCTURE = 2**32 - 7
    BESIDE = 2**32 - 8


def stream(seed: int, name: Stream, index: int) -> jax.Array:
    """Derive the key of one random stream, for stage ``index``."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), int(name)), index)


def drawn_from(key: jax.Array, name: Draw) -> jax.Array:
    """Derive the key of one random stream of a step."""
    return jax.random.fold_in(key, int(name))


def normal(key: jax.Array, indices: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sample standard normal noise (B, *shape); a sample's depends on (key, its batch index) alone."""
    return jax.vmap(lambda index: jax.random.normal(jax.random.fold_in(key, index), shape))(indices)
