"""Counting the operations of a trace: products and convolutions, loops, branches, and what nobody reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from hypersd_jax.bases import describe_base
from hypersd_jax.planning.opening import tracing_mesh
from hypersd_jax.planning.work import NotCounted, flops_of

X, W = jax.ShapeDtypeStruct((4, 8), jnp.float32), jax.ShapeDtypeStruct((8, 8), jnp.float32)
ONE = 2 * 4 * 8 * 8
"""Operations of X @ W."""


def scanned(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda carry, _: (carry @ w, None), x, length=5)[0]


def drawn(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, jnp.int32(x[0, 0]), lambda _, x: x @ w, x)


def branch(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)


def unread(x: jax.Array, w: jax.Array) -> jax.Array:
    @jax.jit
    def two(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return x @ w, x @ w @ w

    return two(x)[0]


def unread_carry(x: jax.Array, w: jax.Array) -> jax.Array:
    """Of the two carries one is read by nobody, and one by the other alone."""

    def step(carry: Any, _: Any) -> Any:
        a, b, c = carry
        return (a + b, b @ w, c @ w @ w), None

    return jax.lax.scan(step, (x, x, x), length=3)[0][0]


@pytest.mark.parametrize(
    ("function", "operations"),
    [
        (lambda x, w: x @ w, ONE),
        (lambda x, w: jnp.tanh(x) + 1, 0),
        (lambda x, w: jax.vmap(lambda row: row @ w)(x), ONE),
        (scanned, 5 * ONE),
        (branch, 2 * ONE),
        (unread, ONE),
        (unread_carry, 3 * ONE),
        (jax.grad(lambda x, w: jnp.sum(jnp.tanh(x @ w))), 2 * ONE),
        (jax.grad(lambda x, w: jnp.sum(jnp.tanh(x @ w)), argnums=(0, 1)), 3 * ONE),
        (jax.value_and_grad(jax.checkpoint(lambda x, w: jnp.sum(jnp.tanh(jnp.tanh(x @ w) @ w)))), 6 * ONE),
    ],
)
def test_operations(function: Callable[..., Any], operations: float) -> None:
    assert flops_of(function, X, W) == operations


def test_a_convolution() -> None:
    x, kernel = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32), jax.ShapeDtypeStruct((3, 3, 3, 5), jnp.float32)

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    once = 2 * (2 * 8 * 8 * 5) * (3 * 3 * 3)
    assert flops_of(convolve, x, kernel) == once
    assert (
        flops_of(jax.grad(lambda *given: jnp.sum(jnp.square(convolve(*given))), argnums=(0, 1)), x, kernel) == 3 * once
    )


def test_a_loop_of_unknown_length() -> None:
    assert flops_of(drawn, X, W, loop_steps=1.5) == 1.5 * ONE
    with pytest.raises(NotCounted, match="a loop whose length is not known"):
        flops_of(drawn, X, W)


def test_the_embedded_unet_is_as_xla_counts_it() -> None:
    """XLA adds norms and activations; at 256 tokens no kernel is a loop, which it would take for one pass."""
    mesh = tracing_mesh()
    base = describe_base("embedded", dtype=jnp.float32, mesh=mesh, resolution=64)
    cond = jax.eval_shape(base.encode_prompts, dict(base.params), base.prompts.tokenize(["lion"]))
    x, t = jax.ShapeDtypeStruct((1, *base.latent_shape), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    arrays = (base.weights, x, t, cond)

    def call(weights: Any, x: jax.Array, t: jax.Array, cond: Any) -> jax.Array:
        return base.predict(weights, x, t, cond)[0]

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        ours = flops_of(call, *arrays)
        theirs = jax.jit(call).lower(*arrays).cost_analysis()["flops"]
    assert 0.9 * theirs < ours < theirs
