"""The metadata of a cache of encoded examples: what decides its contents."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax.numpy as jnp

from hypersd_jax.bases import TextToImage
from hypersd_jax.config import DataConfig, to_dict
from hypersd_jax.data import Source
from hypersd_jax.data.opening import EMOJI
from hypersd_jax.weights.fingerprints import fingerprint

# Which examples are drawn, how often and in which order, changes none of them.
FREE_KEYS = ("cache", "white_fraction", "groups")


def cache_metadata(
    data: DataConfig, source: Source, base: TextToImage, *, trained: Collection[str] = ()
) -> dict[str, Any]:
    """Collect fingerprints of autoencoder and text encoders, the data's settings, captions and files, and the dtype.

    Components that are ``trained`` are left out: what the cache holds of them is not read.
    """
    # The key of an embedded image is its index among all of them; that of another, its index in its split.
    free = (*FREE_KEYS, "split") if data.source == EMOJI else FREE_KEYS
    parts = [name for name in (base.autoencoder, *base.text_encoders) if name not in trained]
    return {
        **{name: fingerprint(base.params[name]) for name in parts},
        "dtype": jnp.dtype(base.dtype).name,
        "captions": source.identity,
        "images' sizes and times": source.contents,
        "data": {key: value for key, value in to_dict(data).items() if key not in free},
    }
