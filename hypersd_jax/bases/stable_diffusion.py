"""Stable Diffusion 1.x, 2.x and SDXL: a UNet on a KL autoencoder's latents, under CLIP's text embeddings."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hypersd_jax import presets
from hypersd_jax.bases.prompting import make_prompt_encoder
from hypersd_jax.bases.stable_diffusion_unet import StableDiffusionUNet
from hypersd_jax.conditioning import Conditioning, PromptEncoder, size_ids
from hypersd_jax.models.autoencoder import read_vae_config
from hypersd_jax.models.prepared import prepare
from hypersd_jax.presets import Preset
from hypersd_jax.weights.components import Components
from hypersd_jax.weights.diffusers.controlnet import LoadedControlNet, load_controlnet
from hypersd_jax.weights.diffusers.model import save_model
from hypersd_jax.weights.diffusers.vae import load_vae
from hypersd_jax.weights.fingerprints import fingerprint


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StableDiffusion(StableDiffusionUNet):
    """A model of the family, with what sampling, evaluation and the encoding of data see of it (`TextToImage`)."""

    autoencoder = "vae"
    decoder = ("decoder.", "post_quant_conv.")

    @property
    def params(self) -> Mapping[str, Mapping[str, jax.Array]]:
        """Parameters by component."""
        return self.components.params

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Names of the text encoders: one, SDXL's two."""
        return tuple(self.components.text_encoders)

    @property
    def shapes(self) -> Mapping[str, Mapping[str, jax.ShapeDtypeStruct]]:
        """Parameter shapes of UNet and text encoders."""
        return self.components.shapes

    @property
    def source(self) -> Path:
        """Folder or file that the model was read from."""
        return self.components.folder

    @functools.cached_property
    def prompts(self) -> PromptEncoder:
        """Tokenizers and text encoders."""
        return make_prompt_encoder(self.components)

    @property
    def denoiser_channels(self) -> int:
        """Channels that the UNet reads."""
        return self.components.unet_config.in_channels

    @property
    def reads_size(self) -> bool:
        """Whether the model is SDXL, whose conditioning holds sizes."""
        return self.components.is_xl

    @property
    def zero_unconditional(self) -> bool:
        """Whether the unconditional is zeros: by default SDXL's."""
        return self.components.zero_unconditional

    @property
    def embeds_guidance(self) -> bool:
        """Whether the guidance scale is an input of the UNet (LCM)."""
        return bool(self.components.unet_config.time_cond_proj_dim)

    @property
    def is_inpainting(self) -> bool:
        """Whether the UNet also reads a mask and the latents of the masked image."""
        return self.components.is_inpainting

    @property
    def defaults(self) -> Preset:
        """Sampling settings where nothing else states any."""
        return presets.BASE_SDXL if self.components.is_xl else presets.BASE_SD

    @property
    def default_strength(self) -> float:
        """Share of the steps that image to image walks by default, as in diffusers."""
        return 0.3 if self.components.is_xl else 0.8

    def encode_prompts(self, params: Mapping[str, Any], ids: Any, adapters: Any = None) -> Conditioning:
        """Encode token ids by the text encoders, under adapters by component."""
        return self.prompts.encode(params, ids, adapters=adapters or {}, dtype=self.dtype)

    def with_size(self, cond: Conditioning, height: int, width: int) -> Conditioning:
        """Add SDXL's time ids, of uncropped images of this size."""
        if not self.reads_size:
            return cond
        return self.with_sizes(cond, jnp.asarray(size_ids(height, width, len(cond.context))))

    def with_sizes(self, cond: Conditioning, sizes: jax.Array | None) -> Conditioning:
        """Add SDXL's time ids (..., 6) of each image; None: none."""
        return cond._replace(time_ids=sizes)

    def posterior(self, params: Mapping[str, Any], images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Encode images (B, H, W, 3) in -1..1 to mean and log variance, (B, h, w, C) float32 each."""
        mean, logvar = self.components.vae(params, images, method="encode")
        return mean.astype(jnp.float32), logvar.astype(jnp.float32)

    def decode(self, params: Mapping[str, Any], z: jax.Array) -> jax.Array:
        """Decode what the encoder gives to images (B, H, W, 3), about -1..1."""
        images: jax.Array = self.components.vae(params, z, method="decode")
        return images

    def scale(self, z: jax.Array) -> jax.Array:
        """Convert what the encoder gives to latents as the UNet reads them."""
        return self.components.scale(z)

    def unscale(self, latents: jax.Array) -> jax.Array:
        """Convert latents to what the decoder reads."""
        return self.components.unscale(latents)

    def prepared(self, params: Mapping[str, Mapping[str, Any]], most_bytes: int) -> dict[str, Mapping[str, Any]]:
        """Add what makes the programs faster for frozen parameters: on a CPU, in float32, Winograd's kernels."""
        result = dict(params)
        platform = jax.default_backend() if self.mesh is None else self.mesh.devices.flat[0].platform
        if platform != "cpu" or (self.mesh is not None and self.mesh.size > 1):
            return result
        side = self.latent_side
        halvings = len(self.components.unet_config.channels) - 1
        for name, coarsest in ((self.denoiser, side >> halvings), (self.autoencoder, side)):
            if name in params:
                added = prepare(params[name], coarsest, most_bytes)
                most_bytes -= sum(leaf.size * leaf.dtype.itemsize for leaf in added.values())
                result[name] = {**params[name], **added}
        return result

    def without_weights(self) -> StableDiffusion:
        """Return a copy without parameters."""
        return self.around(dataclasses.replace(self.components, params={}))

    def around(self, components: Components) -> StableDiffusion:
        """Return a copy around other components of the same structure, with the same tokenizers."""
        copy = dataclasses.replace(self, components=components)
        copy.__dict__["prompts"] = self.prompts
        return copy

    def with_weights(self, trained: Mapping[str, Mapping[str, Any]]) -> StableDiffusion:
        """Return a copy with trained weights, by component, in place of its own."""
        params = {name: {**part, **trained.get(name, {})} for name, part in self.params.items()}
        return self.around(dataclasses.replace(self.components, params=params))

    def predicting(self, prediction_type: str) -> StableDiffusion:
        """Return a copy whose scheduler configuration says another prediction type."""
        description = self.components.description
        config = {**description.scheduler_config, "prediction_type": prediction_type}
        changed = dataclasses.replace(description, scheduler_config=config)
        return self.around(dataclasses.replace(self.components, description=changed))

    def scaled(self, factor: float) -> StableDiffusion:
        """Return a copy with another scaling factor of the latents."""
        description, name = self.components.description, self.autoencoder
        configs = {**description.configs, name: {**description.configs[name], "scaling_factor": factor}}
        return self.around(
            dataclasses.replace(
                self.components,
                description=dataclasses.replace(description, configs=configs),
                vae_config=dataclasses.replace(self.components.vae_config, scaling_factor=factor),
            )
        )

    def with_autoencoder(self, source: str | Path) -> StableDiffusion:
        """Return a copy with another autoencoder, such as a tiny one; a bare file must have the model's structure."""
        own = read_vae_config(dict(self.components.description.configs[self.autoencoder]))
        found = load_vae(source, vae_config=own, dtype=self.dtype, mesh=self.mesh)
        params = {**self.params, self.autoencoder: found.params}
        parts: dict[str, Any] = {"vae": found.network, "vae_config": found.config, "params": params}
        return self.around(dataclasses.replace(self.components, **parts))

    def load_controlnet(self, source: str | Path) -> LoadedControlNet:
        """Load a ControlNet that goes with the UNet and the autoencoder."""
        config = self.components.unet_config
        return load_controlnet(source, unet_config=config, downscale=self.downscale, dtype=self.dtype, mesh=self.mesh)

    def require_controlnet(self, net: LoadedControlNet) -> None:
        """Refuse (UserError) a loaded ControlNet that does not go with the UNet and the autoencoder."""
        net.config.require_fit(self.components.unet_config, self.downscale)

    @property
    def kohya_family(self) -> str:
        """Name of the family in kohya's headers; OpenCLIP-H's width means SD 2.x."""
        if self.components.is_xl:
            return "sdxl_base_v1-0"
        return "sd_v2" if self.components.unet_config.cross_attention_dims[0] == 1024 else "sd_v1"

    def save(self, folder: Path, params: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Write the model to a new folder in diffusers' layout."""
        save_model(self.components, folder, params=params)

    def identity(self) -> str:
        """Hash the weights of all parts, the dtype that they compute in, and all that the model's files state."""
        parts = {name: fingerprint(params) for name, params in sorted(self.params.items())}
        description = self.components.description
        tokenizers = {
            name: {file: hashlib.sha256(content).hexdigest() for file, content in tokenizer.files.items()}
            for name, tokenizer in description.tokenizers.items()
        }
        stated = [description.configs, description.scheduler_config, description.model_index, tokenizers]
        text = json.dumps([parts, jnp.dtype(self.dtype).name, stated], sort_keys=True, default=dict)
        return hashlib.sha256(text.encode()).hexdigest()
