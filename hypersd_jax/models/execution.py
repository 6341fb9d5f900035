"""Execution of a network, as against what it computes: data type, rematerialisation, batch sharding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from hypersd_jax.models.layers import Conv


@dataclass(frozen=True, kw_only=True)
class Execution:
    """Static settings that every block of a network shares.

    Attributes:
        dtype: of parameters and computation.
        remat: recompute each block in the backward pass instead of keeping its insides.
        batch_sharding: where given, features are constrained to it at each block, so that XLA gathers kernels rather
            than splitting convolutions; its spec names the axes of the batch dimension alone.
    """

    dtype: Any = jnp.float32
    remat: bool = False
    batch_sharding: NamedSharding | None = None

    @property
    def platform(self) -> str | None:
        """The platform to trace for, "cpu", "gpu" or "tpu": that of the mesh; None, JAX's default, without one."""
        return None if self.batch_sharding is None else str(self.batch_sharding.mesh.devices.flat[0].platform)

    @property
    def conv(self) -> Callable[..., Conv]:
        """`layers.Conv` in this data type and for this platform."""
        return partial(Conv, dtype=self.dtype, platform=self.platform)

    def constrain_batch(self, x: jax.Array) -> jax.Array:
        """Shard the first axis as `batch_sharding` says; the identity without one, and for uneven batches."""
        if self.batch_sharding is None or x.shape[0] % self.batch_sharding.mesh.size:
            return x
        return jax.lax.with_sharding_constraint(x, self.batch_sharding)

    def run(self, block: Callable[..., jax.Array], *args: Any) -> jax.Array:
        """Call a block on arrays, constrained and, with `remat`, checkpointed; its parameters are closed over."""

        def body(*args: Any) -> jax.Array:
            return self.constrain_batch(block(*args))

        return jax.checkpoint(body)(*args) if self.remat else body(*args)
