"""A pipeline's model as one call uses it: programs with the weights, LoRAs and ControlNets of that moment."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from hypersd_jax.adapters import Adapter
from hypersd_jax.bases import TextToImage
from hypersd_jax.conditioning import Conditioning
from hypersd_jax.pipeline.programs import Programs
from hypersd_jax.weights.diffusers.controlnet import LoadedControlNet
from hypersd_jax.weights.placement import batch_sharding, host, put

Tree = TypeVar("Tree")
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
        base_params: `params` of the base alone, with nothing written in.
    """

    base: TextToImage
    programs: Programs
    params: Mapping[str, Mapping[str, jax.Array]]
    adapters: Mapping[str, Adapter]
    controlnets: tuple[LoadedControlNet, ...]
    base_params: Mapping[str, Mapping[str, jax.Array]]

    @property
    def has_loras(self) -> bool:
        """Whether a LoRA is loaded, fused or not."""
        return bool(self.adapters) or self.params is not self.base_params

    def bare(self) -> ActiveModel:
        """Return the base without its LoRAs."""
        return dataclasses.replace(self, params=self.base_params, adapters={})

    @property
    def devices(self) -> int:
        """Number of devices that a batch is split over."""
        return 1 if self.base.mesh is None else self.base.mesh.size

    def tokenize(self, prompts: Sequence[str], windows: int | None = None) -> TokenIds:
        """Token ids of prompts; what does not fit is left out silently."""
        return self.base.prompts.tokenize(prompts, windows=windows, on_cut=lambda _: None)

    def tokenize_negatives(
        self, texts: Sequence[str | None], windows: int | None = None, *, all_ids: bool = False
    ) -> NegativeIds:
        """Token ids of negative prompts; None stands for the model's own unconditional.

        With `all_ids` there are ids where all of these are zeros, too: of "".
        """
        zeros = np.asarray([self.base.zero_unconditional and text is None for text in texts])
        ids = None if zeros.all() and not all_ids else self.tokenize([text or "" for text in texts], windows)
        return NegativeIds(ids=ids, zeros=zeros)

    def condition(self, ids: TokenIds, size: tuple[int, int]) -> Conditioning:
        """Encode the token ids of B prompts for images of ``size``, height and width in pixels."""
        names = self.base.text_encoders
        params = {name: self.params[name] for name in names}
        adapters = {name: adapter for name, adapter in self.adapters.items() if name in names}
        cond = self.base.with_size(self.programs.encode_prompts(params, self.on_mesh(ids), adapters), *size)
        return _first(len(ids[0]), self.on_mesh(cond))

    def unconditional(self, negatives: NegativeIds, cond: Conditioning, size: tuple[int, int]) -> Conditioning:
        """Encode negative prompts, zeros where these are the model's unconditional; `cond` has the prompts' shapes."""
        ids, zeros = negatives
        uncond = cond if ids is None else self.condition(ids, size)
        if not zeros.any():
            return uncond
        return uncond.zeroed(zeros)

    def encode_images(self, images: np.ndarray, *, tiled: bool) -> np.ndarray:
        """Encode images (N, H, W, 3) in 0..1 to latents (N, h, w, C), on each device one at a time."""
        encode = functools.partial(self.programs.encode_images, self.params[self.base.autoencoder], tiled=tiled)
        parts = [images[i : i + self.devices] for i in range(0, len(images), self.devices)]
        return np.concatenate([host(encode(self.on_mesh(part)))[: len(part)] for part in parts])

    def decode(self, latents: jax.Array, *, tiled: bool) -> jax.Array:
        """Decode latents (B, h, w, C) to images (B, H, W, 3) in 0..1."""
        params = self.params[self.base.autoencoder]
        return _first(len(latents), self.programs.decode(params, self.on_mesh(latents), tiled=tiled))

    def compile_decoder(self, shape: tuple[int, ...], *, tiled: bool) -> None:
        """Compile `decode` for latents of this shape (B, h, w, C), unless that was done before."""
        mesh = self.base.mesh
        sharding = None if mesh is None else batch_sharding(mesh)
        programs, latents = self.programs, jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding)
        if (shape, tiled) not in programs.decoders:
            programs.decode.lower(self.params[self.base.autoencoder], latents, tiled=tiled).compile()
            programs.decoders.add((shape, tiled))

    def predict(
        self, x: jax.Array, t: jax.Array, cond: Conditioning, uncond: Conditioning | None, scale: Any
    ) -> jax.Array:
        """Evaluate the denoiser on (B, h, w, C) at timesteps (B,); see `programs.predict`."""
        count = len(x)
        cond, uncond, x, t = self.on_mesh((cond, uncond, x, t))
        return _first(count, self.programs.predict(*self.denoiser, cond, uncond, scale, x, t))

    @property
    def denoiser(self) -> tuple[Mapping[str, jax.Array], Adapter]:
        """Weights of the denoiser, and the adapter on it."""
        return self.params[self.base.denoiser], self.adapters.get(self.base.denoiser, {})

    def on_mesh(self, tree: Tree, axis: int = 0) -> Tree:
        """Split a tree of arrays along their batch axis over the mesh; without a mesh it stays as it is.

        A batch that the devices do not divide is filled up with its last entry, for they would all compute all of it
        otherwise.
        """
        mesh = self.base.mesh
        if mesh is None:
            return tree
        sharding = batch_sharding(mesh, axis)

        def split(leaf: Any) -> jax.Array:
            if missing := -leaf.shape[axis] % mesh.size:
                pad = np.pad if isinstance(leaf, np.ndarray) else jnp.pad
                leaf = pad(leaf, [(0, missing if i == axis else 0) for i in range(leaf.ndim)], mode="edge")
            return put(leaf, sharding)

        return jax.tree.map(split, tree)


def _first(count: int, batch: Tree) -> Tree:
    """The first entries of a batch, without what `on_mesh` filled it up with."""
    return jax.tree.map(lambda leaf: leaf if len(leaf) == count else leaf[:count], batch)
