"""The autoencoder of a model, large or tiny: which of the two a config.json describes, and its network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.sharding import NamedSharding

from hypersd_jax.models.functional import Network
from hypersd_jax.models.vae import vae
from hypersd_jax.models.vae_config import VaeConfig
from hypersd_jax.models.vae_tiny import tiny_vae
from hypersd_jax.models.vae_tiny_config import NAME as TINY
from hypersd_jax.models.vae_tiny_config import TinyVaeConfig

AnyVaeConfig = VaeConfig | TinyVaeConfig


def read_vae_config(values: Mapping[str, Any]) -> AnyVaeConfig:
    """Read the config.json of an autoencoder of either kind, which `_class_name` tells."""
    return TinyVaeConfig.from_dict(values) if values.get("_class_name") == TINY else VaeConfig.from_dict(values)


def vae_network(config: AnyVaeConfig, *, dtype: Any, batch_sharding: NamedSharding | None = None) -> Network:
    """Describe an autoencoder of either kind; one that says `force_upcast` is float32 where `dtype` is float16."""
    if config.force_upcast and jnp.dtype(dtype) == jnp.float16:
        dtype = jnp.float32
    how: dict[str, Any] = {"dtype": dtype, "batch_sharding": batch_sharding}
    return tiny_vae(config, **how) if isinstance(config, TinyVaeConfig) else vae(config, **how)
