"""The contents of a stage's micro-batches as shapes, for a plan of a run that reads no data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hypersd_jax.inputs.batches import Reading, nothing
from hypersd_jax.stages.context import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """A micro-batch of a training step, and what is computed of its samples before the step.

    Attributes:
        shapes: a tree of `jax.ShapeDtypeStruct`, leaves (size, ...).
        encodes_images: the autoencoder encodes each sample's image.
        encodes_texts: the text encoders encode each sample's caption.
    """

    shapes: Mapping[str, Any]
    encodes_images: bool = False
    encodes_texts: bool = False

    def holding(self, more: Mapping[str, Any]) -> MicroBatch:
        """Return a copy that holds more."""
        return dataclasses.replace(self, shapes={**self.shapes, **more})


def conditioned(run: Run, size: int, *, images: bool = True, read: Reading = nothing) -> MicroBatch:
    """Describe {"cond", "indices"}, "latents" where images are read, and what ``read`` makes of the samples.

    Latents are of the run's square; those of aspect buckets have about as many numbers. To know what ``read`` gives,
    one sample of the data is read.
    """
    assert run.uncond is not None
    sizes: Any = jax.ShapeDtypeStruct((size, 6), jnp.float32) if run.base.reads_size else None
    row = run.uncond._replace(time_ids=None)
    found: dict[str, Any] = {"cond": run.base.with_sizes(_repeated(row, size), sizes), "indices": _indices(size)}
    if images:
        found["latents"] = jax.ShapeDtypeStruct((size, *run.base.latent_shape), jnp.float32)
    if read is not nothing:
        found |= _repeated(_read_one(run, read, images=images), size)
    from_cache = run.config.data.cache is not None
    return MicroBatch(shapes=found, encodes_images=images and not from_cache, encodes_texts=not (images and from_cache))


def captioned(run: Run, size: int) -> MicroBatch:
    """Describe {"latents", "ids", "sizes", "indices"}."""
    ids = run.base.prompts.tokenize([""])
    found = {
        "latents": jax.ShapeDtypeStruct((size, *run.base.latent_shape), jnp.float32),
        "ids": _repeated(ids, size),
        "sizes": jax.ShapeDtypeStruct((size, 6), jnp.float32) if run.base.reads_size else None,
        "indices": _indices(size),
    }
    return MicroBatch(shapes=found, encodes_images=run.config.data.cache is None)


def images_alone(run: Run, size: int) -> MicroBatch:
    """Describe {"images", "indices"}."""
    side = run.base.image_side
    images = jax.ShapeDtypeStruct((size, side, side, 3), jnp.uint8)
    return MicroBatch(shapes={"images": images, "indices": _indices(size)})


def _indices(size: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((size,), jnp.int32)


def _read_one(run: Run, read: Reading, *, images: bool) -> Mapping[str, Any]:
    """Read one sample: the data's first, or without images a prompt alone."""
    if not images:
        return read([run.preview_prompts[0]], None)
    assert run.source is not None
    batch = run.source.batch(np.arange(1))
    return read(batch.captions, batch)


def _repeated(row: Any, size: int) -> Any:
    """Describe ``size`` samples, given arrays (1, ...) or shapes of one."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype), row)
