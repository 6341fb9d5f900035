"""The adapter in the forward pass: same result as merged weights, under jit, grad and checkpoint."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from hypersd_jax import adapters

RNG = np.random.default_rng(0)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


class Dense(nnx.Module):
    def __init__(self, shape: tuple[int, int]) -> None:
        self.kernel = nnx.Param(normal(*shape))
        self.lora = None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.matmul(x, self.kernel[...], precision="highest")
        return y if self.lora is None else y + adapters.apply_linear(x, self.lora)


class Window(nnx.Module):
    def __init__(self, shape: tuple[int, int, int, int], stride: int) -> None:
        self.kernel = nnx.Param(normal(*shape))
        self.strides = (stride, stride)
        self.lora = None

    def __call__(self, x: jax.Array) -> jax.Array:
        padding = ((0, 1), (0, 1)) if self.strides == (2, 2) else ((1, 1), (1, 1))
        y = lax.conv_general_dilated(
            x, self.kernel[...], self.strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
        )
        return y if self.lora is None else y + adapters.apply_conv(x, self.lora, self.strides, padding)


class Toy(nnx.Module):
    def __init__(self) -> None:
        self.convs = nnx.List([Window((3, 3, 3, 6), 1), Window((3, 3, 6, 5), 2)])
        self.blocks = nnx.List([nnx.List([Dense((5, 7))]), nnx.List([Dense((7, 5))])])

    def __call__(self, x: jax.Array, remat: bool = False) -> jax.Array:
        wrap: Callable[[Callable[[jax.Array], Any]], Callable[[jax.Array], Any]] = (
            jax.checkpoint if remat else lambda f: f
        )
        for layer in [*self.convs, self.blocks[0][0], self.blocks[1][0]]:
            x = jnp.tanh(wrap(lambda value, layer=layer: layer(value))(x))
        return x


GRAPH, STATE = nnx.split(Toy())
PARAMS = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(STATE)}
X = normal(2, 8, 8, 3)
TARGETS = ("convs.0", "convs.1", "blocks.0.0", "blocks.1.0")


@functools.partial(jax.jit, static_argnums=3)
def run(params: dict, adapter: adapters.Adapter | None, x: jax.Array, remat: bool = False) -> jax.Array:
    flat = [(tuple(int(p) if p.isdigit() else p for p in path.split(".")), leaf) for path, leaf in params.items()]
    module = nnx.merge(GRAPH, nnx.from_flat_state(flat))
    if adapter is not None:
        adapters.attach(module, adapter)
    return module(x, remat)


def adapter_of(seed: int) -> adapters.Adapter:
    rng = np.random.default_rng(seed)
    adapter = {}
    for path in TARGETS:
        *window, fan_out = PARAMS[path + ".kernel"].shape
        shapes = {"down": (*window, 4), "up": (4, fan_out), "scale": (4,)}
        adapter[path] = {name: (0.3 * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}
    return adapter


@pytest.mark.parametrize("remat", [False, True])
def test_attached_adapter_equals_merged_weights_and_so_do_its_gradients(remat: bool) -> None:
    def loss(adapter: adapters.Adapter, merge: bool) -> jax.Array:
        out = run(adapters.merge(PARAMS, adapter), None, X) if merge else run(PARAMS, adapter, X, remat)
        return jnp.sum(out**2)

    adapter = adapter_of(0)
    plain = jnp.sum(run(PARAMS, None, X) ** 2)
    value, grads = jax.jit(jax.value_and_grad(lambda adapter: loss(adapter, False)))(adapter)
    expected, expected_grads = jax.jit(jax.value_and_grad(lambda adapter: loss(adapter, True)))(adapter)
    assert value == pytest.approx(float(expected), rel=1e-5)
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    assert abs(value - plain) > 1e-2 * plain


def test_a_fresh_adapter_changes_nothing() -> None:
    fresh = adapters.init(jax.random.key(0), PARAMS, rank=4, targets=TARGETS)
    np.testing.assert_array_equal(run(PARAMS, fresh, X), run(PARAMS, None, X))


def test_another_adapter_of_the_same_bucket_compiles_nothing() -> None:
    step = jax.jit(lambda adapter: run(PARAMS, adapter, X))
    first, second = adapters.pad(adapter_of(0)), adapters.pad(adapters.concatenate([adapter_of(1), adapter_of(2)]))
    step(first)
    step(adapters.scaled(second, 0.5))
    assert step._cache_size() == 1


def test_attaching_leaves_the_next_merge_alone() -> None:
    plain = run(PARAMS, None, X)
    run(PARAMS, adapter_of(0), X)
    np.testing.assert_array_equal(run(PARAMS, None, X), plain)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_terms_come_in_the_dtype_of_the_input(dtype: Any) -> None:
    adapter = adapter_of(0)
    x = X.astype(dtype)
    conv = adapters.apply_conv(x, adapter["convs.1"] | {"down": jnp.ones((3, 3, 3, 4))}, (2, 2), ((0, 1), (0, 1)))
    assert conv.shape == (2, 4, 4, 5)
    assert conv.dtype == dtype
    assert adapters.apply_linear(jnp.ones((2, 3, 5), dtype), adapter["blocks.0.0"]).dtype == dtype


@pytest.mark.parametrize("path", ["blocks.0.1", "blocks.0.0.nothing", "nowhere", "convs", "blocks.0.0.kernel"])
def test_a_path_without_an_adaptable_layer_is_named(path: str) -> None:
    with pytest.raises(KeyError, match=path):
        run(PARAMS, {path: adapter_of(0)["blocks.0.0"]}, X)


def test_works_in_the_tree_mode_of_nnx() -> None:
    """The mode is read when flax is imported, hence a process of its own."""
    code = (
        "import runpy, sys; import jax; m = runpy.run_path(sys.argv[1]);"
        "m['test_attached_adapter_equals_merged_weights_and_so_do_its_gradients'](True)"
    )
    environment = {**os.environ, "NNX_GRAPH_MODE": "false", "NNX_GRAPH_UPDATES": "false", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
