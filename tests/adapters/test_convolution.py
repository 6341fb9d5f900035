"""The convolution whose gradients are written out: JAX's own numbers, and as fast within a loop as outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from hypersd_jax.adapters import convolution
from hypersd_jax.models.layers import convolve

CASES = [
    ((2, 8, 8, 16), (3, 3, 16, 8), (1, 1), ((1, 1), (1, 1))),
    ((2, 8, 10, 8), (3, 3, 8, 16), (2, 2), ((1, 1), (1, 1))),
    ((1, 9, 7, 4), (3, 3, 4, 4), (2, 2), ((0, 1), (0, 1))),
    ((1, 7, 7, 4), (3, 2, 4, 8), (2, 1), ((0, 0), (1, 0))),
    ((3, 6, 6, 8), (1, 1, 8, 4), (1, 1), ((0, 0), (0, 0))),
    ((1, 5, 5, 3), (5, 5, 3, 2), (1, 1), "SAME"),
    ((1, 11, 11, 3), (4, 4, 3, 2), (3, 3), "VALID"),
]


def reference(x: jax.Array, kernel: jax.Array, strides: Any, padding: Any) -> jax.Array:
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=lax.Precision.HIGHEST
    )


def ours(x: jax.Array, kernel: jax.Array, strides: Any, padding: Any) -> jax.Array:
    return convolution(x, kernel, strides, padding, precision=lax.Precision.HIGHEST, platform="cpu")


def gradients(run: Callable[..., jax.Array], strides: Any, padding: Any) -> Callable[..., Any]:
    def loss(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(run(x, kernel, strides, padding)))

    return jax.value_and_grad(loss, argnums=(0, 1))


def inputs(x: tuple[int, ...], kernel: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    random = np.random.default_rng(0)
    return tuple(jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in (x, kernel))  # type: ignore[return-value]


@pytest.mark.parametrize(("x", "kernel", "strides", "padding"), CASES)
def test_value_and_gradients_are_those_of_jax_to_the_bit(x: Any, kernel: Any, strides: Any, padding: Any) -> None:
    given = inputs(x, kernel)
    found, wanted = (jax.jit(gradients(run, strides, padding))(*given) for run in (ours, reference))
    jax.tree.map(lambda got, want: np.testing.assert_array_equal(np.asarray(got), np.asarray(want)), found, wanted)


def test_a_loop_gives_the_numbers_of_its_unrolled_body() -> None:
    x, kernel = inputs((2, 8, 8, 16), (3, 3, 16, 16))
    step = gradients(convolve, (1, 1), ((1, 1), (1, 1)))

    def descend(carry: Any, _: None) -> Any:
        _, slopes = step(*carry)
        return jax.tree.map(lambda value, slope: value - 1e-2 * slope, carry, slopes), None

    looped, unrolled = (
        jax.jit(lambda *carry, unroll=unroll: lax.scan(descend, carry, None, length=3, unroll=unroll)[0])(x, kernel)
        for unroll in (1, 3)
    )
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), looped, unrolled)


def test_no_gradient_in_a_loop_is_left_in_a_layout_that_is_slow_on_a_cpu() -> None:
    """XLA keeps a slow layout in its text: a kernel's gradient in JAX's own layout is `f01b_i01o`."""
    if jax.default_backend() != "cpu":
        pytest.skip("of XLA's CPU backend")
    x, kernel = inputs((2, 8, 8, 16), (3, 3, 16, 16))

    def labels(run: Callable[..., jax.Array]) -> set[str]:
        step = gradients(run, (1, 1), ((1, 1), (1, 1)))

        def body(carry: Any, _: None) -> Any:
            return jax.tree.map(jnp.subtract, carry, step(*carry)[1]), None

        lowered = jax.jit(lambda *carry: lax.scan(body, carry, None, length=3)[0]).lower(x, kernel)
        text = lowered.compile().as_text()
        return {part.split(",")[0].split(" ")[0] for part in text.split("dim_labels=")[1:]}

    assert labels(ours) == {"b01f_01io->b01f"}
    assert labels(reference) != {"b01f_01io->b01f"}  # otherwise this module is no longer needed
