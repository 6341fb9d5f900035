"""Discriminator heads: which features they read, how they run, what a fresh one says."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hypersd_jax.models import (
    Network,
    UNetConfig,
    all_taps,
    encoder_taps,
    patch_heads,
    pooled_heads,
    tap_channels,
    unet,
)
from tests.helpers.configs import SD15, SDXL
from tests.helpers.quick import quick_jit

TINY_SD15 = {**SD15["unet"], "block_out_channels": [8, 16, 24, 32], "norm_num_groups": 4, "attention_head_dim": 2}
TINY_SDXL = {
    **SDXL["unet"],
    "block_out_channels": [8, 16, 24],
    "norm_num_groups": 4,
    "attention_head_dim": [1, 2, 2],
    "transformer_layers_per_block": [1, 1, 2],
}
CHANNELS = {"down_blocks.0": 12, "mid_block": 32}
SIZES = {"down_blocks.0": (7, 6), "mid_block": (4, 5)}


def make(kind: str, channels: dict[str, int] = CHANNELS, **settings: Any) -> Network:
    return patch_heads(channels, **settings) if kind == "patch" else pooled_heads(channels, downsamples=2, **settings)


def features(batch: int = 2, channels: dict[str, int] = CHANNELS) -> dict[str, jax.Array]:
    random = np.random.default_rng(0)
    return {
        tap: jnp.asarray(random.standard_normal((batch, *SIZES[tap], width)), jnp.float32)
        for tap, width in channels.items()
    }


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "no_middle"])
def test_tap_channels_are_those_of_the_unet(kind: str) -> None:
    given = {"sd15": TINY_SD15, "sdxl": TINY_SDXL, "no_middle": {**TINY_SD15, "mid_block_type": None}}[kind]
    config = UNetConfig.from_dict(given)
    network, taps = unet(config), all_taps(config)
    added = {"pooled": jnp.zeros((2, config.pooled_dim)), "time_ids": jnp.zeros((2, 6))} if config.text_time else {}
    _, found = jax.eval_shape(
        lambda params: network(
            params,
            jnp.zeros((2, 9, 8, 4)),
            jnp.zeros(2),
            jnp.zeros((2, 3, config.cross_attention_dim)),
            taps=taps,
            **added,
        ),
        network.shapes,
    )
    assert tap_channels(config, taps) == {tap: feature.shape[-1] for tap, feature in found.items()}
    assert list(found) == list(taps)  # no block is missing
    assert len(taps) == 2 * len(config.channels) + (kind != "no_middle")
    assert encoder_taps(config) == tuple(tap for tap in taps if not tap.startswith("up_blocks"))


def test_tap_channels_at_full_size() -> None:
    sd15, sdxl = UNetConfig.from_dict(SD15["unet"]), UNetConfig.from_dict(SDXL["unet"])
    assert list(tap_channels(sd15, all_taps(sd15)).values()) == [320, 640, 1280, 1280, 1280, 1280, 1280, 640, 320]
    assert list(tap_channels(sdxl, encoder_taps(sdxl)).values()) == [320, 640, 1280, 1280]
    assert tap_channels(sdxl, ["up_blocks.2", "down_blocks.1"]) == {"up_blocks.2": 320, "down_blocks.1": 640}
    with pytest.raises(ValueError, match=r"no tap 'down_blocks.3', only down_blocks.0, .*mid_block.*up_blocks.2$"):
        tap_channels(sdxl, ["down_blocks.3"])


@pytest.mark.parametrize("kind", ["patch", "pooled"])
def test_logits_by_tap(kind: str) -> None:
    network = make(kind)
    logits = jax.eval_shape(network, network.shapes, features())
    shapes = {tap: SIZES[tap] if kind == "patch" else tuple(side // 4 for side in SIZES[tap]) for tap in CHANNELS}
    assert {tap: head.shape for tap, head in logits.items()} == {tap: (2, *shapes[tap], 1) for tap in CHANNELS}
    assert {head.dtype for head in logits.values()} == {jnp.dtype("float32")}
    for given in ({"mid_block": features()["mid_block"]}, {**features(), "up_blocks.0": features()["mid_block"]}):
        with pytest.raises(ValueError, match=r"for heads on down_blocks.0, mid_block"):
            jax.eval_shape(network, network.shapes, given)


def test_features_too_small_to_be_halved() -> None:
    network = pooled_heads({"mid_block": 8}, downsamples=3)
    least = jax.eval_shape(network, network.shapes, {"mid_block": jnp.ones((1, 8, 9, 8))})
    assert least["mid_block"].shape == (1, 1, 1, 1)
    with pytest.raises(ValueError, match="7x9 cannot be halved 3 times"):
        jax.eval_shape(network, network.shapes, {"mid_block": jnp.ones((1, 7, 9, 8))})


@pytest.mark.parametrize("kind", ["patch", "pooled"])
def test_a_fresh_head_is_undecided(kind: str) -> None:
    """Logits of order one or less, whatever the features' scale, on wide heads too: no loss starts saturated."""
    channels = {"down_blocks.0": 64, "mid_block": 320}
    network = make(kind, channels)
    run = quick_jit(network)
    for seed in range(3):
        for scale in (0.1, 30.0):
            given = {tap: scale * x for tap, x in features(8, channels).items()}
            for head in run(network.init(seed), given).values():
                assert 0.05 < float(jnp.std(head)) < 1
                assert float(jnp.max(jnp.abs(head))) < 3


@pytest.mark.parametrize("kind", ["patch", "pooled"])
def test_a_head_starts_alike_whatever_the_other_taps(kind: str) -> None:
    both = make(kind).init(3)
    alone = make(kind, {"mid_block": 32}).init(3)
    assert alone
    assert all(np.array_equal(both[path], leaf) for path, leaf in alone.items())


def test_narrow_features_of_one_pixel_still_count() -> None:
    """One channel to a group would leave a single pixel nothing but the norm's shift."""
    network = pooled_heads({"mid_block": 8}, downsamples=1)
    x = jax.random.normal(jax.random.key(0), (16, 2, 2, 8))
    assert float(jnp.std(network(network.init(0), {"mid_block": x})["mid_block"])) > 0.05


@pytest.mark.parametrize("kind", ["patch", "pooled"])
def test_half_precision_computes_on_float32_parameters(kind: str) -> None:
    network, params = make(kind, dtype=jnp.bfloat16), make(kind).init(0)
    assert {leaf.dtype for leaf in network.shapes.values()} == {jnp.dtype("float32")}
    half, full = quick_jit(network)(params, features()), quick_jit(make(kind))(params, features())
    for tap in CHANNELS:
        assert half[tap].dtype == jnp.float32
        error = float(jnp.linalg.norm(half[tap] - full[tap]) / jnp.linalg.norm(full[tap]))
        assert 1e-4 < error < 3e-2, tap


@pytest.mark.parametrize("kind", ["patch", "pooled"])
def test_remat_recomputes_the_same(kind: str) -> None:
    params, given = make(kind).init(0), features()

    def gradient(network: Network) -> Any:
        return jax.grad(lambda p: sum(jnp.sum(jnp.square(head)) for head in network(p, given).values()))

    def products(function: Any) -> int:
        text = str(jax.make_jaxpr(function)(params))
        return text.count("dot_general[") + text.count("conv_general_dilated[")

    plain, remat = gradient(make(kind)), gradient(make(kind, remat=True))
    assert products(remat) > products(plain)
    wanted, found = quick_jit(plain)(params), quick_jit(remat)(params)
    for path, leaf in wanted.items():
        np.testing.assert_allclose(found[path], leaf, rtol=1e-4, atol=1e-5, err_msg=path)


def test_batch_sharding_constrains_each_head() -> None:
    mesh = jax.make_mesh((1, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    network = make("patch", batch_sharding=NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    params = network.init(0)
    assert str(jax.make_jaxpr(network)(params, features())).count("sharding_constraint") == len(CHANNELS)
    for tap, head in make("patch")(params, features()).items():
        np.testing.assert_allclose(network(params, features())[tap], head, rtol=1e-6)
