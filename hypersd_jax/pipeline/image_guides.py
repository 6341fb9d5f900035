"""Images that steer a call, by prompt, made ready for the scan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from hypersd_jax.diffusion import Known
from hypersd_jax.errors import UserError
from hypersd_jax.models.controlnet import residual_scales
from hypersd_jax.models.functional import Network
from hypersd_jax.pipeline import arguments, image_inputs
from hypersd_jax.pipeline.programs import Guides
from hypersd_jax.weights.diffusers.controlnet import LoadedControlNet


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageGuides:
    """Latents of an image, and of a mask of it, one entry for each prompt; None where not given.

    Attributes:
        clean: latents (N, h, w, C) of the image.
        mask: (N, h, w, 1), 1 where to paint, for a model that was not trained to inpaint.
        inpaint_inputs: (N, h, w, 1 + C), what an inpainting model reads.
    """

    clean: Any = None
    mask: Any = None
    inpaint_inputs: Any = None

    @staticmethod
    def of(
        image: Any,
        mask: Any,
        prompts: int,
        size: tuple[int, int],
        *,
        factor: int,
        inpainting: bool,
        encode: Callable[[np.ndarray], np.ndarray],
    ) -> ImageGuides:
        """Read and encode the images of a call.

        Args:
            image: see `image_inputs.read_images`; None without one.
            mask: see `image_inputs.read_masks`; None repaints all.
            prompts: how many there are.
            size: height and width in pixels.
            factor: pixels per latent pixel.
            inpainting: whether the model reads a mask itself.
            encode: images (N, H, W, 3) in 0..1 to latents (N, h, w, C).

        Raises:
            UserError: an image cannot be read, or is missing.
        """
        if inpainting and mask is None:
            raise UserError("mask: this is an inpainting model; image and mask must be given")
        if image is None:
            return ImageGuides()
        batch = image_inputs.read_images("image", image, size)
        clean = image_inputs.for_prompts("image", batch, prompts, encode)
        if mask is None:
            return ImageGuides(clean=clean)
        painted = image_inputs.read_masks("mask", mask, size)
        small = image_inputs.for_prompts("mask", painted, prompts)
        small = image_inputs.at_latent_size(small, (size[0] // factor, size[1] // factor))
        if not inpainting:
            return ImageGuides(clean=clean, mask=small)
        # Grey where it is to be painted, as the models were trained: 0 of -1..1.
        masked = np.where(painted > 0, np.float32(0.5), batch)
        masked = image_inputs.for_prompts("image", masked, prompts, encode)
        return ImageGuides(clean=clean, inpaint_inputs=np.concatenate([small, masked], axis=-1))

    def take(self, prompts: np.ndarray) -> ImageGuides:
        """The entries of these prompts, by index (B,)."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return ImageGuides(**{name: None if value is None else value[prompts] for name, value in fields.items()})

    def for_scan(self, noise: Any, controls: tuple[Any, ...]) -> Guides:
        """Arguments of the scan; `noise` is the start's, with which the kept part is noised to each step's level."""
        known = None if self.mask is None else Known(mask=self.mask, clean=self.clean, noise=noise)
        return Guides(known=known, inpaint_inputs=self.inpaint_inputs, controls=controls)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Controls:
    """The ControlNets of a call: networks, parameters, scales of their residuals, and an image for each prompt.

    ``prompted_only`` is guess mode: the unconditional half of the batch is left alone.
    """

    networks: tuple[Network, ...]
    params: tuple[Any, ...]
    scales: tuple[jax.Array | np.ndarray, ...]
    prompted_only: bool
    batches: tuple[np.ndarray, ...]

    def take(self, prompts: np.ndarray) -> tuple[np.ndarray, ...]:
        """The images of these prompts, by index (B,): (B, H, W, 3) for each network."""
        return tuple(batch[prompts] for batch in self.batches)

    @staticmethod
    def of(
        nets: Sequence[LoadedControlNet],
        images: Any,
        strengths: Sequence[float],
        guess: bool,
        prompts: int,
        size: tuple[int, int],
    ) -> Controls:
        """Read the images of the loaded ControlNets.

        Args:
            nets: the loaded ones.
            images: an image for a single one, a list of one for each of several.
            strengths, guess: as `control_strengths` resolved them.
            prompts: how many there are.
            size: height and width in pixels.

        Raises:
            UserError: an image is missing, one too many, or unreadable.
        """
        listed = [images] if len(nets) == 1 else arguments.listed(images) if nets else []
        batches = [image_inputs.read_images("control_image", each, size) for each in listed]
        return Controls(
            networks=tuple(net.network for net in nets),
            params=tuple(net.params for net in nets),
            scales=tuple(
                residual_scales(net.config, strength, guess=guess)
                for net, strength in zip(nets, strengths, strict=True)
            ),
            prompted_only=guess,
            batches=tuple(image_inputs.for_prompts("control_image", batch, prompts) for batch in batches),
        )


def control_strengths(
    nets: Sequence[LoadedControlNet], images: Any, scale: float | Sequence[float], guess: bool
) -> tuple[tuple[float, ...], bool]:
    """Resolve how strongly each loaded ControlNet steers, and whether it does so in guess mode.

    Args:
        nets: the loaded ones.
        images: what the call gives as ``control_image``, of which the number is checked.
        scale: one for all, or one for each.
        guess: what the call asks for; a first ControlNet that pools its residuals asks for it too.

    Raises:
        UserError: images or scales are missing or too many, or given without a ControlNet.
    """
    strengths = arguments.listed(scale)
    if not nets:
        given = {"control_image": images is not None, "control_scale": strengths != [1.0], "guess_mode": guess}
        for name in given:
            if given[name]:
                raise UserError(f"{name}: no ControlNet is loaded")
        return (), False
    if images is None:
        raise UserError(f"control_image is missing: {len(nets)} ControlNet(s) are loaded")
    count = 1 if len(nets) == 1 else len(arguments.listed(images))
    if count != len(nets):
        raise UserError(f"control_image: {count} given for {len(nets)} ControlNets")
    strengths = strengths * len(nets) if len(strengths) == 1 else strengths
    if len(strengths) != len(nets):
        raise UserError(f"control_scale: {len(strengths)} given for {len(nets)} ControlNets")
    # The first one's kind decides for all, as in diffusers.
    guess = guess or nets[0].config.global_pool
    return tuple(float(arguments.checked("control_scale", each, ())) for each in strengths), guess
