"""The compiled programs: text encoding, the solver's scan over the UNet, the autoencoder, and the noise of a seed.

Each program is compiled once for each shape. Prompt, seed, guidance above 1, eta, timesteps, LoRA and LoRA scale enter
them as arrays, so changing one compiles nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hypersd_jax.compilation import compiler_options
from hypersd_jax.conditioning import Conditioning, PromptEncoder
from hypersd_jax.diffusion import Known, State, advance, guided
from hypersd_jax.models.controlnet import control_residuals
from hypersd_jax.models.functional import Network
from hypersd_jax.models.layers import timestep_embedding
from hypersd_jax.models.tiling import decode_tiled, encode_tiled
from hypersd_jax.weights.components import Components

# Of tiles, in latent pixels: what diffusers has for autoencoders of 512 pixels.
TILE = 64
OVERLAP = 16


class Guides(NamedTuple):
    """Images that steer a scan, each (B, ...).

    Attributes:
        known: what inpainting keeps, for a model that was not trained to inpaint.
        inpaint_inputs: (B, h, w, 1 + C), mask and latents of the masked image, which an inpainting model reads.
        controls: one image (B, H, W, 3) in 0..1 for each ControlNet.
    """

    known: Known | None = None
    inpaint_inputs: jax.Array | None = None
    controls: tuple[jax.Array, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Programs:
    """The compiled programs of one model; weights are arguments of each.

    Attributes:
        encode_prompts: (params, token ids, adapters), all by text encoder -> `Conditioning` without time ids.
        predict: one evaluation of the UNet, see `predict`.
        scan: the steps of a solver's table, see `scan`.
        decode: (params, latents (B, h, w, C), tiled) -> images (B, H, W, 3) in 0..1.
        encode_images: (params, images (B, H, W, 3) in 0..1, tiled) -> latents (B, h, w, C).
        noise: see `noise`.
    """

    encode_prompts: Callable[..., Conditioning]
    predict: Callable[..., jax.Array]
    scan: Callable[..., State]
    decode: Callable[..., jax.Array]
    encode_images: Callable[..., jax.Array]
    noise: Callable[..., jax.Array]


def compile_programs(components: Components, prompts: PromptEncoder, dtype: Any, mesh: Mesh | None) -> Programs:
    """Wrap the programs of a model in `jax.jit`; each is compiled when it is first called."""
    bare = dataclasses.replace(components, params={})  # weights that `load_vae` has replaced must not be kept alive
    compiled = _compiler(dtype, mesh)
    return Programs(
        encode_prompts=compiled(functools.partial(encode_prompts, prompts, dtype)),
        predict=compiled(functools.partial(predict, bare)),
        scan=compiled(
            functools.partial(scan, bare), static_argnames=("controlnets", "prompted_only", "prediction_type")
        ),
        noise=jax.jit(noise, static_argnames="shape"),
        **_autoencoder_programs(bare, compiled),
    )


def with_autoencoder(programs: Programs, components: Components, dtype: Any, mesh: Mesh | None) -> Programs:
    """Replace the programs of the autoencoder by those of another."""
    bare = dataclasses.replace(components, params={})
    return dataclasses.replace(programs, **_autoencoder_programs(bare, _compiler(dtype, mesh)))


def _compiler(dtype: Any, mesh: Mesh | None) -> Callable[..., Any]:
    platform = None if mesh is None else str(mesh.devices.flat[0].platform)
    return functools.partial(jax.jit, compiler_options=compiler_options(dtype, platform))


def _autoencoder_programs(components: Components, compiled: Callable[..., Any]) -> dict[str, Any]:
    return {
        function.__name__: compiled(functools.partial(function, components), static_argnames="tiled")
        for function in (decode, encode_images)
    }


def encode_prompts(encoder: PromptEncoder, dtype: Any, params: Any, ids: Any, adapters: Any) -> Conditioning:
    """Compute text embeddings of token ids, in `dtype`."""
    return encoder.encode(params, ids, adapters=adapters, dtype=dtype)


def scan(
    components: Components,
    params: Any,
    adapter: Any,
    cond: Conditioning,
    uncond: Conditioning | None,
    scale: jax.Array,
    table: dict[str, jax.Array],
    state: State,
    noise: jax.Array,
    guides: Guides,
    control_params: Sequence[Any],
    control_scales: Sequence[jax.Array],
    *,
    controlnets: tuple[Network, ...],
    prompted_only: bool,
    prediction_type: str,
) -> State:
    """Run the steps of a solver's table. With an unconditional the two UNet calls of a step are one on a double batch.

    Args:
        components: networks and configurations of the model.
        params, adapter: the UNet's.
        cond, uncond, scale: see `predict`.
        table: of `solver_table`, all of it or some steps.
        state: before the first of these steps.
        noise: (steps, B, h, w, C), what each step adds.
        guides: images that steer.
        control_params, control_scales, controlnets: one entry for each ControlNet.
        prompted_only: whether ControlNets leave the unconditional batch alone.
        prediction_type: what the UNet outputs.
    """
    both, inputs = _unet_inputs(components, cond, uncond, scale, state.x.shape[0])

    def steered(x: jax.Array, t: jax.Array) -> jax.Array:
        if uncond is not None:
            x, t = jnp.concatenate([x, x]), jnp.concatenate([t, t])
        extra: dict[str, Any] = {}
        if controlnets:
            down, mid = control_residuals(
                controlnets,
                control_params,
                guides.controls,
                control_scales,
                x,
                t,
                both.context,
                prompted_only=prompted_only,
                **both.unet_kwargs(),
            )
            extra = {"down_residuals": down, "mid_residual": mid}
        if guides.inpaint_inputs is not None:
            repeats = x.shape[0] // guides.inpaint_inputs.shape[0]
            x = jnp.concatenate([x, jnp.concatenate([guides.inpaint_inputs] * repeats)], axis=-1)
        output = components.unet(params, x, t, both.context, adapter=adapter, **inputs, **extra)
        return output if uncond is None else _guided_halves(output, scale)

    return advance(steered, table, state, noise, prediction_type=prediction_type, known=guides.known)


def predict(
    components: Components,
    params: Any,
    adapter: Any,
    cond: Conditioning,
    uncond: Conditioning | None,
    scale: jax.Array,
    x: jax.Array,
    t: jax.Array,
) -> jax.Array:
    """Evaluate the UNet once, as a step of `scan` does.

    Args:
        components: networks and configurations of the model.
        params, adapter: the UNet's.
        cond: of the prompts.
        uncond: of the negative prompts; None evaluates the prompts alone.
        scale: guidance scale, a scalar; of classifier-free guidance, or the input of a UNet that embeds guidance.
        x: (B, h, w, C) as the UNet reads it.
        t: timesteps (B,).
    """
    both, inputs = _unet_inputs(components, cond, uncond, scale, x.shape[0])
    if uncond is not None:
        x, t = jnp.concatenate([x, x]), jnp.concatenate([t, t])
    output: jax.Array = components.unet(params, x, t, both.context, adapter=adapter, **inputs)
    return output if uncond is None else _guided_halves(output, scale)


def _unet_inputs(
    components: Components, cond: Conditioning, uncond: Conditioning | None, scale: jax.Array, batch: int
) -> tuple[Conditioning, dict[str, Any]]:
    """The conditioning of one UNet call, unconditional first, and the UNet's keyword arguments."""
    both = cond if uncond is None else jax.tree.map(lambda u, c: jnp.concatenate([u, c]), uncond, cond)
    inputs = both.unet_kwargs()
    if dim := components.unet_config.time_cond_proj_dim:
        w = jnp.full((batch,), 1000 * (scale - 1))  # LCM's guidance embedding, arXiv 2310.04378
        inputs["timestep_cond"] = timestep_embedding(w, dim, flip_sin_to_cos=False, freq_shift=1.0)
    return both, inputs


def _guided_halves(output: jax.Array, scale: jax.Array) -> jax.Array:
    unguided, prompted = jnp.split(output.astype(jnp.float32), 2)
    return guided(unguided, prompted, scale)


def decode(components: Components, params: Any, latents: jax.Array, *, tiled: bool) -> jax.Array:
    """Decode the sampler's latents to images (B, H, W, 3) in 0..1; NaN where a value is not finite."""

    def whole(z: jax.Array) -> jax.Array:
        images: jax.Array = components.vae(params, z, method="decode")
        return images

    z = components.unscale(latents)
    if tiled:
        images = decode_tiled(whole, z, tile=TILE, overlap=OVERLAP, factor=components.vae_config.downscale)
    else:
        images = whole(z)
    images = images.astype(jnp.float32)
    # Clipped, infinity would pass for white.
    images = jnp.where(jnp.isfinite(images), images, jnp.nan)
    return jnp.clip(images / 2 + 0.5, 0.0, 1.0)


def encode_images(components: Components, params: Any, images: jax.Array, *, tiled: bool) -> jax.Array:
    """Encode images (B, H, W, 3) in 0..1 to latents (B, h, w, C) as the UNet reads them: the encoder's mean."""

    def whole(x: jax.Array) -> jax.Array:
        mean: jax.Array = components.vae(params, x, method="encode")[0]
        return mean

    x = 2 * images - 1
    if tiled:
        mean = encode_tiled(whole, x, tile=TILE, overlap=OVERLAP, factor=components.vae_config.downscale)
    else:
        mean = whole(x)
    return components.scale(mean.astype(jnp.float32))


def noise(
    seed: jax.Array, prompts: jax.Array, images: jax.Array, step: jax.Array, *, shape: tuple[int, int, int]
) -> jax.Array:
    """Standard normal noise (B, *shape), each image from its own key: step 0 is the start, i what step i adds.

    Args:
        seed: uint32 scalar.
        prompts: prompt index of each image, (B,).
        images: index of each among its prompt's images, (B,).
        step: scalar.
        shape: of one image's latents.
    """

    def one(prompt: jax.Array, image: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), prompt), image)
        # A step's noise has a key of its own, so that more steps extend the list and change none of it.
        return jax.random.normal(jax.random.fold_in(key, step), shape, jnp.float32)

    return jax.vmap(one)(prompts, images)
