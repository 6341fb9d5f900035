"""ODE pairs (noise, endpoint) of a many-step teacher, computed once, used repeatedly (DMD, arXiv 2311.18828, 4.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from hypersd_jax.conditioning import Conditioning
from hypersd_jax.distill import draw_trajectory
from hypersd_jax.inputs.batches import LoadedBatch
from hypersd_jax.training import batch_sharding

Rollout = Callable[[Any, jax.Array, Conditioning], jax.Array]
"""(frozen, noise (B, h, w, C), conditioning of B samples) -> the teacher's endpoint (B, h, w, C)."""


def make_ode_pairs(
    loaded: Iterator[LoadedBatch],
    rollout: Rollout,
    frozen: Any,
    *,
    batches: int,
    latent_shape: tuple[int, ...],
    key: jax.Array,
    mesh: jax.sharding.Mesh,
    name: str,
) -> list[dict[str, Any]]:
    """Add "noise" and "endpoint" (A, B, h, w, C) float32 to every batch.

    All batches stay on the devices: a sample's latents three times, and its conditioning. A resumed run computes them
    again, to the same bits.

    Args:
        loaded: the batches.
        rollout: computes the endpoints.
        frozen: what ``rollout`` reads.
        batches: how many there are.
        latent_shape: (h, w, C).
        key: of the noise.
        mesh: of the batches.
        name: the stage's, for the progress bar.
    """
    sharding = batch_sharding(mesh, axis=1)

    def compute(frozen: Any, key: jax.Array, indices: jax.Array, cond: Conditioning) -> tuple[jax.Array, jax.Array]:
        def one(micro_batch: tuple[jax.Array, Conditioning]) -> tuple[jax.Array, jax.Array]:
            indices, cond = micro_batch
            noise = draw_trajectory(key, (indices.shape[0], *latent_shape), 1, indices).noise
            return noise, rollout(frozen, noise, cond)

        # Models constrain their activations to axis names, which the mesh gives their meaning.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            found: tuple[jax.Array, jax.Array] = jax.lax.map(one, (indices, cond))
        return found

    compute = jax.jit(compute, out_shardings=(sharding, sharding))
    pairs = []
    with tqdm(total=batches, unit="batch", desc=f"{name}: ODE pairs", disable=jax.process_index() != 0) as bar:
        for number, batch, _ in loaded:
            drawn = jax.random.fold_in(key, number)
            noise, target = compute(frozen, drawn, batch["indices"], batch["cond"])
            pairs.append({**batch, "noise": noise, "endpoint": jax.block_until_ready(target)})
            bar.update()
    return pairs


def repeat_batches(pairs: list[dict[str, Any]], *, updates: int, done: int, key: jax.Array) -> Iterator[LoadedBatch]:
    """Repeat batches from step ``done + 1`` on: all of them in one order, then in another."""
    for update in range(done, updates):
        epoch, position = divmod(update, len(pairs))
        order = np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), len(pairs)))
        yield LoadedBatch(update + 1, pairs[order[position]], 0.0)
