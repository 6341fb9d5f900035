"""Several calls of a model in one, or in a loop."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax.bases import in_one_call, in_one_loop
from hypersd_jax.conditioning import Conditioning


def make_inputs(calls: int) -> list[tuple[Any, ...]]:
    """The arguments of each call, of four samples."""
    return [
        (jnp.arange(24.0).reshape(4, 2, 3) + 100 * call, Conditioning(jnp.full((4, 1, 3), call + 2.0)))
        for call in range(calls)
    ]


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_several_calls_in_one(calls: int) -> None:
    """Each has its own outputs back; a sample's inputs lie side by side, so that a split batch stays where it is."""
    asked = []

    def model(x: jax.Array, cond: Conditioning) -> tuple[jax.Array, dict[str, jax.Array]]:
        asked.append(x)
        return x * cond.context, {"mid_block": x.reshape(-1, 6) + 1.0}

    inputs = make_inputs(calls)
    for (x, cond), (output, features) in zip(inputs, in_one_call(model, *inputs), strict=True):
        np.testing.assert_array_equal(output, x * cond.context)
        np.testing.assert_array_equal(features["mid_block"], x.reshape(4, 6) + 1.0)
    (joint,) = asked
    np.testing.assert_array_equal(joint, [inputs[call][0][row] for row in range(4) for call in range(calls)])


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_several_calls_in_a_loop(calls: int) -> None:
    """Each has its own outputs back; the model is in the program once, for the batch of one call."""
    asked = []

    def model(x: jax.Array, cond: Conditioning) -> tuple[jax.Array, dict[str, jax.Array]]:
        asked.append(x.shape)
        return x * cond.context, {"mid_block": x.reshape(-1, 6) + 1.0}

    inputs = make_inputs(calls)
    for (x, cond), (output, features) in zip(inputs, in_one_loop(model, *inputs), strict=True):
        np.testing.assert_array_equal(output, x * cond.context)
        np.testing.assert_array_equal(features["mid_block"], x.reshape(4, 6) + 1.0)
    assert asked == [(4, 2, 3)]
