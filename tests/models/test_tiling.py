"""Tiles: where they lie, that they add up to the whole, how many programs and how much memory they take."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax.models import VaeConfig, decode_tiled, encode_tiled, vae
from tests.helpers.quick import quick_jit

CONFIG = VaeConfig.from_dict(
    {
        "block_out_channels": [8, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "norm_num_groups": 4,
        "mid_block_add_attention": False,
    }
)
NETWORK = vae(CONFIG)
SIZE: dict[str, Any] = {"tile": 8, "overlap": 2, "factor": 2}


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def enlarge(z: jax.Array) -> dict[str, jax.Array]:
    """A decoder that looks at one pixel at a time."""
    big = jnp.repeat(jnp.repeat(z, 2, axis=1), 2, axis=2)
    return {"image": big, "sum": jnp.sum(big, axis=-1, keepdims=True)}


def shrink(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """An encoder that looks at one latent's pixels at a time."""
    b, h, w, c = x.shape
    mean = x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))
    return mean, -mean


@pytest.mark.parametrize("sides", [(8, 9), (9, 8), (5, 20), (14, 14), (15, 17), (20, 33)])
def test_what_is_local_is_unchanged(sides: tuple[int, int]) -> None:
    z = normal(2, *sides, 3)
    decoded = quick_jit(lambda z: decode_tiled(enlarge, z, **SIZE))(z)
    for name, whole in quick_jit(enlarge)(z).items():
        np.testing.assert_allclose(decoded[name], whole, rtol=1e-5, atol=1e-6)
    x = normal(2, 2 * sides[0], 2 * sides[1], 3)
    encoded = quick_jit(lambda x: encode_tiled(shrink, x, **SIZE))(x)
    for tiled, whole in zip(encoded, quick_jit(shrink)(x), strict=True):
        np.testing.assert_allclose(tiled, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sides", [(8, 8), (3, 8)])
def test_one_tile_is_the_whole(sides: tuple[int, int]) -> None:
    params, z = NETWORK.init(0), normal(2, *sides, 4)

    def decode(z: jax.Array) -> jax.Array:
        return NETWORK(params, z, method="decode")

    np.testing.assert_array_equal(quick_jit(lambda z: decode_tiled(decode, z, **SIZE))(z), quick_jit(decode)(z))


@pytest.mark.parametrize(
    ("sides", "shapes"),
    [
        ((15, 17), {(8, 8), (8, 5), (3, 8), (3, 5)}),
        ((14, 20), {(8, 8)}),  # both fit exactly: one program, and no strip inside the last tile
        ((5, 30), {(5, 8), (5, 6)}),
    ],
)
def test_few_programs(sides: tuple[int, int], shapes: set[tuple[int, int]]) -> None:
    seen: list[tuple[int, ...]] = []

    def decode(z: jax.Array) -> jax.Array:
        seen.append(z.shape[1:3])
        return enlarge(z)["image"]

    jax.eval_shape(lambda z: decode_tiled(decode, z, **SIZE), normal(1, *sides, 1))
    assert sorted(set(seen)) == sorted(shapes)
    assert len(seen) == len(shapes)


def test_memory_is_that_of_a_tile() -> None:
    """XLA's own count of what the program holds beside its arguments and its result."""
    params = NETWORK.init(0)

    def held(side: int, *, tiled: bool) -> int:
        def run(params: Any, z: jax.Array) -> jax.Array:
            def decode(z: jax.Array) -> jax.Array:
                return NETWORK(params, z, method="decode")

            return decode_tiled(decode, z, **SIZE) if tiled else decode(z)

        compiled = quick_jit(run).lower(params, normal(1, side, side, 4)).compile()
        return compiled.memory_analysis().temp_size_in_bytes - compiled.memory_analysis().output_size_in_bytes

    assert held(32, tiled=True) < held(32, tiled=False) / 3


def test_gradients_pass_through() -> None:
    z = normal(1, 9, 10, 2)
    gradient = quick_jit(jax.grad(lambda z: jnp.sum(decode_tiled(enlarge, z, **SIZE)["sum"])))(z)
    np.testing.assert_allclose(gradient, np.full_like(z, 4.0), rtol=1e-5)


@pytest.mark.parametrize("overlap", [0, 5, -1])
def test_wrong_overlaps(overlap: int) -> None:
    with pytest.raises(ValueError, match=rf"overlap of {overlap} does not lie in 1\.\.4"):
        decode_tiled(enlarge, normal(1, 20, 20, 1), tile=8, overlap=overlap, factor=2)


def test_images_of_odd_size() -> None:
    with pytest.raises(ValueError, match=r"\(21, 20\) pixels"):
        encode_tiled(shrink, normal(1, 21, 20, 1), **SIZE)
