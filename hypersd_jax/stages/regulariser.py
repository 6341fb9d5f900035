"""The consistency regulariser of score distillation and regression: TSCD's loss with one segment.

The stage computes the predictions of student and teacher where the solver step begins, since it joins them with
other calls of the same models (`bases.in_one_call`, `bases.in_one_loop`).
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
    """The start of the teacher's solver step, and the predictions there, as far as they are known."""

    draw: distill.Draw
    x_t: jax.Array  # (B, h, w, C) float32, the latents noised to draw.t_n
    cond: Any  # conditioning of the B samples
    student: jax.Array | None = None  # raw prediction (B, h, w, C), with its gradient
    teacher: jax.Array | None = None  # likewise, guidance applied

    @property
    def inputs(self) -> tuple[jax.Array, jax.Array, Any]:
        """Arguments of the student's and the teacher's call."""
        return self.x_t, self.draw.t_n, self.cond


def begin_step(
    segments: Segments, latents: jax.Array, guidance: ArrayLike, batch: Any, key: jax.Array, schedule: Schedule
) -> SolverStep:
    """Draw a solver step for each sample, and noise its clean latents (B, h, w, C) to where it begins."""
    both, key = (guidance, guidance), drawn_from(key, Draw.REGULARISER)
    drawn = draw(key, latents.shape, segments, guidance=both, indices=batch["indices"])
    return SolverStep(drawn, solver_start(latents, drawn, schedule), batch["cond"])


def regulariser_loss(solver_step: SolverStep, target_fn: Model, schedule: Schedule) -> tuple[jax.Array, jax.Array]:
    """Compute the regulariser's loss, and count the calls that its target takes.

    Args:
        solver_step: with both predictions.
        target_fn: the student with its EMA weights.
        schedule: the base model's.
    """
    assert solver_step.student is not None
    assert solver_step.teacher is not None
    at = (solver_step.cond, solver_step.x_t, solver_step.draw)
    pair = tscd_pair_from(solver_step.student, solver_step.teacher, target_fn, *at, schedule=schedule)
    return jnp.mean(mse(pair.prediction, pair.target)), pair.target_calls
