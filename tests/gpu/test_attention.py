"""The attention kernel that a GPU is given agrees with XLA's form, values and gradients, and is the one that runs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.gpu.kernels import count_kernels, grouped
from hypersd_jax.models.dot_product import attention

pytestmark = pytest.mark.gpu

TOLERANCE = 2e-2
"""Relative, by norm, between two forms in bfloat16."""


def inputs(device: jax.Device, keys: int, width: int) -> list[jax.Array]:
    """q, k and v, and the gradient of the output."""
    random = np.random.default_rng(0)
    shapes = [(2, length, 4, width) for length in (1024, keys, keys, 1024)]
    return [jax.device_put(jnp.asarray(random.standard_normal(shape), jnp.bfloat16), device) for shape in shapes]


def program(arrays: list[jax.Array], **how: Any) -> Any:
    def both(q: jax.Array, k: jax.Array, v: jax.Array, pulled: jax.Array) -> Any:
        value, pull = jax.vjp(lambda *qkv: attention(*qkv, platform="gpu", **how), q, k, v)
        return value, *pull(pulled)

    return jax.jit(both).lower(*arrays).compile()


@pytest.mark.parametrize(("keys", "width"), [(1024, 40), (1024, 64), (77, 40)])
def test_values_and_gradients(keys: int, width: int, gpu: jax.Device) -> None:
    arrays = inputs(gpu, keys, width)
    seen = jax.device_put(jnp.ones((2, keys), bool), gpu)  # a mask is XLA's alone
    for found, expected in zip(program(arrays)(*arrays), program(arrays, keep=seen)(*arrays), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (found, expected))
        assert np.linalg.norm(a - b) < TOLERANCE * np.linalg.norm(b)


def test_cudnn_is_what_runs(gpu: jax.Device) -> None:
    if gpu.platform != "gpu":
        pytest.skip("no GPU")
    text = program(inputs(gpu, 1024, 64)).as_text()
    assert grouped(count_kernels(text))["cuDNN attention"] == 2, count_kernels(text)  # forward and backward
