"""A Stable Diffusion model in diffusers' folder layout, as networks and parameters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hypersd_jax.errors import UserError
from hypersd_jax.models.clip_text import ClipTextConfig, clip_text
from hypersd_jax.models.functional import Network
from hypersd_jax.models.unet import UNetConfig, unet
from hypersd_jax.models.vae import VaeConfig, vae
from hypersd_jax.weights.folder import load_params, read_json
from hypersd_jax.weights.keys import Kind
from hypersd_jax.weights.placement import batch_sharding, leaf_sharding

EMBEDDED = "embedded"
SUPPORTED = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")

Params = dict[str, jax.Array]


def assets() -> Path:
    """The folder of what ships inside the package: teacher, pictures, feature network, LoRAs."""
    return Path(str(resources.files("hypersd_jax"))) / "assets"


def resolve_source(source: str | Path) -> Path:
    """The model folder that ``source`` names; ``embedded`` is the one inside the package."""
    if str(source) == EMBEDDED:
        return assets() / "teacher"
    path = Path(source)
    if not path.exists():
        raise UserError(f"{source}: no such model folder")
    if not (path / "model_index.json").is_file():
        raise UserError(f"{path}: not a diffusers model folder (model_index.json is missing)")
    return path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Components:
    """The parts of one model. Parameters are held by component name: ``unet``, ``vae``, ``text_encoder``, ..."""

    folder: Path
    unet_config: UNetConfig
    vae_config: VaeConfig
    unet: Network
    vae: Network
    text_encoders: Mapping[str, Network]
    text_lengths: Mapping[str, int]
    scheduler_config: Mapping[str, Any]
    params: Mapping[str, Params]
    is_xl: bool
    zero_unconditional: bool

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


def load_components(
    source: str | Path,
    *,
    dtype: Any,
    remat: bool = False,
    mesh: Mesh | None = None,
) -> Components:
    """Read every part of a diffusers folder.

    Args:
        source: a folder with ``model_index.json``, or ``embedded``.
        dtype: parameter and compute dtype of all parts, except that an autoencoder that says ``force_upcast`` stays in
            float32 where this is float16.
        remat: recompute the UNet's activations block by block in the backward pass.
        mesh: devices with axes ``data`` and ``fsdp``: large parameters are split over ``fsdp``, and the UNet's
            activations stay on the batch axes. None is the default device.

    Raises:
        UserError: one line naming the file or key that is missing, unsupported or damaged.
    """
    folder = resolve_source(source)
    index = read_json(folder / "model_index.json")
    kind = str(index.get("_class_name"))
    if kind not in SUPPORTED:
        raise UserError(f"{folder / 'model_index.json'}: _class_name={kind!r} is not supported, only {SUPPORTED}")
    is_xl = kind == "StableDiffusionXLPipeline"
    names = ("text_encoder", "text_encoder_2") if is_xl else ("text_encoder",)

    activations = None if mesh is None else batch_sharding(mesh)
    place = None if mesh is None else functools.partial(_place, mesh)
    unet_config = _parse(UNetConfig.from_dict, folder / "unet")
    vae_config = _parse(VaeConfig.from_dict, folder / "vae")
    text_configs = {name: _parse(ClipTextConfig.from_dict, folder / name) for name in names}
    _require_fit(folder, unet_config, vae_config, text_configs)
    dtypes = dict.fromkeys(("unet", "vae", *names), dtype)
    if vae_config.force_upcast and jnp.dtype(dtype) == jnp.float16:
        dtypes["vae"] = jnp.float32
    networks = {
        "unet": unet(unet_config, dtype=dtype, remat=remat, batch_sharding=activations),
        "vae": vae(vae_config, dtype=dtypes["vae"]),
    }
    for name, config in text_configs.items():
        networks[name] = clip_text(config, dtype=dtype, projection=name == "text_encoder_2")

    params = {}
    for name, network in networks.items():
        component: Kind = "unet" if name == "unet" else "vae" if name == "vae" else "clip"
        params[name] = load_params(
            folder / name, network.shapes, dtype=dtypes[name], component_kind=component, sharding=place
        )
    return Components(
        folder=folder,
        unet_config=unet_config,
        vae_config=vae_config,
        unet=networks["unet"],
        vae=networks["vae"],
        text_encoders={name: networks[name] for name in names},
        text_lengths={name: config.max_position_embeddings for name, config in text_configs.items()},
        scheduler_config=read_json(folder / "scheduler" / "scheduler_config.json"),
        params=params,
        is_xl=is_xl,
        zero_unconditional=bool(index.get("force_zeros_for_empty_prompt", is_xl)),
    )


def _require_fit(
    folder: Path, unet_config: UNetConfig, vae_config: VaeConfig, text_configs: Mapping[str, ClipTextConfig]
) -> None:
    """Refuse parts that are each readable and do not belong together."""
    file = folder / "unet" / "config.json"
    channels = vae_config.latent_channels
    for key, value in (("in_channels", unet_config.in_channels), ("out_channels", unet_config.out_channels)):
        if value != channels:
            hint = " (inpainting models are not supported)" if key == "in_channels" and value > channels else ""
            raise UserError(f"{file}: {key}={value}, but the vae has latent_channels={channels}{hint}")
    width = sum(config.hidden_size for config in text_configs.values())
    for value in unet_config.cross_attention_dims:
        if value != width:
            names = " and ".join(text_configs)
            raise UserError(f"{file}: cross_attention_dim={value}, but hidden_size of {names} makes {width}")
    pooled = text_configs["text_encoder_2"].projection_dim if "text_encoder_2" in text_configs else 0
    if unet_config.text_time and unet_config.pooled_dim != pooled:
        key = "projection_class_embeddings_input_dim"
        raise UserError(
            f"{file}: {key} leaves {unet_config.pooled_dim} for pooled text, but projection_dim of text_encoder_2 is "
            f"{pooled or 'missing'}"
        )


def _place(mesh: Mesh, _name: str, leaf: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
    return leaf_sharding(mesh, leaf.shape, leaf.dtype)


def default_dtype() -> Any:
    """bfloat16 where the hardware has it, float32 on a CPU."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def _parse(from_dict: Callable[[dict[str, Any]], Any], folder: Path) -> Any:
    """A component's own config.json as its dataclass; what it refuses is reported with the file's name."""
    path = folder / "config.json"
    try:
        return from_dict(read_json(path))
    except UserError as error:
        text = str(error)
        raise UserError(text if str(path) in text else f"{path}: {text}") from None
