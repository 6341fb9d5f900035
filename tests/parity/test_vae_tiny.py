"""The tiny autoencoder against diffusers' AutoencoderTiny: values and all gradients, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from diffusers import AutoencoderKL, AutoencoderTiny

from hypersd_jax.models import TinyVaeConfig, VaeConfig, tiny_vae
from hypersd_jax.weights.diffusers.vae import load_vae
from tests.helpers.quick import quick_jit
from tests.helpers.torch_weights import params_from_torch, perturb, relative_error

CONFIGS: dict[str, dict[str, Any]] = {
    "taesd": {},
    "small": {
        "encoder_block_out_channels": [8, 8],
        "decoder_block_out_channels": [12, 12],
        "num_encoder_blocks": [0, 2],
        "num_decoder_blocks": [1, 0],
        "act_fn": "silu",
        "latent_channels": 6,
        "scaling_factor": 0.5,
        "shift_factor": 0.1,
    },
}
SIZES = {"taesd": (16, 24), "small": (10, 14)}


def nchw(array: np.ndarray) -> torch.Tensor:
    return torch.tensor(array).permute(0, 3, 1, 2).requires_grad_()


def nhwc(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.permute(0, 2, 3, 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_gradients(name: str) -> None:
    torch.manual_seed(0)
    theirs = perturb(AutoencoderTiny(**CONFIGS[name]), seed=1)
    config = TinyVaeConfig.from_dict(CONFIGS[name])
    network = tiny_vae(config)
    params = params_from_torch(theirs, network.shapes)
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    (h, w), c, f = SIZES[name], config.latent_channels, config.downscale
    # Latents of some size, so that the clamp matters.
    images, latents = normal(2, h, w, 3), 3 * normal(2, h // f, w // f, c)
    cotangents = normal(2, h // f, w // f, c), normal(2, h, w, 3)

    @quick_jit
    def ours(params: Any, images: Any, latents: Any) -> Any:
        def run(params: Any, images: Any, latents: Any) -> Any:
            mean, _ = network(params, images, method="encode")
            return mean, network(params, latents, method="decode")

        values, back = jax.vjp(run, params, images, latents)
        return values, back(cotangents)

    (encoded, decoded), (params_grad, images_grad, latents_grad) = ours(params, images, latents)

    their_images, their_latents = nchw(images), nchw(latents)
    their_images.retain_grad()
    their_latents.retain_grad()
    wanted = nhwc(theirs.encode(their_images).latents), nhwc(theirs.decode(their_latents).sample)
    sum((value * torch.tensor(cotangent)).sum() for value, cotangent in zip(wanted, cotangents, strict=True)).backward()

    assert relative_error(encoded, wanted[0]) < 1e-5
    assert relative_error(decoded, wanted[1]) < 1e-5
    assert relative_error(images_grad, nhwc(their_images.grad)) < 1e-4
    assert relative_error(latents_grad, nhwc(their_latents.grad)) < 1e-4
    for path, gradient in params_from_torch(theirs, network.shapes, grads=True).items():
        assert relative_error(params_grad[path], gradient) < 1e-4, path


def test_folders_of_either_kind(tmp_path: Path) -> None:
    """What diffusers writes is read by its class."""
    torch.manual_seed(0)
    large = {
        "block_out_channels": [8, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "norm_num_groups": 4,
        "mid_block_add_attention": False,
        "latent_channels": 6,
    }
    latents = np.random.default_rng(0).standard_normal((1, 4, 5, 6)).astype(np.float32)
    for theirs in (perturb(AutoencoderTiny(**CONFIGS["small"]), 1), perturb(AutoencoderKL(**large), 1)):
        folder = tmp_path / type(theirs).__name__
        theirs.save_pretrained(folder)
        loaded = load_vae(folder, vae_config=VaeConfig.from_dict(large), dtype=jnp.float32)
        assert loaded.config.scaling_factor == theirs.config.scaling_factor
        assert loaded.config.downscale == 2
        decode = quick_jit(lambda params, network=loaded.network: network(params, latents, method="decode"))
        with torch.no_grad():
            assert relative_error(decode(loaded.params), nhwc(theirs.decode(nchw(latents)).sample)) < 1e-5
