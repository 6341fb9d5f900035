"""From a model as it is stored, in whatever layout, to networks and placed parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hypersd_jax.config import nearest
from hypersd_jax.errors import UserError
from hypersd_jax.models.autoencoder import AnyVaeConfig, read_vae_config, vae_network
from hypersd_jax.models.clip_text import ClipTextConfig, clip_text
from hypersd_jax.models.functional import Network
from hypersd_jax.models.unet import UNetConfig, unet
from hypersd_jax.weights.placement import batch_sharding, leaf_sharding, put
from hypersd_jax.weights.tokenizers import TokenizerFiles

Params = dict[str, jax.Array]
Shapes = Mapping[str, jax.ShapeDtypeStruct]
HostParams = Iterator[tuple[str, np.ndarray]]
"""Parameter paths and arrays, one at a time."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """The contents of a model's configuration files, in diffusers' terms.

    Attributes:
        origin: the folder or the single file.
        configs: ``{component: content of its config.json}`` for unet, vae, text_encoder, and SDXL's text_encoder_2.
        scheduler_config: content of `scheduler_config.json`.
        model_index: content of `model_index.json`.
        tokenizers: ``{"tokenizer" | "tokenizer_2": files}``, one for each text encoder.
    """

    origin: Path
    configs: Mapping[str, Mapping[str, Any]]
    scheduler_config: Mapping[str, Any]
    model_index: Mapping[str, Any]
    tokenizers: Mapping[str, TokenizerFiles]

    @property
    def is_xl(self) -> bool:
        """Whether this is SDXL: two text encoders, pooled text and time ids."""
        return is_xl(self.model_index)

    def location(self, component: str) -> str:
        """The file of a component's configuration, for messages."""
        return str(self.origin / component / "config.json") if self.origin.is_dir() else f"{self.origin} ({component})"


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """A model that has been described and not yet read.

    Attributes:
        description: all but the weights.
        read: ``({component: parameter shapes}, {component: dtype, None for the stored ones}) -> {component: parameters
            on the host}``; what does not fit is refused before the first tensor of a file is read.
    """

    description: Description
    read: Callable[[Mapping[str, Shapes], Mapping[str, Any]], Mapping[str, HostParams]]


@dataclass(frozen=True, kw_only=True)
class Components:
    """The parts of one model. Parameters are held by component name: ``unet``, ``vae``, ``text_encoder``, ..."""

    description: Description
    unet_config: UNetConfig
    vae_config: AnyVaeConfig
    unet: Network
    vae: Network
    text_encoders: Mapping[str, Network]
    text_lengths: Mapping[str, int]
    params: Mapping[str, Params]
    is_xl: bool
    zero_unconditional: bool

    @property
    def folder(self) -> Path:
        """The folder, or the single file, that the model was read from."""
        return self.description.origin

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """The model's own scheduler configuration."""
        return self.description.scheduler_config

    @property
    def is_inpainting(self) -> bool:
        """Whether the UNet also reads a mask and the latents of the masked image: 4 + 1 + 4 channels."""
        return self.unet_config.in_channels == inpainting_channels(self.vae_config)

    @property
    def shapes(self) -> dict[str, Mapping[str, jax.ShapeDtypeStruct]]:
        """Parameter shapes of the components that a LoRA may adapt."""
        return {"unet": self.unet.shapes, **{name: net.shapes for name, net in self.text_encoders.items()}}

    def scale(self, z: jax.Array) -> jax.Array:
        """Autoencoder latents as the UNet sees them."""
        return (z - self.vae_config.shift_factor) * self.vae_config.scaling_factor

    def unscale(self, latents: jax.Array) -> jax.Array:
        """The inverse of `scale`: what the decoder reads."""
        return latents / self.vae_config.scaling_factor + self.vae_config.shift_factor


@dataclass(frozen=True, kw_only=True)
class Structure:
    """The configurations of one model, parsed and found to belong together."""

    unet: UNetConfig
    vae: AnyVaeConfig
    text: Mapping[str, ClipTextConfig]

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the networks."""
        return ("unet", "vae", *self.text)


def is_xl(model_index: Mapping[str, Any]) -> bool:
    """Tell whether a `model_index.json` is of SDXL."""
    return str(model_index.get("_class_name")).startswith("StableDiffusionXL")


def inpainting_channels(config: AnyVaeConfig) -> int:
    """The input channels of an inpainting UNet: noisy latents, one mask, latents of the masked image."""
    return 2 * config.latent_channels + 1


def parse(description: Description) -> Structure:
    """The configurations as dataclasses; UserError names the part and key that is unsupported or does not fit."""

    def parsed(from_dict: Callable[[dict[str, Any]], Any], component: str) -> Any:
        location = description.location(component)
        try:
            return from_dict(dict(description.configs[component]))
        except UserError as error:
            raise UserError(f"{location}: {error}") from None

    structure = Structure(
        unet=parsed(UNetConfig.from_dict, "unet"),
        vae=parsed(read_vae_config, "vae"),
        text={name: parsed(ClipTextConfig.from_dict, name) for name in text_names(description.is_xl)},
    )
    _require_fit(description.location("unet"), structure)
    return structure


def text_names(xl: bool) -> tuple[str, ...]:
    """The text encoders of a family."""
    return ("text_encoder", "text_encoder_2") if xl else ("text_encoder",)


def networks(
    structure: Structure, dtypes: Mapping[str, Any], *, remat: bool = False, mesh: Mesh | None = None
) -> dict[str, Network]:
    """Every network by component, in its type; nothing is materialised. See `load` for the arguments."""
    activations = None if mesh is None else batch_sharding(mesh)
    return {
        "unet": unet(structure.unet, dtype=dtypes["unet"], remat=remat, batch_sharding=activations),
        "vae": vae_network(structure.vae, dtype=dtypes["vae"], batch_sharding=activations),
        **{
            name: clip_text(config, dtype=dtypes[name], projection=name == "text_encoder_2", batch_sharding=activations)
            for name, config in structure.text.items()
        },
    }


def load(
    stored: StoredModel,
    *,
    dtype: Any,
    remat: bool = False,
    mesh: Mesh | None = None,
    param_dtype: Any = None,
    fresh: Collection[str] = (),
    seed: int = 0,
) -> Components:
    """Read all weights and place them.

    Args:
        stored: the model.
        dtype: compute and parameter dtype of all parts, except that an autoencoder that says ``force_upcast`` stays in
            float32 where this is float16.
        remat: recompute the UNet's activations block by block in the backward pass.
        mesh: devices with axes ``data`` and ``fsdp``: large parameters are split over ``fsdp``, and the UNet's
            activations stay on the batch axes. None is the default device.
        param_dtype: of the parameters, where it is not that of the computation: float32 for weights that are trained.
        fresh: components whose weights are random instead, from ``seed``.
        seed: see ``fresh``.

    Raises:
        UserError: one line naming the file or key that is missing, unsupported or damaged, or a part that is not there.
    """
    description = stored.description
    structure = parse(description)
    for name in fresh:
        if name not in structure.components:
            raise UserError(f"model.fresh: {name!r} is not a part of the model{nearest(name, structure.components)}")
    dtypes = dict.fromkeys(structure.components, dtype)
    if structure.vae.force_upcast and jnp.dtype(dtype) == jnp.float16:
        dtypes["vae"] = jnp.float32
    parts = networks(structure, dtypes, remat=remat, mesh=mesh)
    place = functools.partial(_place, mesh)
    params = {}
    stored_as = dtypes if param_dtype is None else dict.fromkeys(dtypes, param_dtype)
    read = stored.read({name: part.shapes for name, part in parts.items() if name not in fresh}, stored_as)
    for name, found in {**read, **{name: _random_params(parts[name], seed, stored_as[name]) for name in fresh}}.items():
        shapes = parts[name].shapes
        placed = {path: put(array, place(shapes[path])) for path, array in found}
        params[name] = {path: placed[path] for path in shapes}
    return Components(
        description=description,
        unet_config=structure.unet,
        vae_config=structure.vae,
        unet=parts["unet"],
        vae=parts["vae"],
        text_encoders={name: parts[name] for name in structure.text},
        text_lengths={name: config.max_position_embeddings for name, config in structure.text.items()},
        params=params,
        is_xl=description.is_xl,
        zero_unconditional=bool(description.model_index.get("force_zeros_for_empty_prompt", description.is_xl)),
    )


def _random_params(part: Network, seed: int, dtype: Any) -> HostParams:
    """Weights to train from. PyTorch's narrower kernels cost the autoencoder 3 dB after 150 updates."""
    return ((path, np.asarray(value.astype(dtype))) for path, value in part.init(seed, gain=3.0**0.5).items())


def _place(mesh: Mesh | None, leaf: jax.ShapeDtypeStruct) -> jax.sharding.Sharding | None:
    return None if mesh is None else leaf_sharding(mesh, leaf.shape, leaf.dtype)


def _require_fit(location: str, structure: Structure) -> None:
    """Refuse parts that are each readable and do not belong together."""
    config, channels = structure.unet, structure.vae.latent_channels
    allowed = (channels, inpainting_channels(structure.vae))
    if config.in_channels not in allowed:
        instructed = config.in_channels == 2 * channels
        hint = " (models that edit by instruction, InstructPix2Pix, are not supported)" if instructed else ""
        raise UserError(
            f"{location}: in_channels={config.in_channels}, but the vae has latent_channels={channels}{hint}"
        )
    if config.out_channels != channels:
        raise UserError(f"{location}: out_channels={config.out_channels}, but the vae has latent_channels={channels}")
    width = sum(text.hidden_size for text in structure.text.values())
    for value in config.cross_attention_dims:
        if value != width:
            names = " and ".join(structure.text)
            raise UserError(f"{location}: cross_attention_dim={value}, but hidden_size of {names} makes {width}")
    second = structure.text.get("text_encoder_2")
    pooled = second.projection_dim if second is not None else 0
    if config.text_time and config.pooled_dim != pooled:
        key = "projection_class_embeddings_input_dim"
        raise UserError(
            f"{location}: {key} leaves {config.pooled_dim} for pooled text, but projection_dim of text_encoder_2 is "
            f"{pooled or 'missing'}"
        )
