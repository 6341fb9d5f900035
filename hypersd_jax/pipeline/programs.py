"""The compiled programs: text encoding, the solver's scan over the denoiser, the autoencoder, and the noise of a seed.

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

from hypersd_jax.bases import ControlInputs, TextToImage
from hypersd_jax.conditioning import Conditioning
from hypersd_jax.diffusion import Known, State, advance, guided
from hypersd_jax.models.attention_guidance import AttentionGuidance
from hypersd_jax.models.functional import Network
from hypersd_jax.models.tiling import decode_tiled, encode_tiled
from hypersd_jax.weights.placement import batch_sharding

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
        predict: one evaluation of the denoiser, see `predict`.
        scan: the steps of a solver's table, see `scan`.
        decode: (params, latents (B, h, w, C), tiled) -> images (B, H, W, 3) in 0..1.
        encode_images: (params, images (B, H, W, 3) in 0..1, tiled) -> latents (B, h, w, C).
        noise: see `noise`.
        decoders: the (latents' shape, tiled) that `decode` was compiled for before it was called.
    """

    encode_prompts: Callable[..., Conditioning]
    predict: Callable[..., jax.Array]
    scan: Callable[..., State]
    decode: jax.stages.Wrapped
    encode_images: Callable[..., jax.Array]
    noise: Callable[..., jax.Array]
    decoders: set[tuple[tuple[int, ...], bool]] = dataclasses.field(default_factory=set)


def compile_programs(base: TextToImage) -> Programs:
    """Wrap the programs of a model in `jax.jit`; each is compiled when it is first called."""
    bare = base.without_weights()  # weights that another autoencoder has replaced must not be kept alive
    compiled = _compiler(bare)
    return Programs(
        encode_prompts=compiled(bare.encode_prompts),
        predict=compiled(functools.partial(predict, bare)),
        scan=compiled(
            functools.partial(scan, bare), static_argnames=("controlnets", "prompted_only", "prediction_type")
        ),
        noise=jax.jit(noise, static_argnames="shape"),
        **_autoencoder_programs(bare, compiled),
    )


def with_autoencoder(programs: Programs, base: TextToImage) -> Programs:
    """Replace the programs of the autoencoder by those of another."""
    bare = base.without_weights()
    return dataclasses.replace(programs, decoders=set(), **_autoencoder_programs(bare, _compiler(bare)))


def _compiler(base: TextToImage) -> Callable[..., Any]:
    """`jax.jit` for programs of a model, all of which return batches: on a mesh these stay split over its devices.

    Left to itself, XLA splits features where parameters are split, and gives each device more of the batch.
    """
    where = {} if base.mesh is None else {"out_shardings": batch_sharding(base.mesh)}
    return functools.partial(jax.jit, compiler_options=dict(base.compiler_options), **where)


def _autoencoder_programs(base: TextToImage, compiled: Callable[..., Any]) -> dict[str, Any]:
    return {
        function.__name__: compiled(functools.partial(function, base), static_argnames="tiled")
        for function in (decode, encode_images)
    }


def scan(
    base: TextToImage,
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
    nag: AttentionGuidance | None = None,
    *,
    controlnets: tuple[Network, ...],
    prompted_only: bool,
    prediction_type: str,
) -> State:
    """Run the steps of a solver's table. With an unconditional the two calls of a step are one on a double batch.

    Args:
        base: the model.
        params, adapter: the denoiser's.
        cond, uncond, scale: see `predict`.
        table: of `solver_table`, all of it or some steps.
        state: before the first of these steps.
        noise: (steps, B, h, w, C), what each step adds.
        guides: images that steer.
        control_params, control_scales, controlnets: one entry for each ControlNet.
        nag: what the prompts' attention is steered away from, under guidance in the prompted half alone.
        prompted_only: whether ControlNets leave the unconditional batch alone.
        prediction_type: what the denoiser outputs.
    """
    how: dict[str, Any] = {} if nag is None else {"nag": nag}
    if controlnets:
        how["controls"] = ControlInputs(controlnets, control_params, guides.controls, control_scales, prompted_only)
    if guides.inpaint_inputs is not None:
        twice = [guides.inpaint_inputs] * (1 if uncond is None else 2)
        how["inpaint_inputs"] = jnp.concatenate(twice)

    def steered(x: jax.Array, t: jax.Array) -> jax.Array:
        return predict(base, params, adapter, cond, uncond, scale, x, t, **how)

    return advance(steered, table, state, noise, prediction_type=prediction_type, known=guides.known)


def predict(
    base: TextToImage,
    params: Any,
    adapter: Any,
    cond: Conditioning,
    uncond: Conditioning | None,
    scale: jax.Array,
    x: jax.Array,
    t: jax.Array,
    **how: Any,
) -> jax.Array:
    """Evaluate the denoiser once, under classifier-free guidance where there is an unconditional.

    Args:
        base: the model.
        params, adapter: the denoiser's.
        cond: of the prompts.
        uncond: of the negative prompts; None evaluates the prompts alone.
        scale: guidance scale, a scalar; of classifier-free guidance, or the input of a denoiser that embeds guidance.
        x: (B, h, w, C) as the denoiser reads it.
        t: timesteps (B,).
        **how: ``controls``, ``inpaint_inputs`` and ``nag`` of `TextToImage.predict`.
    """
    if uncond is None:
        return base.predict(params, x, t, cond, adapter=adapter, guidance=scale, **how)[0]
    both = jax.tree.map(lambda u, c: jnp.concatenate([u, c]), uncond, cond)
    x, t = jnp.concatenate([x, x]), jnp.concatenate([t, t])
    output = base.predict(params, x, t, both, adapter=adapter, guidance=scale, **how)[0]
    unguided, prompted = jnp.split(output.astype(jnp.float32), 2)
    return guided(unguided, prompted, scale)


def decode(base: TextToImage, params: Any, latents: jax.Array, *, tiled: bool) -> jax.Array:
    """Decode the sampler's latents to images (B, H, W, 3) in 0..1; NaN where a value is not finite."""
    whole, z = functools.partial(base.decode, params), base.unscale(latents)
    images = decode_tiled(whole, z, tile=TILE, overlap=OVERLAP, factor=base.downscale) if tiled else whole(z)
    images = images.astype(jnp.float32)
    # Clipped, infinity would pass for white.
    images = jnp.where(jnp.isfinite(images), images, jnp.nan)
    return jnp.clip(images / 2 + 0.5, 0.0, 1.0)


def encode_images(base: TextToImage, params: Any, images: jax.Array, *, tiled: bool) -> jax.Array:
    """Encode images (B, H, W, 3) in 0..1 to latents (B, h, w, C) as the denoiser reads them: the encoder's mean."""

    def whole(x: jax.Array) -> jax.Array:
        return base.posterior(params, x)[0]

    x = 2 * images - 1
    mean = encode_tiled(whole, x, tile=TILE, overlap=OVERLAP, factor=base.downscale) if tiled else whole(x)
    return base.scale(mean)


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
