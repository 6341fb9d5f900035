"""The one generator: a model's images of a list of prompts, each from its own seed."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import time
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hypersd_jax.conditioning import already_warned
from hypersd_jax.diffusion import injects_noise
from hypersd_jax.errors import UserError, shown
from hypersd_jax.pipeline import Pipeline, Settings
from hypersd_jax.pipeline.arguments import NotFiniteWarning, about_not_finite, not_finite
from hypersd_jax.pipeline.settings import table_for

MANY_STEPS = 25
"""Sampling steps of the reference."""

DIVERSE_PROMPTS, FURTHER_SEEDS = 32, (1_000_000, 2_000_000, 3_000_000)
"""Diversity is measured on the first prompts of a list, from their own seed and from seeds so much above it."""


class Item(NamedTuple):
    """One image to generate: its prompt, and the seed of its latents and noise."""

    prompt: str
    seed: int


def further_items(items: Sequence[Item]) -> tuple[tuple[Item, ...], ...]:
    """The beginning of a list again from each further seed; () where it holds several seeds of a prompt already."""
    first = items[:DIVERSE_PROMPTS]
    if len({item.prompt for item in first}) < len(first):
        return ()
    return tuple(moved(first, offset) for offset in FURTHER_SEEDS)


def moved(items: Sequence[Item], offset: int) -> tuple[Item, ...]:
    """Return the same prompts with seeds that are ``offset`` higher."""
    return tuple(item._replace(seed=item.seed + offset) for item in items)


def calls_of(steps: int, guidance: float) -> int:
    """UNet calls an image: guidance doubles them."""
    return steps * (2 if guidance > 1.0 else 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A pipeline as it samples now.

    Attributes:
        name: in the table.
        pipe: with its LoRAs loaded.
        settings: resolved, with no default left.
        preset: the one asked for, which may say what no argument of the pipeline does.
        identity: names all of its weights, where images are kept.
    """

    name: str
    pipe: Pipeline
    settings: Settings
    preset: str | None = None
    identity: str = ""

    @property
    def calls(self) -> int:
        """UNet calls an image."""
        return self.settings.steps * (2 if self.settings.guided else 1)


def make_model(name: str, pipe: Pipeline, *, preset: str | None = None, identity: str = "", **explicit: Any) -> Model:
    """A model that samples as these settings, its LoRAs and its defaults say.

    Raises:
        UserError: no solver has such settings.
    """
    settings = pipe.settings(preset, **explicit)
    table_for(settings, pipe.base.scheduler_config)
    return Model(name=name, pipe=pipe, settings=settings, preset=preset, identity=identity)


def with_loras(identity: str, loras: Sequence[tuple[str, float]]) -> str:
    """Return the fingerprint of a base with LoRAs, by the hashes of their contents and their scales, in order."""
    return hashlib.sha256(json.dumps([identity, list(loras)]).encode()).hexdigest() if loras else identity


def sample(
    model: Model,
    items: Sequence[Item],
    *,
    batch_size: int,
    negatives: Sequence[str] | None = None,
    **steering: Any,
) -> np.ndarray:
    """Generate the list's images, uint8 (N, H, W, 3).

    Latents, and the noise of each step, depend on an image's seed alone: not on the batch size, nor on the list.

    Args:
        model: as it samples now.
        items: prompts and seeds.
        batch_size: images at a time.
        negatives: a negative prompt for each.
        **steering: arguments of the call that `pipeline.steering.Steering` holds.

    Raises:
        UserError: images are not finite, of which no number would mean anything.
    """
    pipe, settings = model.pipe, model.settings
    shape = (*(side // pipe.base.downscale for side in pipe.native_size), pipe.base.latent_channels)
    seeds = np.asarray([item.seed for item in items], np.uint32)
    table = table_for(settings, pipe.base.scheduler_config)
    noise = np.moveaxis(_noise(seeds, (len(table["alpha"]), *shape)), 1, 0) if injects_noise(table) else None
    with already_warned(), warnings.catch_warnings():  # whoever has the list warns of its long prompts, once
        warnings.simplefilter("ignore", NotFiniteWarning)
        images = pipe(
            [item.prompt for item in items],
            None if negatives is None else list(negatives),
            latents=_latents(seeds, shape),
            noise=noise,
            output="np",
            batch_size=min(batch_size, len(items)),
            stepwise=True,
            preset=model.preset,
            steps=settings.steps,
            sampler=settings.sampler,
            eta=settings.eta,
            guidance=settings.guidance,
            spacing=settings.spacing,
            timesteps=settings.timesteps,
            **steering,
        )
    if broken := not_finite(images):
        prompt = shown(items[broken[0]].prompt)
        raise UserError(f"{about_not_finite(broken, len(images), pipe.dtype)}; the first is of {prompt}")
    return np.round(images * 255.0).astype(np.uint8)


def warm_up(model: Model, items: Sequence[Item], batch_size: int) -> None:
    """Compile what the list's images take, so that no timing holds it: one batch, of two steps where there are more."""
    settings = model.settings
    if settings.timesteps is None:
        settings = dataclasses.replace(settings, steps=min(settings.steps, 2))
    sample(dataclasses.replace(model, settings=settings), items[:batch_size], batch_size=batch_size)


def timed_sample(model: Model, items: Sequence[Item], *, batch_size: int) -> tuple[np.ndarray, float]:
    """The images of `sample`, and the seconds that each took."""
    begin = time.perf_counter()
    images = sample(model, items, batch_size=batch_size)
    return images, (time.perf_counter() - begin) / len(items)


def _latents(seeds: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal (N, h, w, C), float32."""
    return np.asarray(_normal(jax.vmap(jax.random.key)(seeds), shape))


def _noise(seeds: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal (N, steps, h, w, C), what a stochastic solver adds."""
    return np.asarray(_normal(jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 1))(seeds), shape))


@functools.partial(jax.jit, static_argnames="shape")
def _normal(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)
