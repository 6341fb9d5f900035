"""How the tiny autoencoder runs, and what its configuration may hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax.errors import UserError
from hypersd_jax.models import TinyVaeConfig, VaeConfig, tiny_vae
from hypersd_jax.models.autoencoder import read_vae_config, vae_network
from hypersd_jax.weights.diffusers.component import save_params
from hypersd_jax.weights.diffusers.vae import load_vae
from tests.helpers.quick import quick_jit

SMALL: dict[str, Any] = {
    "_class_name": "AutoencoderTiny",
    "encoder_block_out_channels": [8, 8],
    "decoder_block_out_channels": [8, 8],
    "block_out_channels": [8, 8],
    "num_encoder_blocks": [1, 1],
    "num_decoder_blocks": [1, 1],
}
CONFIG = TinyVaeConfig.from_dict(SMALL)
OWN = VaeConfig.from_dict({})
IMAGES = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)


def loop(network: Any) -> Any:
    """Encode and decode."""

    def run(params: Any, images: Any) -> jax.Array:
        latents, logvar = network(params, images, method="encode")
        assert latents.shape == logvar.shape == (2, 4, 4, 4)
        return network(params, latents, method="decode")

    return run


def test_half_precision_is_near_float32() -> None:
    params = tiny_vae(CONFIG).init(0)
    out = quick_jit(loop(tiny_vae(CONFIG)))(params, IMAGES)
    assert out.shape == IMAGES.shape
    half = {path: leaf.astype(jnp.bfloat16) for path, leaf in params.items()}
    rough = quick_jit(loop(tiny_vae(CONFIG, dtype=jnp.bfloat16)))(half, IMAGES)
    assert rough.dtype == jnp.bfloat16
    assert float(jnp.linalg.norm(rough.astype(jnp.float32) - out)) < 3e-2 * float(jnp.linalg.norm(out))


def test_encoding_is_deterministic() -> None:
    network = tiny_vae(CONFIG)
    latents, logvar = quick_jit(lambda params: network(params, IMAGES, method="encode"))(network.init(0))
    assert float(jnp.exp(0.5 * logvar).max()) < 1e-6 < float(jnp.abs(latents).max())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"encoder_block_out_channels": [8, 16]}, r"encoder_block_out_channels=\[8, 16\] must be 2 times the same"),
        ({"num_decoder_blocks": [1, 1, 1]}, "num_decoder_blocks"),
        ({"num_encoder_blocks": []}, r"num_encoder_blocks=\[\] is not a list"),
        ({"upsample_fn": "bilinear"}, "upsample_fn='bilinear' is not supported"),
        ({"upsampling_scaling_factor": 4}, "upsampling_scaling_factor=4 is not supported"),
        ({"scaling_factor": 0}, "scaling_factor=0 is not positive"),
        ({"act_fn": "tanh"}, "act_fn='tanh' is not supported"),
        ({"_class_name": "AutoencoderKL"}, "expected AutoencoderTiny"),
    ],
)
def test_configurations_that_are_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        TinyVaeConfig.from_dict({**SMALL, **change})


def test_a_folder_is_read(tmp_path: Path) -> None:
    params = tiny_vae(CONFIG).init(0)
    save_params(tmp_path, params, config=SMALL, component_kind="vae")
    loaded = load_vae(tmp_path, vae_config=OWN, dtype=jnp.float16)
    assert loaded.config == CONFIG
    assert loaded.params["decoder.layers.0.kernel"].dtype == jnp.float16
    np.testing.assert_array_equal(loaded.params["decoder.layers.0.bias"], params["decoder.layers.0.bias"])
    with pytest.raises(UserError, match=r": latent_channels=4, but the model has 16$"):
        load_vae(tmp_path, vae_config=VaeConfig.from_dict({"latent_channels": 16}), dtype=jnp.float32)
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "num_encoder_blocks": [1, 2]}))
    with pytest.raises(UserError, match=r"do not fit the configuration: .* missing"):
        load_vae(tmp_path, vae_config=OWN, dtype=jnp.float32)
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "act_fn": 1}))
    with pytest.raises(UserError, match=r"config\.json: AutoencoderTiny config: act_fn=1"):
        load_vae(tmp_path, vae_config=OWN, dtype=jnp.float32)


def test_a_large_one_may_overflow_in_float16() -> None:
    config = read_vae_config({"block_out_channels": [32], "force_upcast": True})
    assert {leaf.dtype for leaf in vae_network(config, dtype=jnp.float16).shapes.values()} == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in vae_network(CONFIG, dtype=jnp.float16).shapes.values()} == {jnp.dtype(jnp.float16)}
