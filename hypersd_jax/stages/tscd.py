"""The consistency stage: a loss of `hypersd_jax.distill` tied to one frozen UNet and its adapters.

Teacher, student and target are the same base weights under different LoRA trees (arXiv 2404.13686, section 3.1), so a
step holds one UNet. What differs between the four stages (k, N, guidance range, EMA decay, learning rate) enters as
arrays: all stages of one method share one compiled step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hypersd_jax.adapters import Adapter, join
from hypersd_jax.conditioning import Conditioning
from hypersd_jax.config import ConsistencyStage
from hypersd_jax.diffusion import Schedule, guided
from hypersd_jax.distill import consistency_loss, mse, pad_segments, pseudo_huber
from hypersd_jax.stages.loop import optimizer_config
from hypersd_jax.training import Controls, LossFunction, optimizer_controls
from hypersd_jax.weights.components import Components

Predict = Callable[[jax.Array, jax.Array, Conditioning], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepKind:
    """What is compiled into a step; stages of the same kind share it."""

    method: str
    from_previous: bool
    distance: str
    huber_c: float
    accumulate: int
    beta1: float
    beta2: float
    weight_decay: float
    clip_norm: float


def step_kind(stage: ConsistencyStage, *, first: bool) -> StepKind:
    """The compiled part of a stage. The first stage's teacher is the guided base under both readings (`method`)."""
    return StepKind(
        method="tscd" if stage.kind == "tcd" else stage.kind,  # TCD is TSCD with one segment
        from_previous=stage.teacher == "previous" and not first,
        distance=stage.distance,
        huber_c=stage.huber_c,
        accumulate=stage.accumulate,
        beta1=stage.beta1,
        beta2=stage.beta2,
        weight_decay=stage.weight_decay,
        clip_norm=stage.clip_norm,
    )


def stage_controls(stage: ConsistencyStage, schedule: Schedule, grid_length: int) -> Controls:
    """The arrays that steer a stage; ``grid_length`` is the longest N of the run, so that all have one shape."""
    segments = pad_segments(stage.solver_steps, stage.k, grid_length, schedule.num_train_timesteps)
    low, high = stage.guidance
    return {
        **optimizer_controls(optimizer_config(stage), stage.updates),
        "ema_decay": np.asarray(stage.ema, np.float32),
        "guidance_min": np.asarray(low, np.float32),
        "guidance_max": np.asarray(high, np.float32),
        "offset_noise": np.asarray(stage.offset_noise, np.float32),
        **segments,
    }


def frozen_tree(components: Components, uncond: Conditioning, scales: Any, teacher: Adapter | None) -> dict[str, Any]:
    """What the step reads and never changes: base UNet, unconditional row, LoRA scales, teacher's LoRA."""
    return {"unet": dict(components.params["unet"]), "uncond": uncond, "scales": scales, "teacher": teacher or {}}


def make_loss(components: Components, schedule: Schedule, kind: StepKind) -> LossFunction:
    """The stage's loss for `make_step`; the trainable tree is the student's LoRA factors, ``ema`` their average."""
    distance = mse if kind.distance == "mse" else pseudo_huber(kind.huber_c)

    def loss(
        trainable: Any, ema: Any, frozen: Any, batch: Any, key: jax.Array, controls: Controls
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        base, scales = frozen["unet"], frozen["scales"]

        def predictor(adapter: Adapter | None) -> Predict:
            def predict(x: jax.Array, t: jax.Array, cond: Conditioning) -> jax.Array:
                return components.unet(base, x, t, cond.context, adapter=adapter, **cond.unet_kwargs())

            return predict

        def guided_base(
            x: jax.Array, t: jax.Array, cond: Conditioning, uncond: Conditioning, guidance: jax.Array
        ) -> jax.Array:
            """Both halves of classifier-free guidance in one UNet call on a doubled batch."""
            both = jax.tree.map(lambda u, c: jnp.concatenate([u, c]), uncond, cond)
            output = predictor(None)(jnp.concatenate([x, x]), jnp.concatenate([t, t]), both).astype(jnp.float32)
            unguided, prompted = jnp.split(output, 2)
            return guided(unguided, prompted, guidance.reshape(-1, 1, 1, 1))

        def previous_student(
            x: jax.Array, t: jax.Array, cond: Conditioning, _uncond: Conditioning, _guidance: jax.Array
        ) -> jax.Array:
            return predictor(frozen["teacher"])(x, t, cond)

        rows = {**batch, "uncond": _broadcast(frozen["uncond"], batch["cond"])}
        return consistency_loss(
            kind.method,
            predictor(join(trainable, scales)),
            predictor(join(ema, scales)),
            previous_student if kind.from_previous else guided_base,
            rows,
            key,
            {name: controls[name] for name in ("t_n", "t_prev", "t_b", "count")},
            controls,
            schedule=schedule,
            distance=distance,
            indices=batch["places"],
        )

    return loss


def _broadcast(row: Conditioning, cond: Conditioning) -> Conditioning:
    """The unconditional row for a whole batch, with the batch's own time ids (recipes: only text is zeroed)."""

    def repeat(one: jax.Array, like: jax.Array) -> jax.Array:
        return jnp.broadcast_to(one, like.shape)

    pooled = None if row.pooled is None or cond.pooled is None else repeat(row.pooled, cond.pooled)
    return Conditioning(repeat(row.context, cond.context), pooled, cond.time_ids)
