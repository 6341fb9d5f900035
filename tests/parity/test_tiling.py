"""Tiled decoding and encoding against diffusers' AutoencoderKL with tiling enabled, in float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from diffusers import AutoencoderKL

from hypersd_jax.models import VaeConfig, decode_tiled, encode_tiled, vae
from tests.helpers.quick import quick_jit
from tests.helpers.torch_weights import params_from_torch, perturb, relative_error

# Tiles of 8 latent pixels, and diffusers' overlap factor of 0.25.
CONFIG: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
}
SIZE: dict[str, Any] = {"tile": 8, "overlap": 2, "factor": 2}


def nchw(array: np.ndarray) -> torch.Tensor:
    return torch.tensor(array).permute(0, 3, 1, 2)


def nhwc(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.permute(0, 2, 3, 1)


@pytest.fixture(scope="module")
def both() -> Any:
    torch.manual_seed(0)
    theirs = perturb(AutoencoderKL(**CONFIG), seed=1).requires_grad_(False)
    theirs.enable_tiling()
    network = vae(VaeConfig.from_dict(CONFIG))
    params = params_from_torch(theirs, network.shapes)
    decode = quick_jit(lambda z: decode_tiled(lambda z: network(params, z, method="decode"), z, **SIZE))
    encode = quick_jit(lambda x: encode_tiled(lambda x: network(params, x, method="encode"), x, **SIZE))
    return theirs, decode, encode


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("sides", [(10, 17), (12, 5), (6, 11)])
def test_values(both: Any, sides: tuple[int, int]) -> None:
    theirs, decode, encode = both
    latents, images = normal(2, *sides, 4), normal(2, 2 * sides[0], 2 * sides[1], 3)
    assert relative_error(decode(latents), nhwc(theirs.decode(nchw(latents)).sample)) < 1e-5
    posterior = theirs.encode(nchw(images)).latent_dist
    mean, logvar = encode(images)
    assert relative_error(mean, nhwc(posterior.mean)) < 1e-5
    assert relative_error(logvar, nhwc(posterior.logvar)) < 1e-5


def test_a_last_strip_is_not_run(both: Any) -> None:
    """diffusers fades the last pixels into a tile that sees nothing else; the tile before has them all."""
    theirs, decode, _ = both
    latents = normal(1, 12, 14, 4)
    ours, wanted = np.asarray(decode(latents)), nhwc(theirs.decode(nchw(latents)).sample).numpy()
    strip = 2 * SIZE["overlap"]
    assert relative_error(ours[:, :, :-strip], wanted[:, :, :-strip]) < 1e-5
    assert relative_error(ours, wanted) > 1e-3
    theirs.disable_tiling()
    whole = nhwc(theirs.decode(nchw(latents)).sample).numpy()
    theirs.enable_tiling()
    edge = whole[:, :, -strip:]
    assert relative_error(ours[:, :, -strip:], edge) < relative_error(wanted[:, :, -strip:], edge)
