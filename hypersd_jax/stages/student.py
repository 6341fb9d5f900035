"""How a stage's student is sampled: the one place that knows which of a stage's keys say so."""

from __future__ import annotations

from typing import TypedDict

from hypersd_jax.config import AdapterStage, ScoreStage


class Sampling(TypedDict):
    """Arguments of a draw; ``guidance`` 0 is off, ``timesteps`` None are the sampler's own."""

    steps: int
    sampler: str
    eta: float
    guidance: float
    timesteps: tuple[int, ...] | None


def student_sampling(stage: AdapterStage) -> Sampling:
    """A step for each segment of a consistency stage; the first of a score stage's numbers of steps, unguided."""
    if isinstance(stage, ScoreStage):
        return _score_sampling(stage, stage.steps[0])
    return {
        "steps": stage.k,
        "sampler": stage.sampler,
        "eta": stage.eta,
        "guidance": stage.sample_guidance,
        "timesteps": None,
    }


def compared_samplings(stage: AdapterStage) -> tuple[Sampling, ...]:
    """The same at every number of steps that the student is compared at."""
    if isinstance(stage, ScoreStage):
        return tuple(_score_sampling(stage, steps) for steps in stage.steps)
    return (student_sampling(stage),)


def _score_sampling(stage: ScoreStage, steps: int) -> Sampling:
    """As many steps as the student was trained with are taken at its own times."""
    times = stage.times if steps == len(stage.times) else None
    return {"steps": steps, "sampler": stage.sampler, "eta": stage.eta, "guidance": 0.0, "timesteps": times}
