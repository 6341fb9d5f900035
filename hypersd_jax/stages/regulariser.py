"""The consistency regulariser: TSCD's loss of one segment, beside score distillation and regression.

What student and teacher predict where the solver step begins is computed by the stage, which has other calls of the
same models to make and joins them (`networks.in_one_call`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from hypersd_jax import distill
from hypersd_jax.diffusion import Schedule
from hypersd_jax.distill import Model, Segments, draw, mse, solver_start, tscd_pair_from
from hypersd_jax.stages.streams import Draw, drawn_from


class SolverStep(NamedTuple):
    """Where the teacher's solver step begins, and what is predicted there, as far as it is known."""

    draw: distill.Draw
    x_t: jax.Array  # (B, h, w, C) float32, the latents noised to draw.t_n
    cond: Any  # conditioning of the B samples
    student: jax.Array | None = None  # raw prediction (B, h, w, C), with its gradient
    teacher: jax.Array | None = None  # likewise, guidance applied

    @property
    def inputs(self) -> tuple[jax.Array, jax.Array, Any]:
        """What student and teacher are called on."""
        return self.x_t, self.draw.t_n, self.cond


def begin_step(
    segments: Segments, latents: jax.Array, guidance: ArrayLike, rows: Any, key: jax.Array, schedule: Schedule
) -> SolverStep:
    """Draw a solver step for each sample, and noise its clean latents (B, h, w, C) to where it begins."""
    both, key = (guidance, guidance), drawn_from(key, Draw.ANCHOR)
    drawn = draw(key, latents.shape, segments, guidance=both, indices=rows["places"])
    return SolverStep(drawn, solver_start(latents, drawn, schedule), rows["cond"])


def regulariser_loss(begun: SolverStep, target_fn: Model, schedule: Schedule) -> tuple[jax.Array, jax.Array]:
    """Compute the loss, and the calls that the target takes.

    Args:
        begun: with both predictions.
        target_fn: the student with its EMA weights.
        schedule: the base model's.
    """
    assert begun.student is not None
    assert begun.teacher is not None
    at = (begun.cond, begun.x_t, begun.draw)
    pair = tscd_pair_from(begun.student, begun.teacher, target_fn, *at, schedule=schedule)
    return jnp.mean(mse(pair.prediction, pair.target)), pair.target_calls
