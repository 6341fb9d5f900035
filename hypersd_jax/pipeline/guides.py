"""Pictures that steer a call, by prompt, made ready for the scan."""

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
from hypersd_jax.pipeline import arguments, pictures
from hypersd_jax.pipeline.programs import Guides
from hypersd_jax.weights.diffusers.controlnet import LoadedControlNet


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureGuides:
    """What a picture, and a mask of it, say; one row for each prompt, None where not given.

    Attributes:
        clean: latents (N, h, w, C) of the picture.
        mask: (N, h, w, 1), 1 where to paint, for a model that was not trained to inpaint.
        beside: (N, h, w, 1 + C), what an inpainting model reads.
    """

    clean: Any = None
    mask: Any = None
    beside: Any = None

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
    ) -> PictureGuides:
        """Read what a call gives.

        Args:
            image: see `pictures.pictures`; None without one.
            mask: see `pictures.masks`; None repaints all.
            prompts: how many there are.
            size: height and width in pixels.
            factor: pixels per latent pixel.
            inpainting: whether the model reads a mask itself.
            encode: pictures (N, H, W, 3) in 0..1 to latents (N, h, w, C).

        Raises:
            UserError: a picture cannot be read, or is missing.
        """
        if inpainting and mask is None:
            raise UserError("mask: this is an inpainting model; image and mask must be given")
        if image is None:
            return PictureGuides()
        batch = pictures.pictures("image", image, size)
        clean = pictures.for_prompts("image", batch, prompts, encode)
        if mask is None:
            return PictureGuides(clean=clean)
        painted = pictures.masks("mask", mask, size)
        small = pictures.for_prompts("mask", painted, prompts)
        small = pictures.shrunk(small, (size[0] // factor, size[1] // factor))
        if not inpainting:
            return PictureGuides(clean=clean, mask=small)
        # Grey where it is to be painted, as the models were trained: 0 of -1..1.
        masked = pictures.for_prompts("image", np.where(painted > 0, np.float32(0.5), batch), prompts, encode)
        return PictureGuides(clean=clean, beside=np.concatenate([small, masked], axis=-1))

    def rows(self, prompts: np.ndarray) -> PictureGuides:
        """Those of these prompts."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return PictureGuides(**{name: None if value is None else value[prompts] for name, value in fields.items()})

    def steering(self, noise: Any, controls: tuple[Any, ...]) -> Guides:
        """As the scan takes them; `noise` is the start's, with which the kept part is noised to each step's level."""
        known = None if self.mask is None else Known(mask=self.mask, clean=self.clean, noise=noise)
        return Guides(known=known, beside=self.beside, controls=controls)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Controls:
    """The ControlNets of a call: networks, parameters, strengths, and a picture for each prompt."""

    networks: tuple[Network, ...] = ()
    params: tuple[Any, ...] = ()
    scales: tuple[jax.Array | np.ndarray, ...] = ()
    prompted_only: bool = False
    batches: tuple[np.ndarray, ...] = ()

    def images(self, prompts: np.ndarray) -> tuple[np.ndarray, ...]:
        """The pictures of these prompts, (B, H, W, 3) for each network."""
        return tuple(batch[prompts] for batch in self.batches)

    @staticmethod
    def of(
        nets: Sequence[LoadedControlNet],
        images: Any,
        scale: float | Sequence[float],
        guess: bool,
        prompts: int,
        size: tuple[int, int],
    ) -> Controls:
        """Check and gather what a call says of its ControlNets; size in pixels.

        Raises:
            UserError: a picture or a scale is missing, too many, or unreadable.
        """
        if not nets:
            given = {
                "control_image": images is not None,
                "control_scale": arguments.listed(scale) != [1.0],
                "guess_mode": guess,
            }
            for name in given:
                if given[name]:
                    raise UserError(f"{name}: no ControlNet is loaded")
            return Controls()
        if images is None:
            raise UserError(f"control_image is missing: {len(nets)} ControlNet(s) are loaded")
        listed = [images] if len(nets) == 1 else arguments.listed(images)
        if len(listed) != len(nets):
            raise UserError(f"control_image: {len(listed)} given for {len(nets)} ControlNets")
        strengths = arguments.listed(scale)
        strengths = strengths * len(nets) if len(strengths) == 1 else strengths
        if len(strengths) != len(nets):
            raise UserError(f"control_scale: {len(strengths)} given for {len(nets)} ControlNets")
        numbers = [float(arguments.checked("control_scale", each, ())) for each in strengths]
        batches = [pictures.pictures("control_image", each, size) for each in listed]
        # The first one's kind decides for all, as in diffusers.
        guess = guess or nets[0].config.global_pool
        return Controls(
            networks=tuple(net.network for net in nets),
            params=tuple(net.params for net in nets),
            scales=tuple(
                residual_scales(net.config, number, guess=guess) for net, number in zip(nets, numbers, strict=True)
            ),
            prompted_only=guess,
            batches=tuple(pictures.for_prompts("control_image", batch, prompts) for batch in batches),
        )
