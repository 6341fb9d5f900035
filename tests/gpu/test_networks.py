"""Networks on a GPU give what they give on a CPU from the same weights, in float32 and in bfloat16."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax.models.clip_text import ClipTextConfig, clip_text
from hypersd_jax.models.unet import UNetConfig, unet
from hypersd_jax.models.vae import VaeConfig, vae
from tests.helpers import tiny_model as tiny

pytestmark = pytest.mark.gpu

# Relative, by norm: of float32 the order of sums, of bfloat16 its eight bits through some ten layers.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
# 1024 tokens, from which on a GPU has a kernel for attention, and heads of eight.
SIDE = 32
UNET = UNetConfig.from_dict(
    {
        "block_out_channels": [32, 64],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "mid_block_type": None,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
    }
)
VAE = VaeConfig.from_dict({**tiny.VAE, "mid_block_add_attention": True})
TEXT = ClipTextConfig.from_dict(tiny.TEXT)
RANDOM = np.random.default_rng(0)
LATENTS = RANDOM.standard_normal((2, SIDE, SIDE, 4)).astype(np.float32)
CONTEXT = RANDOM.standard_normal((2, 7, 16)).astype(np.float32)
IDS = RANDOM.integers(0, 2000, (2, 24))


def make(name: str, dtype: Any) -> tuple[Any, Any]:
    """A network, and what calls it on its weights."""
    if name == "unet":
        network = unet(UNET, dtype=dtype)
        return network, lambda params: network(params, LATENTS, np.array([10, 990]), CONTEXT)
    if name == "decoder":
        network = vae(VAE, dtype=dtype)
        return network, lambda params: network(params, LATENTS, method="decode")
    network = clip_text(TEXT, dtype=dtype, projection=False)
    return network, lambda params: jax.tree.leaves(network(params, IDS))[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["unet", "decoder", "text"])
def test_values(name: str, dtype: str, gpu: jax.Device, cpu: jax.Device) -> None:
    run = make(name, dtype)[1]
    exact, run_exact = make(name, "float32")
    params = {path: leaf.astype(dtype) for path, leaf in exact.init(0).items()}
    rounded = {path: leaf.astype("float32") for path, leaf in params.items()}
    expected = np.asarray(jax.jit(run_exact)(jax.device_put(rounded, cpu)), np.float32)
    found = jax.jit(run)(jax.device_put(params, gpu))
    assert found.devices() == {gpu}
    assert found.dtype == jnp.dtype(dtype)
    assert np.linalg.norm(np.asarray(found, np.float32) - expected) < TOLERANCE[dtype] * np.linalg.norm(expected)
