"""The protocol of a text-to-image model: what sampling, evaluation and the encoding of data see of it.

A model holds its parameters by component, but none of its functions reads them: they are arguments, so that compiled
programs hold no weights, and weights with LoRAs written in, or trained ones, can take their place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import jax
import numpy as np
from jax.sharding import Mesh

from hypersd_jax.bases.base import Base, Features
from hypersd_jax.conditioning import Conditioning, PromptEncoder
from hypersd_jax.models.attention_guidance import AttentionGuidance
from hypersd_jax.models.functional import Network
from hypersd_jax.presets import Preset
from hypersd_jax.weights.diffusers.controlnet import LoadedControlNet

Params = Mapping[str, Mapping[str, jax.Array]]
"""Parameters by component, such as ``unet``."""


class ControlInputs(NamedTuple):
    """ControlNets that steer a call of the denoiser, an entry for each.

    Attributes:
        networks: static.
        params: their parameters.
        images: (B, H, W, 3) in 0..1.
        scales: how strongly they steer.
        prompted_only: whether they leave the unconditional half of the batch alone.
    """

    networks: tuple[Network, ...]
    params: Sequence[Any]
    images: Sequence[jax.Array]
    scales: Sequence[jax.Array]
    prompted_only: bool


class TextToImage(Base, Protocol):
    """A family of text-to-image models: a denoiser of an autoencoder's latents, under text conditioning."""

    @property
    def params(self) -> Params:
        """Parameters of all components."""

    @property
    def denoiser(self) -> str:
        """Name of the component that `predict` runs."""

    @property
    def autoencoder(self) -> str:
        """Name of the component that `posterior` and `decode` run."""

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Names of the components that `encode_prompts` runs."""

    @property
    def shapes(self) -> Mapping[str, Mapping[str, jax.ShapeDtypeStruct]]:
        """Parameter shapes of the components that a LoRA may adapt."""

    @property
    def dtype(self) -> Any:
        """Data type of the computation."""

    @property
    def mesh(self) -> Mesh | None:
        """Devices that parameters and batches are split over; None is one device."""

    @property
    def source(self) -> Path:
        """Folder or file that the model was read from."""

    @property
    def prompts(self) -> PromptEncoder:
        """Tokenizers and text encoders."""

    @property
    def downscale(self) -> int:
        """Pixels a side of one latent."""

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""

    @property
    def denoiser_channels(self) -> int:
        """Channels that the denoiser reads: the latents', and those of `is_inpainting`."""

    @property
    def native_size(self) -> int | tuple[int, int]:
        """Side, or height and width, of the latents where no size is asked for; 0 where the model does not say."""

    @property
    def image_side(self) -> int:
        """Side in pixels of a run's images."""

    @property
    def reads_size(self) -> bool:
        """Whether the conditioning holds the image's size."""

    @property
    def zero_unconditional(self) -> bool:
        """Whether the unconditional is zeros, not the encoded empty prompt."""

    @property
    def embeds_guidance(self) -> bool:
        """Whether the guidance scale is an input of the denoiser."""

    @property
    def is_inpainting(self) -> bool:
        """Whether the denoiser also reads a mask and the latents of the masked image."""

    @property
    def defaults(self) -> Preset:
        """Sampling settings where nothing else states any."""

    @property
    def default_strength(self) -> float:
        """Share of the steps that image to image walks by default."""

    def encode_prompts(self, params: Params, ids: Any, adapters: Any = None) -> Conditioning:
        """Encode token ids, a tuple of (B, S) by text encoder, to conditioning without sizes."""

    def predict(
        self,
        weights: Any,
        x: jax.Array,
        t: jax.Array,
        cond: Any,
        *,
        adapter: Any = None,
        taps: Sequence[str] = (),
        guidance: jax.Array | None = None,
        controls: ControlInputs | None = None,
        inpaint_inputs: jax.Array | None = None,
        nag: AttentionGuidance | None = None,
    ) -> tuple[jax.Array, Features]:
        """Predict, as `Base.predict`.

        Args:
            weights: of the denoiser.
            x: latents (B, h, w, C).
            t: timesteps (B,).
            cond: conditioning of the B samples.
            adapter: on the denoiser.
            taps: blocks whose features are returned.
            guidance: the guidance scale, where the denoiser embeds it.
            controls: ControlNets.
            inpaint_inputs: (B, h, w, 1 + C), mask and latents of the masked image, which an inpainting model reads.
            nag: negative text, away from which each attention to the text is steered; ControlNets are not.
        """

    def with_size(self, cond: Conditioning, height: int, width: int) -> Conditioning:
        """Add the images' size in pixels to conditioning, where the model reads it."""

    def with_sizes(self, cond: Conditioning, sizes: jax.Array | None) -> Conditioning:
        """Add each training image's sizes and crop (..., 6), None where the model reads none (`reads_size`)."""

    def posterior(self, params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Encode images (B, H, W, 3) in -1..1 to a posterior's mean and log variance, (B, h, w, C) float32 each."""

    def decode(self, params: Any, z: jax.Array) -> jax.Array:
        """Decode what the encoder gives, (B, h, w, C), to images (B, H, W, 3), about -1..1."""

    def scale(self, z: jax.Array) -> jax.Array:
        """Convert what the encoder gives to latents as the denoiser reads them."""

    def unscale(self, latents: jax.Array) -> jax.Array:
        """Convert latents to what the decoder reads, the inverse of `scale`."""

    def prepared(self, params: Params, most_bytes: int) -> Params:
        """Return parameters with what makes the compiled programs faster for them, in at most so many bytes.

        They are for programs alone, and for weights that do not change; what is saved or merged stays `params`.
        """

    def without_weights(self) -> Self:
        """Return a copy without parameters, for compiled programs, which must not keep weights alive."""

    def with_weights(self, trained: Mapping[str, Mapping[str, Any]]) -> Self:
        """Return a copy with trained weights, by component, in place of its own."""

    def predicting(self, prediction_type: str) -> Self:
        """Return a copy whose denoiser predicts noise, v or x_0, as its scheduler configuration then says."""

    def scaled(self, factor: float) -> Self:
        """Return a copy with another scaling factor of the latents."""

    @property
    def decoder(self) -> tuple[str, ...]:
        """How the paths begin of the autoencoder's parameters that `decode` alone reads."""

    def with_autoencoder(self, source: str | Path) -> Self:
        """Return a copy with another autoencoder; UserError where it cannot be read or does not fit."""

    def load_controlnet(self, source: str | Path) -> LoadedControlNet:
        """Load a ControlNet; UserError where it cannot be read or does not fit."""

    def require_controlnet(self, net: LoadedControlNet) -> None:
        """Refuse (UserError) a loaded ControlNet that does not fit."""

    @property
    def kohya_family(self) -> str:
        """Name of the family in kohya's headers, by which A1111 sorts LoRAs."""

    def save(self, folder: Path, params: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Write the model to a new folder in diffusers' layout, with these parameters on the host."""

    def identity(self) -> str:
        """Return a digest of everything that decides what the model samples."""
