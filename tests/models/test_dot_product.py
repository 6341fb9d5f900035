"""Attention: every kernel gives the same numbers, and each is chosen where it suits."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from hypersd_jax.models import dot_product
from hypersd_jax.models.dot_product import Case, attention, choose

SDXL = Case(platform="gpu", dtype="bfloat16", queries=4096, keys=4096, width=64, causal=False)


@pytest.mark.parametrize("length", [1024, 1100])
def test_long_attention_by_blocks_equals_plain(length: int) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, length, 2, 4)) for key in keys)

    def run(platform: str) -> Any:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
            out = attention(q, k, v, platform=platform)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    (grads, out), (plain_grads, plain) = run("cpu"), run("tpu")
    np.testing.assert_allclose(out, plain, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(grads, plain_grads, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_causal_attention_sees_no_future() -> None:
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 5, 2, 4)) for i in range(3))
    out = attention(q, k, v, causal=True)
    changed = attention(q, k.at[:, 3:].set(9.0), v.at[:, 3:].set(9.0), causal=True)
    np.testing.assert_array_equal(out[:, :3], changed[:, :3])
    np.testing.assert_allclose(out[:, 0], v[:, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("change", "kernel"),
    [
        ({}, "cudnn"),
        ({"dtype": "float16"}, "cudnn"),
        ({"width": 40}, "cudnn"),  # SD 1.5 at 64x64
        ({"dtype": "float32"}, "xla"),  # cuDNN would round to half precision
        ({"width": 160}, "xla"),  # more than the older cards take
        ({"keys": 77}, "xla"),  # text
        ({"queries": 256, "keys": 256}, "xla"),
        ({"platform": "tpu"}, "pallas"),
        ({"platform": "tpu", "width": 40}, "pallas"),
        ({"platform": "tpu", "width": 512}, "pallas"),  # the autoencoder's
        ({"platform": "tpu", "width": 160}, "xla"),
        ({"platform": "tpu", "dtype": "float32"}, "xla"),
        ({"platform": "tpu", "queries": 1100, "keys": 1100}, "xla"),
        ({"platform": "tpu", "keys": 77}, "xla"),
        ({"platform": "cpu"}, "blocks"),
        ({"platform": "cpu", "keys": 77}, "blocks"),
        ({"platform": "cpu", "queries": 1100, "dtype": "float32"}, "blocks"),
        ({"platform": "cpu", "queries": 256}, "xla"),
        ({"platform": "cpu", "causal": True}, "xla"),
    ],
)
def test_choice(change: dict[str, Any], kernel: str) -> None:
    assert choose(dataclasses.replace(SDXL, **change)) == kernel


@pytest.mark.parametrize(("length", "width"), [(1024, 40), (1152, 64)])
def test_the_tpu_kernel_interpreted(length: int, width: int) -> None:
    q, k, v = (jax.random.normal(jax.random.key(i), (1, length, 1, width), jnp.bfloat16) for i in range(3))

    def loss(run: Any) -> Any:
        def value(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
            out = run(q, k, v, causal=False)
            return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

        return jax.jit(jax.grad(value, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    with pltpu.force_tpu_interpret_mode():
        grads, out = loss(dot_product._pallas)
    expected_grads, expected = loss(dot_product._xla)
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (out, expected)), atol=2e-3)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        scale = float(jnp.abs(theirs).max())
        np.testing.assert_allclose(*(np.asarray(x, np.float32) / scale for x in (ours, theirs)), atol=1e-2)


def test_what_the_library_refuses_goes_to_xla_and_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """No cuDNN on this platform: tracing for a GPU falls back."""
    dot_product._log.cache_clear()
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 1024, 1, 8), jnp.bfloat16) for i in range(3))
    with caplog.at_level(logging.INFO, logger="hypersd_jax"):
        for _ in range(2):
            out = attention(q, k, v, platform="gpu")
    np.testing.assert_array_equal(out, dot_product._xla(q, k, v, causal=False))
    messages = [record.message for record in caplog.records]
    assert len(messages) == 2
    assert "cudnn is not available here" in messages[0]
    assert messages[1].endswith("1024x1024x8 bfloat16 on gpu: xla")


def test_blocks_of_a_sequence() -> None:
    assert [dot_product._block(n) for n in (1024, 1152, 4096, 9216)] == [512, 384, 512, 512]
