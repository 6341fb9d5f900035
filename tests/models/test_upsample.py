"""Convolving an enlarged image without making it: the same numbers as enlarging first."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax import adapters
from hypersd_jax.models import upsample
from hypersd_jax.models.execution import Execution
from hypersd_jax.models.functional import build
from hypersd_jax.models.layers import convolve
from tests.helpers.quick import quick_jit


def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
    enlarged = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    return convolve(enlarged, kernel, (1, 1), ((1, 1), (1, 1)))


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (2, 3, 5, 4), (1, 8, 8, 6)])
def test_values_and_gradients(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((3, 3, shape[-1], 5)), jnp.float32)

    def loss(f):
        return lambda x, kernel: jnp.sum(jnp.sin(f(x, kernel)))

    doubled, wanted = (quick_jit(f)(x, kernel) for f in (upsample.convolve_doubled, plain))
    np.testing.assert_allclose(doubled, wanted, rtol=1e-5, atol=1e-5)
    found, expected = (
        quick_jit(jax.grad(loss(f), argnums=(0, 1)))(x, kernel) for f in (upsample.convolve_doubled, plain)
    )
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_module_takes_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """With bias and LoRA, by both ways, and to a size that is not twice as large."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((2, 6, 4, 8)), jnp.float32)
    network = build(lambda: upsample.Upsample(8, how=Execution()))
    params = {path: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32) for path, leaf in network.shapes.items()}
    adapter = {
        "conv": {
            "down": jnp.asarray(rng.standard_normal((3, 3, 8, 2)), jnp.float32),
            "up": jnp.asarray(rng.standard_normal((2, 8)), jnp.float32),
            "scale": jnp.asarray([0.5, 2.0], jnp.float32),
        }
    }
    merged = adapters.merge(params, adapter)
    expected = plain(x, merged["conv.kernel"]) + merged["conv.bias"][None, None, None]
    for pixels in (1, 10**6):
        monkeypatch.setattr(upsample, "MANY_PIXELS", pixels)
        np.testing.assert_allclose(network(params, x, adapter=adapter), expected, rtol=1e-4, atol=1e-4)
        assert network(params, x, (13, 9)).shape == (2, 13, 9, 8)


def test_bfloat16_rounds_the_summed_taps_once() -> None:
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((1, 8, 8, 16)), jnp.bfloat16)
    kernel = jnp.asarray(rng.standard_normal((3, 3, 16, 16)), jnp.bfloat16)
    exact = plain(x.astype(jnp.float32), kernel.astype(jnp.float32))
    found = upsample.convolve_doubled(x, kernel)
    assert found.dtype == jnp.bfloat16
    assert float(jnp.abs(found - exact).max() / jnp.abs(exact).max()) < 2**-7
