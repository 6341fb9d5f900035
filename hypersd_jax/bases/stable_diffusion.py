"""Stable Diffusion 1.x, 2.x and SDXL: a UNet on a KL autoencoder's latents, under CLIP's text embeddings."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hypersd_jax import adapters, presets
from hypersd_jax.adapters import Adapter
from hypersd_jax.bases.base import Features
from hypersd_jax.bases.prompting import make_prompt_encoder
from hypersd_jax.bases.text_to_image import ControlInputs
from hypersd_jax.compilation import compiler_options
from hypersd_jax.conditioning import Conditioning, PromptEncoder, size_ids
from hypersd_jax.diffusion import Schedule
from hypersd_jax.errors import UserError
from hypersd_jax.models.autoencoder import read_vae_config
from hypersd_jax.models.controlnet import control_residuals
from hypersd_jax.models.functional import Network
from hypersd_jax.models.heads import all_taps, encoder_taps, patch_heads, pooled_heads, tap_channels
from hypersd_jax.models.layers import timestep_embedding
from hypersd_jax.presets import Preset
from hypersd_jax.weights.components import Components
from hypersd_jax.weights.diffusers.component import fingerprint
from hypersd_jax.weights.diffusers.controlnet import LoadedControlNet, load_controlnet
from hypersd_jax.weights.diffusers.model import save_model
from hypersd_jax.weights.diffusers.vae import load_vae
from hypersd_jax.weights.placement import batch_sharding

MIDDLE = "mid_block"
# Features are halved until their side is this, as DMD2's heads do before their last convolution.
POOLED_SIDE = 4


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StableDiffusion:
    """A model of the family, with its parameters.

    Attributes:
        components: networks, configurations and parameters.
        dtype: of the computation.
        mesh: devices that parameters and batches are split over; None is one device.
        resolution: side of a training run's images in pixels; None is the model's own.
        remat: recompute activations in the backward pass.
    """

    components: Components
    dtype: Any
    mesh: Mesh | None = None
    resolution: int | None = None
    remat: bool = False

    denoiser = "unet"
    autoencoder = "vae"
    decoder = ("decoder.", "post_quant_conv.")

    def __post_init__(self) -> None:
        _ = self.schedule  # one that is not known is refused before anything is done with the model

    # MARK: what a training step sees

    @functools.cached_property
    def schedule(self) -> Schedule:
        """Noise schedule of the model."""
        return Schedule.from_config(dict(self.scheduler_config))

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """Scheduler configuration of the model."""
        return self.components.scheduler_config

    @functools.cached_property
    def latent_shape(self) -> tuple[int, ...]:
        """Latent shape (h, w, C) at the run's resolution; UserError if it does not suit the autoencoder."""
        native = self.native_size[0] if isinstance(self.native_size, tuple) else self.native_size
        if not (native or self.resolution):
            raise UserError("data.resolution must be given: the model's unet/config.json has no sample_size")
        pixels = self.resolution or native * self.downscale
        if pixels % self.downscale:
            raise UserError(f"data.resolution={pixels} must be a multiple of the autoencoder's {self.downscale}")
        return pixels // self.downscale, pixels // self.downscale, self.latent_channels

    @property
    def image_side(self) -> int:
        """Side in pixels of the run's images."""
        return self.latent_shape[0] * self.downscale

    @property
    def weights(self) -> dict[str, jax.Array]:
        """Parameters of the UNet."""
        return dict(self.params[self.denoiser])

    @property
    def compiler_options(self) -> dict[str, Any]:
        """Options of the backend; a bfloat16 UNet trains up to 1.6 times as fast with them on a CPU."""
        return compiler_options(self.dtype, None if self.mesh is None else str(self.mesh.devices.flat[0].platform))

    def predict(
        self,
        weights: Mapping[str, Any],
        x: jax.Array,
        t: jax.Array,
        cond: Conditioning,
        *,
        adapter: Any = None,
        taps: Sequence[str] = (),
        guidance: jax.Array | None = None,
        controls: ControlInputs | None = None,
        inpaint_inputs: jax.Array | None = None,
    ) -> tuple[jax.Array, Features]:
        """Predict under an adapter, as `TextToImage.predict`."""
        names, inputs = tuple(taps), cond.unet_kwargs()
        extra: dict[str, Any] = {}
        if controls is not None:
            nets = controls.networks, controls.params, controls.images, controls.scales
            skip = controls.prompted_only
            down, mid = control_residuals(*nets, x, t, cond.context, prompted_only=skip, **inputs)
            extra = {"down_residuals": down, "mid_residual": mid}
        if guidance is not None and (dim := self.components.unet_config.time_cond_proj_dim):
            w = jnp.full((x.shape[0],), 1000 * (guidance - 1))  # LCM's guidance embedding, arXiv 2310.04378
            extra["timestep_cond"] = timestep_embedding(w, dim, flip_sin_to_cos=False, freq_shift=1.0)
        if inpaint_inputs is not None:
            x = jnp.concatenate([x, inpaint_inputs], axis=-1)
        found = self.components.unet(weights, x, t, cond.context, adapter=adapter, taps=names, **inputs, **extra)
        return found if names else (found, {})

    def unconditional(self, row: Conditioning, cond: Conditioning) -> Conditioning:
        """Repeat the row's text for every sample, with the sample's own time ids (only text is zeroed or empty)."""

        def repeat(one: jax.Array, like: jax.Array) -> jax.Array:
            return jnp.broadcast_to(one, like.shape)

        pooled = None if row.pooled is None or cond.pooled is None else repeat(row.pooled, cond.pooled)
        return Conditioning(repeat(row.context, cond.context), pooled, cond.time_ids)

    def fresh_adapter(self, key: jax.Array, *, rank: int, alpha: float | None) -> Adapter:
        """Make a LoRA on the 14-module list."""
        return adapters.init(key, self.components.unet.shapes, rank=rank, alpha=alpha)

    def masters(self, adapter: Adapter) -> dict[str, jax.Array]:
        """Return the UNet's parameters in float32 with a LoRA merged into them."""
        own = {path: leaf.astype(jnp.float32) for path, leaf in self.params[self.denoiser].items()}
        return adapters.merge(own, adapter)

    def discriminator(self, features: str) -> tuple[tuple[str, ...], Network]:
        """Make heads on blocks of the UNet: ``encoder``, ``all``, ``mid``, or ``pair`` (two middle blocks joined).

        Raises:
            UserError: the UNet has no middle block, and the features are of it.
        """
        config = self.components.unet_config
        sharding = None if self.mesh is None else batch_sharding(self.mesh)
        how: dict[str, Any] = {"dtype": self.dtype, "remat": self.remat, "batch_sharding": sharding}
        if features in ("encoder", "all"):
            taps = encoder_taps(config) if features == "encoder" else all_taps(config)
            return taps, patch_heads(tap_channels(config, taps), size=1 if features == "encoder" else 3, **how)
        if not config.mid_block_type:
            raise UserError(f"adversarial.features={features}: this model's UNet has no middle block")
        width = tap_channels(config, [MIDDLE])[MIDDLE] * (2 if features == "pair" else 1)
        side = min(self.latent_shape[:2]) >> (len(config.channels) - 1)
        halvings = max(0, (side // POOLED_SIDE).bit_length() - 1)
        return (MIDDLE,), pooled_heads({MIDDLE: width}, downsamples=halvings, **how)

    def is_partial(self, taps: Sequence[str]) -> bool:
        """Tell whether no tap lies beyond the middle block, so that a call may stop there."""
        return not any(tap.startswith("up_blocks") for tap in taps)

    # MARK: what sampling, evaluation and the encoding of data see

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
    def downscale(self) -> int:
        """Pixels a side of one latent."""
        return self.components.vae_config.downscale

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.components.vae_config.latent_channels

    @property
    def denoiser_channels(self) -> int:
        """Channels that the UNet reads."""
        return self.components.unet_config.in_channels

    @property
    def native_size(self) -> int | tuple[int, int]:
        """Side, or height and width, of the latents that the UNet's configuration states."""
        return self.components.unet_config.sample_size

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
        return cond._replace(time_ids=jnp.asarray(size_ids(height, width, len(cond.context))))

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
