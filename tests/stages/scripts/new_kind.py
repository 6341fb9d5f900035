"""A kind of stage from outside the package, trained by its own runner; a process of its own, which it changes.

The student learns to predict, without guidance, what the guided base does at random times (arXiv 2210.03142, stage 1).
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, Literal

import jax
import jax.numpy as jnp

from hypersd_jax.adapters import join
from hypersd_jax.bases import Networks
from hypersd_jax.config import Sampling, StageConfig, load_config
from hypersd_jax.diffusion import add_noise
from hypersd_jax.distill import alpha_sigma, mse
from hypersd_jax.stages import adapter_student, consistency, register, train
from hypersd_jax.stages.consistency import Frozen
from hypersd_jax.stages.kinds import STUDENT
from hypersd_jax.training import Phase


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuidanceStage(StageConfig):
    """Guidance distillation."""

    kind: Literal["guidance"]
    guidance: float = 3.0

    @property
    def samplings(self) -> tuple[Sampling, ...]:
        return ({"steps": 4, "sampler": "ddim", "eta": 0.0, "guidance": 0.0, "timesteps": None},)


class Guidance:
    """What answers for it; what it shares with the consistency stages is theirs."""

    batches = staticmethod(consistency.batches)
    preview = staticmethod(adapter_student.preview)
    finish = staticmethod(adapter_student.finish)

    def check(self, run: Any, stage: GuidanceStage, earlier: Any) -> None:
        pass

    def trainable(self, run: Any, index: int, stage: GuidanceStage) -> dict[str, Any]:
        return {STUDENT: run.student}

    def frozen(self, run: Any, stage: GuidanceStage) -> Frozen:
        return Frozen(run.base.weights, run.uncond, run.scales, {}, consistency.segments_of(run, 1, 1))

    def phases(self, base: Any, stage: GuidanceStage) -> list[Phase]:
        def loss(models: Any, ema: Any, frozen: Frozen, batch: Any, key: jax.Array) -> Any:
            nets, latents, cond = Networks(base=base, weights=frozen.weights), batch["latents"], batch["cond"]
            times, noises = jax.random.split(key)
            t = jax.random.randint(times, latents.shape[:1], 0, base.schedule.num_train_timesteps)
            x = add_noise(latents, jax.random.normal(noises, latents.shape), *alpha_sigma(base.schedule, t, latents))
            uncond, scale = base.unconditional(frozen.uncond, cond), jnp.broadcast_to(stage.guidance, t.shape)
            target = jax.lax.stop_gradient(nets.guided(x, t, cond, uncond, scale)[0])
            return jnp.mean(mse(nets.predictor(join(models[STUDENT], frozen.scales))(x, t, cond), target)), {}

        return [Phase(models={STUDENT: stage.learning_rate}, loss=loss)]


register(GuidanceStage, Guidance())
train(load_config(sys.argv[1]))
