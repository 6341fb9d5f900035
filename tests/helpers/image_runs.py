"""Runs of diffusers' pipelines that are given images, with the noise, the start and the encoder's mean as ours."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from hypersd_jax.pipeline import Pipeline

PROMPTS = ["red apple, fluent flat style", "a cat face, noto style, blue background"]
# Not square, and multiples of 8 as some of diffusers' pipelines want whatever the autoencoder.
HEIGHT, WIDTH = 16, 8
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "tcd": "TCDScheduler",
    "lcm": "LCMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
}


def random_image(seed: int, size: tuple[int, int] = (HEIGHT, WIDTH), mode: str = "RGB") -> Image.Image:
    """A random image of a height and a width, with coarse and fine structure and all levels of grey."""
    rng = np.random.default_rng(seed)
    channels = len(Image.new(mode, (1, 1)).getbands())
    coarse = rng.random((4, 3, channels)).repeat(-(-size[0] // 4), axis=0).repeat(-(-size[1] // 3), axis=1)
    values = 0.7 * coarse[: size[0], : size[1]] + 0.3 * rng.random((*size, channels))
    return Image.fromarray(np.round(255 * values).astype(np.uint8).squeeze(), mode)


@contextlib.contextmanager
def fed(pipe: Any, start: np.ndarray, noise: np.ndarray) -> Iterator[None]:
    """Give diffusers' pipeline its start (B, h, w, C) and each step's noise (steps, B, h, w, C); encode by the mean.

    The posterior's mean is what ours starts from; theirs would sample the posterior.
    """
    rows = iter(torch.from_numpy(noise).permute(0, 1, 4, 2, 3))
    first = torch.from_numpy(start).permute(0, 3, 1, 2)
    noises = {
        sys.modules[type(pipe).__module__]: lambda *_args, **_kwargs: first.clone(),
        sys.modules[type(pipe.scheduler).__module__]: lambda *_args, **_kwargs: next(rows).clone(),
    }
    kept = {module: module.randn_tensor for module in noises if hasattr(module, "randn_tensor")}
    sample = DiagonalGaussianDistribution.sample
    for module in kept:
        module.randn_tensor = noises[module]
    DiagonalGaussianDistribution.sample = lambda self, generator=None: self.mean
    try:
        yield
    finally:
        DiagonalGaussianDistribution.sample = sample
        for module, own in kept.items():
            module.randn_tensor = own


def sample_both(
    theirs: Any,
    ours: Pipeline,
    *,
    sampler: str,
    steps: int,
    guidance: float,
    eta: float = 0.0,
    strength: float | None = None,
    prompts: list[str] = PROMPTS,
    negative: str | None = None,
    num_images: int = 1,
    output: str = "latent",
    their: dict[str, Any],
    our: dict[str, Any],
) -> tuple[np.ndarray, np.ndarray]:
    """What our and their pipeline generate, in this order, from the same start and noise, as latents or as images.

    Args:
        theirs: a pipeline of diffusers; its scheduler is replaced by the sampler's.
        ours: our pipeline of the same weights.
        sampler, steps, guidance, eta, strength, prompts, negative, num_images, output: of both.
        their: arguments of their pipeline alone: the images.
        our: the same for ours.
    """
    spacing = {"ddim": "trailing"}.get(sampler, "leading")
    cls = getattr(diffusers, SCHEDULERS[sampler])
    theirs.scheduler = cls.from_config(theirs.scheduler.config, timestep_spacing=spacing)
    left = steps if strength is None else int(steps * strength)
    size = our.get("height", HEIGHT) // 2, our.get("width", WIDTH) // 2
    rng = np.random.default_rng(steps)
    shape = (len(prompts) * num_images, *size, 4)
    start = rng.standard_normal(shape).astype(np.float32)
    noise = rng.standard_normal((left, *shape)).astype(np.float32)
    share = {} if strength is None else {"strength": strength}
    with fed(theirs, start, noise):
        expected = theirs(
            prompt=prompts,
            negative_prompt=None if negative is None else [negative] * len(prompts),
            num_images_per_prompt=num_images,
            num_inference_steps=steps,
            guidance_scale=guidance,
            eta=eta,
            output_type=output,
            **share,
            **their,
        ).images
    found = ours(
        prompts,
        negative,
        num_images=num_images,
        steps=steps,
        sampler=sampler,
        eta=eta,
        guidance=guidance,
        latents=start,
        noise=noise,
        output=output,
        stepwise=True,  # one compilation for all step counts
        **share,
        **our,
    )
    return found, expected.permute(0, 2, 3, 1).numpy() if output == "latent" else expected
