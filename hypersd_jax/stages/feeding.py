"""From places in a stream of pairs to batches on the devices; loading goes on in the background while they compute."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from hypersd_jax.conditioning import Conditioning, LongPromptWarning, PromptEncoder, already_warned
from hypersd_jax.config import Config, StageConfig
from hypersd_jax.data import Source, prefetch
from hypersd_jax.data.cache import Cache
from hypersd_jax.errors import UserError
from hypersd_jax.stages.cache_facts import cache_facts
from hypersd_jax.stages.inputs import make_encoder, make_latents, make_sampler
from hypersd_jax.stages.loop import process_rows
from hypersd_jax.training import batch_sharding, put_batch
from hypersd_jax.weights.components import Components

Load = Callable[[np.ndarray], Any]
"""From positions (A, B) to a tree of arrays (A, B, ...) on the host; runs in the background."""
Finish = Callable[[int, Any], dict[str, Any]]
"""From an update's number, counted from 0, and what was loaded, on the devices, to the step's batch."""


class Fed(NamedTuple):
    """The batch of one update, counted from 1, and how many seconds the run stood still until it had been loaded."""

    number: int
    batch: dict[str, Any]
    waited: float


def feed(stage: StageConfig, *, before: int, done: int, mesh: Mesh, load: Load, finish: Finish) -> Iterator[Fed]:
    """The batches from update ``done + 1`` of a stage on, whose data begins at place ``before``."""
    mine = process_rows(stage.batch_size, stage.accumulate)
    place = batch_sharding(mesh, axis=1)
    places = put_batch(mine.astype(np.int32), place)

    def host_batches() -> Iterator[tuple[int, Any]]:
        for number in range(done, stage.updates):
            yield number, load(before + number * stage.batch_size + mine)

    begin = time.perf_counter()
    for number, loaded in prefetch(host_batches()):
        waited = time.perf_counter() - begin
        yield Fed(number + 1, {**finish(number, put_batch(loaded, place)), "places": places}, waited)
        begin = time.perf_counter()


def pictures(source: Source) -> Load:
    """Pictures alone: {"images" (A, B, H, W, 3)}."""

    def load(positions: np.ndarray) -> Any:
        return {"images": _split(source.batch(positions.reshape(-1)).images, positions)}

    return load


def pairs(source: Source, prompts: PromptEncoder, *, xl: bool) -> Load:
    """Pictures, captions' token ids, and SDXL's size ids: {"images", "ids": a tuple of (A, B, S), "sizes" or None}."""

    def load(positions: np.ndarray) -> Any:
        batch = source.batch(positions.reshape(-1))
        ids = tuple(_split(tokens, positions) for tokens in prompts.tokenize_captions(batch.captions))
        sizes = _split(batch.sizes, positions) if xl else None
        return {"images": _split(batch.images, positions), "ids": ids, "sizes": sizes}

    return load


def cached(source: Source, cache: Cache, *, xl: bool, encoders: int) -> Load:
    """What `pairs` would lead to, read from a cache: {"mean", "logvar", "ids", "context", "pooled", "sizes"}."""

    def load(positions: np.ndarray) -> Any:
        rows = {k: _split(v, positions) for k, v in cache.rows(source.keys(positions.reshape(-1))).items()}
        return {
            "mean": rows["mean"],
            "logvar": rows["logvar"],
            "ids": tuple(rows[f"ids_{i}"] for i in range(encoders)),
            "context": rows["context"],
            "pooled": rows.get("pooled"),
            "sizes": rows["sizes"] if xl else None,
        }

    return load


class Inputs:
    """How a run's stages get latents and conditioning: encoded as they come, or read from ``data.cache``."""

    def __init__(
        self,
        config: Config,
        source: Source,
        components: Components,
        prompts: PromptEncoder,
        mesh: Mesh,
        dtype: Any,
        *,
        trained: Collection[str] = (),
    ) -> None:
        """Compile nothing yet; ``trained`` names components whose outputs are not read.

        Raises:
            UserError: the cache is missing, unfinished, or of another model.
        """
        self._components, self._mesh = components, mesh
        place = batch_sharding(mesh, axis=1)
        xl = components.is_xl
        if config.data.cache is None:
            self._load = pairs(source, prompts, xl=xl)
            self._encode = make_encoder(components, prompts, dtype, place)
            self._encode_pictures = make_latents(components, dtype, place)
        else:
            try:
                cache = Cache(Path(config.data.cache))
                cache.require(cache_facts(config.data, source, components, dtype, trained=trained))
                if source.uncacheable:
                    raise UserError(f"a cache cannot be used: {source.uncacheable}")
                cache.require_rows(source.variants())
            except UserError as error:
                raise UserError(f"data.cache: {error}") from None
            self._load = cached(source, cache, xl=xl, encoders=len(components.text_encoders))
        self._from_cache = config.data.cache is not None
        self._sample = make_sampler(components, place)

    def conditioned(self, stage: StageConfig, *, before: int, done: int, key: jax.Array) -> Iterator[Fed]:
        """Batches {"latents", "cond", "places"} of a stage that trains adapters; see `feed`."""
        params = self._components.params
        texts = {name: params[name] for name in self._components.text_encoders}

        def finish(number: int, loaded: Any) -> dict[str, Any]:
            drawn = jax.random.fold_in(key, number)
            if self._from_cache:
                cond = Conditioning(loaded["context"], loaded["pooled"], loaded["sizes"])
                return {"latents": self._sample(loaded["mean"], loaded["logvar"], drawn), "cond": cond}
            images, ids, sizes = loaded["images"], loaded["ids"], loaded["sizes"]
            encoded: dict[str, Any] = self._encode(texts, dict(params["vae"]), images, ids, sizes, drawn)
            return encoded

        return feed(stage, before=before, done=done, mesh=self._mesh, load=self._load, finish=finish)

    def captioned(self, stage: StageConfig, *, before: int, done: int, key: jax.Array) -> Iterator[Fed]:
        """Batches {"latents", "ids", "time_ids", "places"} of a stage that trains the text encoders too."""

        def finish(number: int, loaded: Any) -> dict[str, Any]:
            drawn = jax.random.fold_in(key, number)
            if self._from_cache:
                latents = self._sample(loaded["mean"], loaded["logvar"], drawn)
            else:
                latents = self._encode_pictures(dict(self._components.params["vae"]), loaded["images"], drawn)
            return {"latents": latents, "ids": loaded["ids"], "time_ids": loaded["sizes"]}

        return feed(stage, before=before, done=done, mesh=self._mesh, load=self._load, finish=finish)


@contextmanager
def telling_of_cut_captions(prompts: PromptEncoder) -> Iterator[None]:
    """Around a run's stages: warn at their end, in one line, of captions that are longer than the encoder reads.

    Previews are made with captions, so they say nothing of it.
    """
    try:
        with already_warned():
            yield
    finally:
        warn_of_cut_captions(prompts)


def warn_of_cut_captions(prompts: PromptEncoder) -> None:
    """Warn, in one line, of the captions of which the encoder has not read all, if there were any."""
    line = prompts.caption_cuts.report()
    if line is not None and jax.process_index() == 0:
        warnings.warn(line, LongPromptWarning, stacklevel=2)


def _split(rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Rows of a flat batch as (A, B, ...)."""
    return rows.reshape(*positions.shape, *rows.shape[1:])
