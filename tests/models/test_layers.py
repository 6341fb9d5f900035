"""Layers and networks as functions, where no original is needed to know what is right."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hypersd_jax.models.functional import build, dotted, undotted
from hypersd_jax.models.layers import Conv, Empty, GroupNorm, LayerNorm, Linear, timestep_embedding


class Tiny(nnx.Module):
    def __init__(self, dtype: Any = jnp.float32) -> None:
        self.net = nnx.List([Linear(3, 4, dtype=dtype), Empty(), Linear(4, 2, bias=False, dtype=dtype)])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.net[2](self.net[0](x))

    def first(self, x: jax.Array) -> jax.Array:
        return self.net[0](x)


def test_paths_are_dotted_and_back() -> None:
    assert undotted("net.0.kernel") == ("net", 0, "kernel")
    assert dotted(("net", 0, "kernel")) == "net.0.kernel"


def test_network_is_a_function_of_its_parameters() -> None:
    network = build(Tiny)
    assert {path: leaf.shape for path, leaf in network.shapes.items()} == {
        "net.0.bias": (4,),
        "net.0.kernel": (3, 4),
        "net.2.kernel": (4, 2),
    }
    params = network.init(0)
    x = np.ones((2, 3), np.float32)
    expected = (x @ params["net.0.kernel"]) @ params["net.2.kernel"]
    np.testing.assert_allclose(jax.jit(network)(params, x), expected, rtol=1e-5)
    np.testing.assert_allclose(network(params, x, method="first"), x @ params["net.0.kernel"], rtol=1e-5)
    assert hash(network) != hash(build(Tiny))


def test_parameters_must_match() -> None:
    network = build(Tiny)
    params = network.init(0)
    with pytest.raises(KeyError, match=r"net\.0\.bias"):
        network({path: leaf for path, leaf in params.items() if path != "net.0.bias"}, np.ones((1, 3)))
    with pytest.raises(KeyError, match="other"):
        network({**params, "other": params["net.0.bias"]}, np.ones((1, 3)))


def test_init_depends_on_seed_and_path_alone() -> None:
    a, b, c = build(Tiny).init(0), build(Tiny).init(0), build(Tiny).init(1)
    for path, leaf in a.items():
        np.testing.assert_array_equal(leaf, b[path])
    assert not np.array_equal(a["net.0.kernel"], c["net.0.kernel"])
    assert float(jnp.abs(a["net.0.kernel"]).max()) <= 3**-0.5
    assert build(lambda: Tiny(jnp.bfloat16)).init(0)["net.0.kernel"].dtype == jnp.bfloat16


def test_group_norm_of_large_offsets_is_accurate() -> None:
    """A one-pass variance (E[x^2] - E[x]^2) loses everything here."""
    x = np.random.default_rng(0).standard_normal((2, 4, 4, 8)).astype(np.float32) + 3000
    network = build(lambda: GroupNorm(2, 8, eps=0.0))
    y = np.asarray(network(network.init(0), x)).reshape(2, 16, 2, 4)
    np.testing.assert_allclose(y.mean(axis=(1, 3)), 0, atol=1e-3)
    np.testing.assert_allclose(y.std(axis=(1, 3)), 1, atol=1e-3)


def test_layer_norm() -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
    network = build(lambda: LayerNorm(8, eps=1e-5))
    y = np.asarray(network(network.init(0), x))
    np.testing.assert_allclose(y, (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5), atol=1e-5)


@pytest.mark.parametrize(
    ("stride", "padding", "shape"), [(1, 1, (5, 6)), (2, 1, (3, 3)), (2, ((0, 1), (0, 1)), (2, 3))]
)
def test_conv_shapes(stride: int, padding: Any, shape: tuple[int, int]) -> None:
    network = build(lambda: Conv(3, 4, 3, stride=stride, padding=padding))
    assert network(network.init(0), np.ones((1, 5, 6, 3), np.float32)).shape == (1, *shape, 4)


def test_timestep_embedding() -> None:
    out = np.asarray(timestep_embedding(jnp.array([0, 500]), 7))
    assert out.shape == (2, 7)
    np.testing.assert_allclose(out[0], [1, 1, 1, 0, 0, 0, 0])
    rates = 10000.0 ** (-np.arange(3) / 3)
    np.testing.assert_allclose(out[1, :3], np.cos(500 * rates), atol=1e-4)
    np.testing.assert_allclose(out[1, 3:6], np.sin(500 * rates), atol=1e-4)
