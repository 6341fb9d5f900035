"""Choose over how many devices a run's weights are split, by what they take and what a device has."""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh

from hypersd_jax import adapters
from hypersd_jax.bases import describe_base
from hypersd_jax.config import Config
from hypersd_jax.pipeline import parse_dtype
from hypersd_jax.training import make_mesh
from hypersd_jax.training.first_process import from_first
from hypersd_jax.weights.mesh import MOST_AUTO_FSDP, mesh_shape
from hypersd_jax.weights.placement import BATCH_AXES, leaf_sharding

SHARE = 0.5
"""Of a device's memory, what weights and training state may take; the rest is for activations and gradients."""
STATE_BYTES = 28
"""Of a trained number: itself, two moments and the average in float32; and as a fake score model's, without average."""
MIB, GIB = 2**20, 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshChoice:
    """Axes of a mesh, and the reason in words; None where nothing was chosen."""

    data: int
    fsdp: int
    reason: str | None = None


def make_run_mesh(config: Config) -> Mesh:
    """Make the mesh of a run on the devices that are here; what was chosen is printed.

    Raises:
        UserError: naming `mesh.data` or `mesh.fsdp`, when the two do not fit the devices.
    """
    # Hosts may differ by some bytes, and all must make the same mesh.
    memory = from_first((device_memory() or 0) // MIB) * MIB or None
    choice = choose_mesh(config, jax.device_count(), memory, parse_dtype(config.model.dtype))
    if choice.reason is not None and jax.process_index() == 0:
        print(choice.reason, file=sys.stderr)
    return make_mesh(choice.data, choice.fsdp)


def device_memory() -> int | None:
    """Bytes that JAX may use of a device's memory; None where the device does not say, as a CPU."""
    stats: dict[str, Any] = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")


def choose_mesh(config: Config, count: int, memory: float | None, dtype: Any) -> MeshChoice:
    """Choose the axes of a mesh of ``count`` devices that have ``memory`` bytes each and compute in ``dtype``.

    With ``mesh.fsdp: auto`` weights and state are split over the fewest devices, a power of two that divides them and
    up to 8, with which they take half of the memory or less: splitting costs gathers at every block. Where the memory
    is not known they are split over as many as there are, up to 8, and beside an explicit ``mesh.data`` over the rest.

    Raises:
        UserError: naming `mesh.data` or `mesh.fsdp`, when the two do not fit the devices.
    """
    data, most = mesh_shape(config.mesh.data, config.mesh.fsdp, count)
    if config.mesh.fsdp != "auto" or config.mesh.data is not None or most == 1 or memory is None:
        return MeshChoice(data=data, fsdp=most)
    own: dict[str, Any] = {"dtype": dtype}
    if not config.adapter_stages:
        own |= {"param_dtype": jnp.float32, "fresh": config.model.fresh}
    base = describe_base(config.model.source, **own)
    read = [leaf for part in base.params.values() for leaf in part.values()]
    trained: list[Any] = list(base.params[base.denoiser].values())
    if config.adapter_stages and not any(stage.exports_model for stage in config.adapter_stages):
        fresh = jax.eval_shape(lambda: base.fresh_adapter(jax.random.key(0), rank=config.lora.rank, alpha=None))
        trained = jax.tree.leaves(adapters.split(fresh)[0])

    def taken(fsdp: int) -> float:
        mesh: Any = AbstractMesh((1, fsdp), BATCH_AXES, (AxisType.Auto,) * 2)

        def held(leaf: Any, dtype: Any) -> int:
            shape: tuple[int, ...] = leaf_sharding(mesh, leaf.shape, dtype).shard_shape(leaf.shape)
            return math.prod(shape)

        weights = sum(held(leaf, leaf.dtype) * jnp.dtype(leaf.dtype).itemsize for leaf in read)
        return weights + STATE_BYTES * sum(held(leaf, jnp.float32) for leaf in trained)

    sizes = [size for size in (1, 2, 4, MOST_AUTO_FSDP) if most % size == 0]
    fsdp = next((size for size in sizes if taken(size) <= SHARE * memory), most)
    data = count // fsdp
    reason = (
        f"mesh: {data} x {fsdp} (data x fsdp): weights and training state take {taken(fsdp) / GIB:.1f} GiB of the "
        f"{memory / GIB:.1f} of a device" + (f", {taken(1) / GIB:.1f} where they are not split" if fsdp > 1 else "")
    )
    return MeshChoice(data=data, fsdp=fsdp, reason=reason)
