"""How the autoencoder runs: data types."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hypersd_jax.models import VaeConfig, vae
from tests.helpers.quick import quick_jit

CONFIG = VaeConfig.from_dict(
    {
        "block_out_channels": [8, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "norm_num_groups": 4,
    }
)
IMAGES = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)


def loop(network: Any) -> Any:
    """Encode and decode the means."""

    def run(params: Any, images: Any) -> jax.Array:
        mean, logvar = network(params, images, method="encode")
        assert mean.shape == logvar.shape == (2, 4, 4, 4)
        return network(params, mean, method="decode")

    return run


def test_half_precision_is_near_float32() -> None:
    params = vae(CONFIG).init(0)
    out = quick_jit(loop(vae(CONFIG)))(params, IMAGES)
    assert out.shape == IMAGES.shape
    half = {path: leaf.astype(jnp.bfloat16) for path, leaf in params.items()}
    rough = quick_jit(loop(vae(CONFIG, dtype=jnp.bfloat16)))(half, IMAGES)
    assert rough.dtype == jnp.bfloat16
    assert float(jnp.linalg.norm(rough.astype(jnp.float32) - out)) < 3e-2 * float(jnp.linalg.norm(out))
