"""Pictures of a list, drawn once: kept in chunks, with their features, under a name for all they were drawn with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from hypersd_jax.conditioning import already_warned
from hypersd_jax.errors import UserError, shown
from hypersd_jax.evaluation import SPECS, features, seen_by
from hypersd_jax.pipeline import Pipeline, Settings
from hypersd_jax.pipeline.arguments import NotFiniteWarning, about_not_finite, not_finite
from hypersd_jax.weights.diffusers.component import fingerprint
from hypersd_jax.weights.tensors import replacing

# What a stopped run loses at most; whatever --batch-size is, since pictures do not depend on it.
CHUNK = 64
FORMAT = 1


class Prompted(NamedTuple):
    """One picture to draw: its prompt, and the seed of its latents."""

    prompt: str
    seed: int


class Drawn(NamedTuple):
    """``images`` uint8 (N, H, W, 3), their ``features`` (N, 1280), and what the reporting scorer sees in them (N, E).

    ``seconds`` is what a picture took; ``chunks`` are the files that hold all this.
    """

    images: np.ndarray
    features: np.ndarray
    seen: np.ndarray
    seconds: float
    chunks: tuple[Path, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A pipeline as it draws now.

    ``identity`` names all of its weights; ``settings`` are resolved, with no default left; ``preset`` is the one asked
    for, which may say what no argument of the pipeline does.
    """

    pipe: Pipeline
    identity: str
    settings: Settings
    preset: str | None = None

    @property
    def calls(self) -> int:
        """Network calls a picture: guidance doubles them, except where the network embeds it."""
        guided = (self.settings.guidance or 0.0) > 1.0 and not self.pipe.components.unet_config.time_cond_proj_dim
        return int(self.settings.steps or 0) * (2 if guided else 1)


def weights_identity(pipe: Pipeline) -> str:
    """A name for the base: the weights of all parts, the dtype that they compute in, and all that its files state."""
    parts = {name: fingerprint(params) for name, params in sorted(pipe.components.params.items())}
    told = pipe.components.description
    tokenizers = {
        name: {file: hashlib.sha256(content).hexdigest() for file, content in tokenizer.files.items()}
        for name, tokenizer in told.tokenizers.items()
    }
    stated = [told.configs, told.scheduler_config, told.model_index, tokenizers]
    text = json.dumps([parts, jnp.dtype(pipe.dtype).name, stated], sort_keys=True, default=dict)
    return hashlib.sha256(text.encode()).hexdigest()


def with_loras(identity: str, loras: Sequence[tuple[str, float]]) -> str:
    """The same for a base with LoRAs, by the hashes of their contents and their scales, in order."""
    return hashlib.sha256(json.dumps([identity, list(loras)]).encode()).hexdigest() if loras else identity


def draw_list(model: Model, items: Sequence[Prompted], *, batch_size: int, cache: Path, title: str) -> Drawn:
    """Pictures of the list; chunks that ``cache`` holds already are read, the others are drawn and kept there.

    Raises:
        UserError: a kept chunk is damaged, or the cache cannot be written.
    """
    chunks, paths = [], []
    warm = False
    with tqdm(total=len(items), unit="picture", desc=title) as bar:
        for start in range(0, len(items), CHUNK):
            part = items[start : start + CHUNK]
            path = cache / f"{_chunk_name(model, part)}.npz"
            if not path.exists():
                if not warm:  # so that compiling is not taken for drawing
                    _draw(model, part[:batch_size], batch_size)
                    warm = True
                _save_chunk(path, _draw_chunk(model, part, batch_size))
            chunks.append(load_chunk(path))
            paths.append(path)
            bar.update(len(part))
    return joined(chunks, paths)


def joined(chunks: Sequence[Mapping[str, np.ndarray]], paths: Sequence[Path]) -> Drawn:
    """Several chunks as one; the seconds are their median."""
    arrays = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in ("images", "features", "seen")}
    seconds = float(np.median([chunk["seconds"] for chunk in chunks]))
    return Drawn(**arrays, seconds=seconds, chunks=tuple(paths))


def load_chunk(path: Path) -> Mapping[str, np.ndarray]:
    """What `Drawn` holds, of one kept chunk; UserError where the file is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            chunk = {name: file[name] for name in ("images", "features", "seen", "seconds")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: kept pictures are damaged ({error}); delete the file") from None
    if chunk["images"].ndim != 4 or len({len(chunk[name]) for name in ("images", "features", "seen")}) != 1:
        raise UserError(f"{path}: kept pictures are damaged (their numbers differ); delete the file")
    return chunk


def _save_chunk(path: Path, chunk: Mapping[str, np.ndarray]) -> None:
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **chunk)


def _chunk_name(model: Model, items: Sequence[Prompted]) -> str:
    settings = dataclasses.asdict(model.settings)
    listed = [list(item) for item in items]
    text = json.dumps([FORMAT, model.identity, settings, model.preset, model.pipe.native_size, listed])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _draw_chunk(model: Model, items: Sequence[Prompted], batch_size: int) -> dict[str, np.ndarray]:
    begin = time.perf_counter()
    images = _draw(model, items, batch_size)
    seconds = (time.perf_counter() - begin) / len(items)
    return {
        "images": images,
        "features": features(images),
        "seen": seen_by(SPECS["report"], images),
        "seconds": np.asarray(seconds, np.float64),
    }


def _draw(model: Model, items: Sequence[Prompted], batch_size: int) -> np.ndarray:
    """uint8 (N, H, W, 3); latents, and the noise of each step, depend on a picture's seed alone.

    Raises:
        UserError: images are not finite, of which no number would mean anything.
    """
    pipe, plan = model.pipe, model.settings
    factor = pipe.components.vae_config.downscale
    shape = (*(side // factor for side in pipe.native_size), pipe.components.unet_config.out_channels)
    seeds = np.asarray([item.seed for item in items], np.uint32)
    with already_warned(), warnings.catch_warnings():  # `run_evaluate` has looked at all prompts
        warnings.simplefilter("ignore", NotFiniteWarning)
        images = pipe(
            [item.prompt for item in items],
            latents=_latents(shape)(seeds),
            noise=np.moveaxis(_noise(shape, int(plan.steps or 1))(seeds), 1, 0),
            output="np",
            batch_size=min(batch_size, len(items)),
            stepwise=True,
            preset=model.preset,
            steps=plan.steps,
            sampler=plan.sampler,
            eta=plan.eta,
            guidance=plan.guidance,
            spacing=plan.spacing,
            timesteps=plan.timesteps,
        )
    if broken := not_finite(images):
        prompt = shown(items[broken[0]].prompt)
        raise UserError(f"{about_not_finite(broken, len(images), pipe.dtype)}; the first is of {prompt}")
    return np.round(images * 255.0).astype(np.uint8)


def _latents(shape: tuple[int, ...]) -> Any:
    """Seeds (N,) -> standard normal (N, h, w, C): as the comparison after training draws them."""
    return _on_host(jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape, jnp.float32)))


def _noise(shape: tuple[int, ...], steps: int) -> Any:
    """Seeds (N,) -> standard normal (N, steps, h, w, C), what a stochastic solver adds."""

    def one(seed: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(jax.random.key(seed), 1), (steps, *shape), jnp.float32)

    return _on_host(jax.vmap(one))


def _on_host(function: Any) -> Any:
    return lambda seeds: np.asarray(jax.jit(function)(seeds))
