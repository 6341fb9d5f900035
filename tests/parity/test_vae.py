"""The autoencoder against diffusers' AutoencoderKL: values and all gradients, in float32."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from diffusers import AutoencoderKL

from hypersd_jax.models import VaeConfig, vae
from tests.helpers.quick import quick_jit
from tests.helpers.torch_weights import params_from_torch, perturb, relative_error

SMALL: dict[str, Any] = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "attention": SMALL,
    "plain": {
        **SMALL,
        "block_out_channels": [8, 16, 24],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "mid_block_add_attention": False,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "latent_channels": 6,
        "layers_per_block": 2,
    },
}
SIZES = {"attention": (10, 14), "plain": (8, 12)}


def nchw(array: np.ndarray) -> torch.Tensor:
    return torch.tensor(array).permute(0, 3, 1, 2).requires_grad_()


def nhwc(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.permute(0, 2, 3, 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_gradients(name: str) -> None:
    torch.manual_seed(0)
    theirs = perturb(AutoencoderKL(**CONFIGS[name]), seed=1)
    config = VaeConfig.from_dict(CONFIGS[name])
    network = vae(config)
    params = params_from_torch(theirs, network.shapes)
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    (h, w), c, f = SIZES[name], config.latent_channels, config.downscale
    images, latents = normal(2, h, w, 3), normal(2, h // f, w // f, c)
    cotangents = (normal(2, h // f, w // f, c), normal(2, h // f, w // f, c)), normal(2, h, w, 3)

    @quick_jit
    def ours(params: Any, images: Any, latents: Any) -> Any:
        def run(params: Any, images: Any, latents: Any) -> Any:
            return network(params, images, method="encode"), network(params, latents, method="decode")

        values, back = jax.vjp(run, params, images, latents)
        return values, back(cotangents)

    ((mean, logvar), decoded), (params_grad, images_grad, latents_grad) = ours(params, images, latents)

    their_images, their_latents = nchw(images), nchw(latents)
    posterior = theirs.encode(their_images).latent_dist
    their_mean, their_logvar = nhwc(posterior.mean), nhwc(posterior.logvar)
    their_decoded = nhwc(theirs.decode(their_latents).sample)
    terms = zip((their_mean, their_logvar, their_decoded), (*cotangents[0], cotangents[1]), strict=True)
    their_images.retain_grad()
    their_latents.retain_grad()
    sum((value * torch.tensor(cotangent)).sum() for value, cotangent in terms).backward()

    assert relative_error(mean, their_mean) < 1e-5
    assert relative_error(logvar, their_logvar) < 1e-5
    assert relative_error(decoded, their_decoded) < 1e-5
    assert relative_error(images_grad, nhwc(their_images.grad)) < 1e-4
    assert relative_error(latents_grad, nhwc(their_latents.grad)) < 1e-4
    wanted = params_from_torch(theirs, network.shapes, grads=True)
    total = np.sqrt(sum(float((np.asarray(g) ** 2).sum()) for g in wanted.values()))
    for path, gradient in wanted.items():
        # A leaf whose gradient is nearly nothing (a bias before a norm) is held against the whole.
        scale = max(float(np.linalg.norm(gradient)), 1e-3 * total)
        assert float(np.linalg.norm(params_grad[path] - gradient)) < 1e-4 * scale, path


def test_log_variance_is_clipped() -> None:
    theirs = perturb(AutoencoderKL(**SMALL), seed=1)
    network = vae(VaeConfig.from_dict(SMALL))
    params = params_from_torch(theirs, network.shapes)
    params["quant_conv.kernel"] = params["quant_conv.kernel"] * 1e4
    images = np.random.default_rng(0).standard_normal((1, 8, 8, 3)).astype(np.float32)
    _, logvar = quick_jit(lambda params: network(params, images, method="encode"))(params)
    assert float(logvar.min()) == -30.0
    assert float(logvar.max()) == 20.0
