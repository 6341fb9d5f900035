"""Winograd's convolutions against direct ones: values, the input's gradient, and a whole UNet."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax.adapters import init, join, split
from hypersd_jax.models import UNetConfig, prepared, unet, winograd
from hypersd_jax.models.functional import WINOGRAD, build
from hypersd_jax.models.layers import Conv, convolve
from hypersd_jax.models.prepared import prepare, tile_of
from hypersd_jax.models.winograd import convolve_tiles, transform

TOLERANCE = {2: 1e-6, 4: 5e-6}
CONFIG = UNetConfig.from_dict(
    {
        "block_out_channels": [16, 32],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 12,
        "attention_head_dim": 4,
    }
)


def relative(a: Any, b: Any) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def arrays(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.standard_normal(shape, np.float32) for shape in shapes]


@pytest.mark.parametrize("m", [2, 4])
def test_gradient_is_that_of_the_direct_convolution(m: int) -> None:
    x, kernel, g = map(jnp.asarray, arrays((2, 9, 10, 6), (3, 3, 6, 7), (2, 9, 10, 7)))
    _, pull = jax.vjp(lambda x: convolve_tiles(x, transform(kernel, m)), x)
    _, direct = jax.vjp(lambda x: convolve(x, kernel, (1, 1), ((1, 1), (1, 1))), x)
    assert relative(pull(g)[0], direct(g)[0]) < TOLERANCE[m]


def test_rule() -> None:
    assert tile_of(64, 320, 320) == 2
    assert tile_of(128, 512, 512) == 4
    assert tile_of(8, 1280, 1280) is None  # the kernel weighs more than the pixels
    assert tile_of(512, 128, 128) is None
    assert tile_of(16, 64, 64) is None  # as in the embedded model


def test_layer_chooses_by_the_features() -> None:
    """Small features, other data types and a LoRA beside it are as without a transformed kernel."""
    network = build(lambda: Conv(8, 8, 3, padding=1))
    params = network.init(0)
    both = {**params, "kernel" + WINOGRAD: transform(params["kernel"], 2)}
    large, small = map(jnp.asarray, arrays((1, 16, 16, 8), (1, 8, 8, 8)))
    assert np.array_equal(network(params, small), network(both, small))
    half = large.astype(jnp.bfloat16)
    assert np.array_equal(np.asarray(network(params, half), np.float32), np.asarray(network(both, half), np.float32))
    assert not np.array_equal(network(params, large), network(both, large))
    assert relative(network(both, large), network(params, large)) < TOLERANCE[2]


def test_unknown_parameters_are_still_refused() -> None:
    network = build(lambda: Conv(8, 8, 3, padding=1))
    with pytest.raises(KeyError, match="do not match"):
        network.module({**network.init(0), "other": jnp.zeros(1)})


def test_whole_unet_values_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """With Winograd in every 3x3 convolution of stride 1, a UNet and its LoRA's gradient stay what they were."""
    monkeypatch.setattr(prepared, "CHANNELS", 16)
    monkeypatch.setattr(prepared, "SIDES", (1, 128))
    monkeypatch.setattr(winograd, "FEWEST_TILES", 1)
    network = unet(CONFIG)
    params = network.init(0, gain=3**0.5)
    added = prepare(params, 4, 2**30)
    assert len(added) == 17  # two a residual block, of which there are eight, and the upsampler
    factors, scales = split(init(jax.random.key(0), network.shapes, rank=2))
    factors = jax.tree.map(lambda leaf: leaf + 0.1, factors)
    x, context = map(jnp.asarray, arrays((1, 8, 8, 4), (1, 3, 12)))

    @jax.jit
    def both(params: Any, factors: Any) -> Any:
        def loss(factors: Any) -> Any:
            y = network(params, x, jnp.asarray([500]), context, adapter=join(factors, scales))
            return jnp.mean(y**2), y

        return jax.grad(loss, has_aux=True)(factors)

    (grads, y), (direct_grads, direct) = both({**params, **added}, factors), both(params, factors)
    assert 0 < relative(y, direct) < 5e-6
    flat, direct_flat = (np.concatenate([np.ravel(a) for a in jax.tree.leaves(g)]) for g in (grads, direct_grads))
    assert 0 < relative(flat, direct_flat) < 5e-6


def test_budget_takes_the_largest_features_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "CHANNELS", 16)
    params = unet(CONFIG).init(0)
    every = prepare(params, 32, 2**30)
    one = max(leaf.nbytes for path, leaf in every.items() if path.startswith("down_blocks.0"))
    few = prepare(params, 32, one)
    assert few
    assert sum(leaf.nbytes for leaf in few.values()) <= one
    assert all(path.startswith(("down_blocks.0", "up_blocks.1")) for path in few)
    assert prepare(params, 32, 0) == {}
    assert not any("downsamplers" in path for path in every)
    half = {path: leaf.astype(jnp.bfloat16) for path, leaf in params.items()}
    assert prepare(half, 32, 2**30) == {}
