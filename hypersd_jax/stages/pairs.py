"""Noise and where a many-step teacher leads from it, computed once and gone over again (DMD, arXiv 2311.18828, 4.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from hypersd_jax.conditioning import Conditioning
from hypersd_jax.distill import draw_trajectory
from hypersd_jax.stages.feeding import Fed
from hypersd_jax.training import batch_sharding

Lead = Callable[[Any, jax.Array, Conditioning], jax.Array]
"""(frozen, noise (B, h, w, C), conditioning of B samples) -> where the teacher leads from there, likewise."""


def make_pairs(
    fed: Iterator[Fed],
    lead: Lead,
    frozen: Any,
    *,
    batches: int,
    latent_shape: tuple[int, ...],
    key: jax.Array,
    mesh: jax.sharding.Mesh,
    name: str,
) -> list[dict[str, Any]]:
    """Every batch with "noise" and "end" (A, B, h, w, C) float32 beside what it had.

    All of them stay on the devices: a sample's latents three times, and its conditioning. A run that goes on computes
    them again, to the same bits.

    Args:
        fed: the batches.
        lead: computes the ends.
        frozen: what it reads.
        batches: how many there are.
        latent_shape: (h, w, C).
        key: of the noise.
        mesh: of the batches.
        name: the stage's, for the progress bar.
    """
    place = batch_sharding(mesh, axis=1)

    def compute(frozen: Any, key: jax.Array, places: jax.Array, cond: Conditioning) -> tuple[jax.Array, jax.Array]:
        def one(rows: tuple[jax.Array, Conditioning]) -> tuple[jax.Array, jax.Array]:
            noise = draw_trajectory(key, (rows[0].shape[0], *latent_shape), 1, rows[0]).noise
            return noise, lead(frozen, noise, rows[1])

        # Models constrain their activations to axis names, which the mesh gives their meaning.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            found: tuple[jax.Array, jax.Array] = jax.lax.map(one, (places, cond))
        return found

    compute = jax.jit(compute, out_shardings=(place, place))
    pairs = []
    with tqdm(total=batches, unit="batch", desc=f"{name}: pairs", disable=jax.process_index() != 0) as bar:
        for number, batch, _ in fed:
            drawn = jax.random.fold_in(key, number)
            noise, end = compute(frozen, drawn, batch["places"], batch["cond"])
            pairs.append({**batch, "noise": noise, "end": jax.block_until_ready(end)})
            bar.update()
    return pairs


def again_and_again(pairs: list[dict[str, Any]], *, updates: int, done: int, key: jax.Array) -> Iterator[Fed]:
    """The batches from update ``done + 1`` on: all of them in one order, then in another."""
    for update in range(done, updates):
        turn, position = divmod(update, len(pairs))
        order = np.asarray(jax.random.permutation(jax.random.fold_in(key, turn), len(pairs)))
        yield Fed(update + 1, pairs[order[position]], 0.0)
