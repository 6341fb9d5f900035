"""A pipeline's model as one call uses it: programs with the weights, LoRAs and ControlNets of that moment."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from hypersd_jax.adapters import Adapter
from hypersd_jax.bases import TextToImage
from hypersd_jax.conditioning import Conditioning
from hypersd_jax.pipeline.programs import Programs
from hypersd_jax.weights.diffusers.controlnet import LoadedControlNet
from hypersd_jax.weights.placement import batch_sharding, put

TokenIds = tuple[np.ndarray, ...]
"""Token ids for each text encoder: (B, S), or (B, n, S) of prompts read in n windows."""


class NegativeIds(NamedTuple):
    """Negative prompts of a batch, tokenized.

    Attributes:
        ids: token ids of the negative prompts, "" where there is none; None where `zeros` is true for all.
        zeros: (B,) bool, for which images the unconditional is zeros, SDXL's where no negative prompt is given.
    """

    ids: TokenIds | None
    zeros: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActiveModel:
    """Networks with the weights and LoRAs of one call, and the programs that run them.

    Attributes:
        base: the model.
        programs: what is compiled.
        params: ``{component: weights}``, with fused LoRAs and full differences written in.
        adapters: ``{component: adapter}``, the loaded LoRAs joined; none while they are fused.
        controlnets: the loaded ones.
    """

    base: TextToImage
    programs: Programs
    params: Mapping[str, Mapping[str, jax.Array]]
    adapters: Mapping[str, Adapter]
    controlnets: tuple[LoadedControlNet, ...]

    def tokenize(self, prompts: Sequence[str], windows: int | None = None) -> TokenIds:
        """Token ids of prompts; what does not fit is left out silently."""
        return self.base.prompts.tokenize(prompts, windows=windows, on_cut=lambda _: None)

    def tokenize_negatives(self, texts: Sequence[str | None], windows: int | None = None) -> NegativeIds:
        """Token ids of negative prompts; None stands for the model's own unconditional."""
        zeros = np.asarray([self.base.zero_unconditional and text is None for text in texts])
        ids = None if zeros.all() else self.tokenize([text or "" for text in texts], windows)
        return NegativeIds(ids=ids, zeros=zeros)

    def condition(self, ids: TokenIds, size: tuple[int, int]) -> Conditioning:
        """Encode prompts for images of ``size``, height and width in pixels."""
        names = self.base.text_encoders
        params = {name: self.params[name] for name in names}
        adapters = {name: adapter for name, adapter in self.adapters.items() if name in names}
        return self.base.with_size(self.programs.encode_prompts(params, ids, adapters), *size)

    def unconditional(self, negatives: NegativeIds, cond: Conditioning, size: tuple[int, int]) -> Conditioning:
        """Encode negative prompts, zeros where these are the model's unconditional; `cond` has the prompts' shapes."""
        ids, zeros = negatives
        uncond = cond if ids is None else self.condition(ids, size)
        if not zeros.any():
            return uncond
        return uncond.zeroed(zeros)

    def encode_images(self, images: np.ndarray, *, tiled: bool) -> np.ndarray:
        """Encode images (N, H, W, 3) in 0..1 to latents (N, h, w, C), one at a time."""
        single = (images[i : i + 1] for i in range(len(images)))
        encode = self.programs.encode_images
        return np.concatenate(
            [np.asarray(encode(self.params[self.base.autoencoder], image, tiled=tiled)) for image in single]
        )

    def decode(self, latents: jax.Array, *, tiled: bool) -> jax.Array:
        """Decode latents (B, h, w, C) to images (B, H, W, 3) in 0..1."""
        return self.programs.decode(self.params[self.base.autoencoder], latents, tiled=tiled)

    def compile_decoder(self, shape: tuple[int, ...], *, tiled: bool) -> None:
        """Compile `decode` for latents of this shape (B, h, w, C), unless that was done before."""
        programs, latents = self.programs, jax.ShapeDtypeStruct(shape, np.float32)
        if (shape, tiled) not in programs.decoders:
            programs.decode.lower(self.params[self.base.autoencoder], latents, tiled=tiled).compile()
            programs.decoders.add((shape, tiled))

    def predict(
        self, x: jax.Array, t: jax.Array, cond: Conditioning, uncond: Conditioning | None, scale: Any
    ) -> jax.Array:
        """Evaluate the denoiser on (B, h, w, C) at timesteps (B,); see `programs.predict`."""
        return self.programs.predict(*self.denoiser, cond, uncond, scale, x, t)

    @property
    def denoiser(self) -> tuple[Mapping[str, jax.Array], Adapter]:
        """Weights of the denoiser, and the adapter on it."""
        return self.params[self.base.denoiser], self.adapters.get(self.base.denoiser, {})

    def on_mesh(self, value: Any, axis: int = 0) -> Any:
        """Split an array along its batch axis over the mesh, where it divides evenly; else leave it as it is."""
        mesh = self.base.mesh
        if mesh is None or value.shape[axis] % mesh.size:
            return value
        return put(value, batch_sharding(mesh, axis))
