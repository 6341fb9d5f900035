"""Structure feedback: the loss of an instance segmentation of generated images (Hyper-SD, arXiv 2404.13686, Eq. 14).

The loss is SOLO's (arXiv 1912.04488, section 3.3) with the masks of SOLOv2 (arXiv 2003.10152): L_cate + 3 L_mask, both
over the number of positive cells. Shapes are static; where there are fewer positives than there is room for, the rest
has weight 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

GAMMA, ALPHA = 2.0, 0.25
"""Of the focal loss (Lin et al. 2017, arXiv 1708.02002)."""

MASK_WEIGHT = 3.0

EPS = 1e-3
"""Added to Dice's denominator, in pixels: two empty masks then have a coefficient of 0, and no gradient."""


class InstanceTargets(NamedTuple):
    """The instances of B images: M positive cells of all levels, up to I instances.

    Attributes:
        cells: (B, M) integers, index among the cells of all levels, those of the finest grid first, rows first.
        classes: (B, M) integers, the category of the cell's instance.
        instances: (B, M) integers, its index in `masks`.
        weights: (B, M), 1 for a positive cell, 0 where there is none. No cell is positive twice.
        masks: (B, I, H / 4, W / 4), the share of each pixel that an instance covers, 0..1.
    """

    cells: ArrayLike
    classes: ArrayLike
    instances: ArrayLike
    weights: ArrayLike
    masks: ArrayLike


class InstanceLoss(NamedTuple):
    """Scalars, float32, over the batch.

    Attributes:
        total: category + 3 mask.
        category: focal loss of all cells, over the number of positive ones.
        mask: mean of 1 - Dice over the positive cells.
    """

    total: jax.Array
    category: jax.Array
    mask: jax.Array


def instance_loss(
    categories: Sequence[jax.Array], kernels: Sequence[jax.Array], features: jax.Array, targets: InstanceTargets
) -> InstanceLoss:
    """Compute the instance segmentation loss of a batch: L_cate + 3 L_mask.

    Args:
        categories: logits of every level, (B, S, S, C).
        kernels: of every level, (B, S, S, E).
        features: (B, H / 4, W / 4, E).
        targets: of the same images and grids.

    Returns:
        Sums over the batch over its number of positive cells, which counts as 1 where there are none.
    """
    weights = jnp.asarray(targets.weights, jnp.float32)
    count = jnp.maximum(jnp.sum(weights), 1.0)
    logits = _flat(categories)
    category = jnp.sum(focal_loss(logits, category_targets(targets, logits.shape))) / count
    chosen = jax.vmap(lambda rows, cells: rows[cells])(_flat(kernels), jnp.asarray(targets.cells))
    wanted = jax.vmap(lambda masks, instances: masks[instances])(
        jnp.asarray(targets.masks, jnp.float32), jnp.asarray(targets.instances)
    )
    mask = jnp.sum(weights * dice_loss(dynamic_masks(chosen, features), wanted)) / count
    return InstanceLoss(category + MASK_WEIGHT * mask, category, mask)


def category_targets(targets: InstanceTargets, shape: Sequence[int]) -> jax.Array:
    """Compute the probabilities (B, N, C) of each category at each of N cells: 1 for a positive's, 0 elsewhere."""
    cells = jnp.asarray(targets.cells)
    images = jnp.broadcast_to(jnp.arange(shape[0])[:, None], cells.shape)
    # What fills up points at a cell too, and must not undo a positive there.
    weights = jnp.asarray(targets.weights, jnp.float32)
    return jnp.zeros(shape, jnp.float32).at[images, cells, jnp.asarray(targets.classes)].max(weights)


def focal_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Compute -alpha_t (1 - p_t)^gamma log(p_t) of each logit, for targets 0 or 1 of the same shape."""
    # p_t is the sigmoid of the margin by which a logit is on its target's side.
    margin = (2.0 * targets - 1.0) * logits.astype(jnp.float32)
    alpha = ALPHA * targets + (1.0 - ALPHA) * (1.0 - targets)
    return alpha * jax.nn.sigmoid(-margin) ** GAMMA * jax.nn.softplus(-margin)


def dynamic_masks(kernels: jax.Array, features: jax.Array) -> jax.Array:
    """Compute the masks (B, M, h, w) in 0..1 of kernels (B, M, E) over features (B, h, w, E)."""
    kernels, features = kernels.astype(jnp.float32), features.astype(jnp.float32)
    return jax.nn.sigmoid(jnp.einsum("bme,bhwe->bmhw", kernels, features, precision=jax.lax.Precision.HIGHEST))


def dice_loss(masks: jax.Array, targets: jax.Array) -> jax.Array:
    """Compute 1 - 2 sum(p q) / (sum(p^2) + sum(q^2)) over the pixels of (..., h, w), in 0..1: (...)."""
    axes = (-2, -1)
    overlap = jnp.sum(masks * targets, axis=axes)
    sizes = jnp.sum(jnp.square(masks), axis=axes) + jnp.sum(jnp.square(targets), axis=axes)
    return 1.0 - 2.0 * overlap / (sizes + EPS)


def _flat(levels: Sequence[jax.Array]) -> jax.Array:
    """Put the cells of all levels, (B, S, S, C) each, into one axis: (B, N, C)."""
    return jnp.concatenate([level.reshape(level.shape[0], -1, level.shape[-1]) for level in levels], axis=1)
