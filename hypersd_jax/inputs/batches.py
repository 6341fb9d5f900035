"""Load the batches of a stage onto the devices, in the background while they compute."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from hypersd_jax.bases import TextToImage
from hypersd_jax.conditioning import Conditioning, LongPromptWarning, PromptEncoder, already_warned
from hypersd_jax.config import Config, StageConfig
from hypersd_jax.data import Batch, Source, prefetch
from hypersd_jax.data.cache import Cache
from hypersd_jax.errors import UserError
from hypersd_jax.inputs.cache_metadata import cache_metadata
from hypersd_jax.inputs.encoding import make_encoder, make_latents, make_sampler
from hypersd_jax.training import batch_sharding, process_indices, put_batch

Load = Callable[[np.ndarray], Any]
"""(positions (A, B) in the data's stream) -> tree of arrays (A, B, ...) on the host; runs in the background."""
Finish = Callable[[int, Any], dict[str, Any]]
"""(step, counted from 0; what was loaded, on the devices) -> the step's batch."""
Reading = Callable[[Sequence[str], Batch | None], Mapping[str, Any]]
"""(captions of N samples, and their images where these are read) -> what else a step reads of them.

That is trees of arrays (N, ...) by their name in the batch.
"""


def nothing(captions: Sequence[str], images: Batch | None) -> dict[str, Any]:
    """Read nothing else of the samples."""
    return {}


def together(*readings: Reading) -> Reading:
    """Join readings of different names in the batch into one."""
    return lambda captions, images: {name: tree for read in readings for name, tree in read(captions, images).items()}


class LoadedBatch(NamedTuple):
    """The batch of one training step, counted from 1, and the seconds for which the run waited for its data."""

    number: int
    batch: dict[str, Any]
    data_loading_seconds: float


def load_batches(
    stage: StageConfig, *, before: int, done: int, mesh: Mesh, load: Load, finish: Finish
) -> Iterator[LoadedBatch]:
    """Load the batches of a stage from step ``done + 1`` on; its data begin at position ``before`` of the stream.

    Each batch has "indices" (A, B) int32: the batch indices of its samples.
    """
    mine = process_indices(stage.batch_size, stage.accumulate)
    sharding = batch_sharding(mesh, axis=1)
    indices = put_batch(mine.astype(np.int32), sharding)

    def host_batches() -> Iterator[tuple[int, Any]]:
        for number in range(done, stage.updates):
            yield number, load(before + number * stage.batch_size + mine)

    begin = time.perf_counter()
    for number, loaded in prefetch(host_batches()):
        seconds = time.perf_counter() - begin
        yield LoadedBatch(number + 1, {**finish(number, put_batch(loaded, sharding)), "indices": indices}, seconds)
        begin = time.perf_counter()


def images_only(source: Source) -> Load:
    """Load images without captions: {"images" (A, B, H, W, 3)}."""

    def load(positions: np.ndarray) -> Any:
        return {"images": _split(source.batch(positions.reshape(-1)).images, positions)}

    return load


def examples(source: Source, prompts: PromptEncoder, read: Reading, *, sizes: bool) -> Load:
    """Load images, token ids, sizes where the model reads these, and what else is read of the samples.

    {"images", "ids": (A, B, S) each, "sizes", "read"}.
    """

    def load(positions: np.ndarray) -> Any:
        batch = source.batch(positions.reshape(-1))
        ids = tuple(_split(tokens, positions) for tokens in prompts.tokenize_captions(batch.captions))
        found = _split(batch.sizes, positions) if sizes else None
        return {
            "images": _split(batch.images, positions),
            "ids": ids,
            "sizes": found,
            "read": split_all(read(batch.captions, batch), positions),
        }

    return load


def cached(source: Source, cache: Cache, read: Reading, *, sizes: bool, encoders: int) -> Load:
    """Load encoded examples from a cache: {"mean", "logvar", "ids", "context", "pooled", "sizes", "read"}."""

    def load(positions: np.ndarray) -> Any:
        keys = source.keys(positions.reshape(-1))
        found = split_all(cache.rows(keys), positions)
        return {
            "mean": found["mean"],
            "logvar": found["logvar"],
            "ids": tuple(found[f"ids_{i}"] for i in range(encoders)),
            "context": found["context"],
            "pooled": found.get("pooled"),
            "sizes": found["sizes"] if sizes else None,
            "read": {} if read is nothing else split_all(read(source.captions(keys), None), positions),
        }

    return load


class Inputs:
    """Latents and conditioning for a run's stages: encoded batch by batch, or read from ``data.cache``."""

    def __init__(
        self,
        config: Config,
        source: Source,
        base: TextToImage,
        mesh: Mesh,
        *,
        trained: Collection[str] = (),
    ) -> None:
        """Prepare without compiling; ``trained`` names components whose outputs are not read.

        Raises:
            UserError: the cache is missing, unfinished, or of another model.
        """
        self._base, self._mesh = base, mesh
        sharding = batch_sharding(mesh, axis=1)
        bare = base.without_weights()
        if config.data.cache is None:
            self._loader = partial(examples, source, base.prompts, sizes=base.reads_size)
            self._encode = make_encoder(bare, sharding)
            self._encode_images = make_latents(bare, sharding)
        else:
            try:
                cache = Cache(Path(config.data.cache))
                cache.require(cache_metadata(config.data, source, base, trained=trained))
                if source.uncacheable:
                    raise UserError(f"a cache cannot be used: {source.uncacheable}")
                cache.require_rows(source.variants())
            except UserError as error:
                raise UserError(f"data.cache: {error}") from None
            self._loader = partial(cached, source, cache, sizes=base.reads_size, encoders=len(base.text_encoders))
        self._from_cache = config.data.cache is not None
        self._sample = make_sampler(bare, sharding)

    def conditioned(
        self, stage: StageConfig, *, before: int, done: int, key: jax.Array, read: Reading = nothing
    ) -> Iterator[LoadedBatch]:
        """Load batches {"latents", "cond", "indices"} of a stage that trains adapters, as `load_batches`.

        They also hold what ``read`` makes of the samples.
        """
        params = self._base.params
        texts = {name: params[name] for name in self._base.text_encoders}
        autoencoder = dict(params[self._base.autoencoder])

        def finish(number: int, loaded: Any) -> dict[str, Any]:
            drawn = jax.random.fold_in(key, number)
            if self._from_cache:
                cond = Conditioning(loaded["context"], loaded["pooled"], loaded["sizes"])
                latents = self._sample(loaded["mean"], loaded["logvar"], drawn)
                return {"latents": latents, "cond": cond, **loaded["read"]}
            images, ids, sizes = loaded["images"], loaded["ids"], loaded["sizes"]
            encoded: dict[str, Any] = self._encode(texts, autoencoder, images, ids, sizes, drawn)
            return {**encoded, **loaded["read"]}

        load = self._loader(read)
        return load_batches(stage, before=before, done=done, mesh=self._mesh, load=load, finish=finish)

    def captioned(self, stage: StageConfig, *, before: int, done: int, key: jax.Array) -> Iterator[LoadedBatch]:
        """Load batches {"latents", "ids", "sizes", "indices"} of a stage that trains the text encoders too."""

        def finish(number: int, loaded: Any) -> dict[str, Any]:
            drawn = jax.random.fold_in(key, number)
            if self._from_cache:
                latents = self._sample(loaded["mean"], loaded["logvar"], drawn)
            else:
                autoencoder = dict(self._base.params[self._base.autoencoder])
                latents = self._encode_images(autoencoder, loaded["images"], drawn)
            return {"latents": latents, "ids": loaded["ids"], "sizes": loaded["sizes"]}

        load = self._loader(nothing)
        return load_batches(stage, before=before, done=done, mesh=self._mesh, load=load, finish=finish)


@contextmanager
def reporting_cut_captions(prompts: PromptEncoder) -> Iterator[None]:
    """Warn, when a run's stages end, in one line, about captions that are longer than the encoder reads.

    Previews use captions, so they give no such warning of their own.
    """
    try:
        with already_warned():
            yield
    finally:
        warn_about_cut_captions(prompts)


def warn_about_cut_captions(prompts: PromptEncoder) -> None:
    """Warn, in one line, about captions of which the encoder has not read all, if there were any."""
    line = prompts.caption_cuts.report()
    if line is not None and jax.process_index() == 0:
        warnings.warn(line, LongPromptWarning, stacklevel=2)


def split_all(samples: Mapping[str, Any], positions: np.ndarray) -> dict[str, Any]:
    """Split all arrays (N, ...) of a flat batch into micro-batches (A, B, ...)."""
    found: dict[str, Any] = jax.tree.map(lambda leaf: _split(leaf, positions), dict(samples))
    return found


def _split(samples: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Split the samples of a flat batch into micro-batches (A, B, ...)."""
    return samples.reshape(*positions.shape, *samples.shape[1:])
