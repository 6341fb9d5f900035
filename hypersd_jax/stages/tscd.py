"""The consistency stage: a loss of `hypersd_jax.distill` tied to one frozen UNet and its adapters.

Teacher, student, target and discriminator are the same base weights under different LoRA trees (arXiv 2404.13686,
section 3.1), so a step holds one UNet. What differs between the four stages (k, N, guidance range, EMA decay, learning
rate, the two terms' weights) enters as arrays: all stages of one method share one compiled step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from hypersd_jax.adapters import Adapter, join
from hypersd_jax.conditioning import Conditioning
from hypersd_jax.config import ConsistencyStage
from hypersd_jax.diffusion import Schedule
from hypersd_jax.distill import consistency_loss, mse, pad_segments, pseudo_huber
from hypersd_jax.stages.judging import (
    Judge,
    JudgeKind,
    consistency_judgement,
    judge_controls,
    judge_kind,
)
from hypersd_jax.stages.loop import optimizer_config
from hypersd_jax.stages.networks import Networks, broadcast, with_dropped
from hypersd_jax.training import Controls, LossFunction, Turn, optimizer_controls
from hypersd_jax.weights.components import Components

STUDENT, HEADS = "student", "heads"
SEGMENTS = ("t_n", "t_prev", "t_b", "t_top", "count")
# What the step's key is folded with for dropped prompts: no sample's index comes near it.
DROPOUT_STREAM = 2**32 - 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepKind:
    """What is compiled into a step; stages of the same kind share it."""

    method: str
    from_previous: bool
    guided: bool
    drops: bool
    distance: str
    huber_c: float
    adversarial: JudgeKind | None
    accumulate: int
    beta1: float
    beta2: float
    weight_decay: float
    clip_norm: float


def step_kind(stage: ConsistencyStage, *, first: bool) -> StepKind:
    """The compiled part of a stage. The first stage's teacher is the base under both readings (`method`)."""
    return StepKind(
        method="tscd" if stage.kind == "tcd" else stage.kind,  # TCD is TSCD with one segment
        from_previous=stage.teacher == "previous" and not first,
        guided=stage.guidance != (1.0, 1.0),
        drops=stage.prompt_dropout > 0,
        distance=stage.distance,
        huber_c=stage.huber_c,
        adversarial=judge_kind(stage.adversarial),
        accumulate=stage.accumulate,
        beta1=stage.beta1,
        beta2=stage.beta2,
        weight_decay=stage.weight_decay,
        clip_norm=stage.clip_norm,
    )


def stage_controls(stage: ConsistencyStage, schedule: Schedule, grid_length: int) -> Controls:
    """The arrays that steer a stage; ``grid_length`` is the longest N of the run, so that all have one shape."""
    own = optimizer_controls(optimizer_config(stage), stage.updates)
    controls: Controls = {
        **own,
        "ema_decay": np.asarray(stage.ema, np.float32),
        **teacher_controls(stage.guidance, stage.solver_steps, stage.k, schedule, grid_length),
        "offset_noise": np.asarray(stage.offset_noise, np.float32),
        "prompt_dropout": np.asarray(stage.prompt_dropout, np.float32),
    }
    if stage.adversarial:
        theirs = dataclasses.replace(optimizer_config(stage), learning_rate=stage.adversarial.learning_rate)
        controls |= judge_controls(stage.adversarial)
        controls["distance_weight"] = np.asarray(stage.distance_weight, np.float32)
        controls["players"] = {STUDENT: own, HEADS: optimizer_controls(theirs, stage.updates)}
    return controls


def teacher_controls(
    guidance: tuple[float, float], solver_steps: int, k: int, schedule: Schedule, grid_length: int
) -> Controls:
    """The arrays of the teacher's step: its guidance's range, and the segments."""
    low, high = guidance
    return {
        "guidance_min": np.asarray(low, np.float32),
        "guidance_max": np.asarray(high, np.float32),
        **pad_segments(solver_steps, k, grid_length, schedule.num_train_timesteps),
    }


def frozen_tree(components: Components, uncond: Conditioning, scales: Any, teacher: Adapter | None) -> dict[str, Any]:
    """What the step reads and never changes: base UNet, unconditional row, LoRA scales, teacher's LoRA."""
    return {"unet": dict(components.params["unet"]), "uncond": uncond, "scales": scales, "teacher": teacher or {}}


def make_turns(components: Components, schedule: Schedule, kind: StepKind, judge: Judge) -> list[Turn]:
    """The turns of a round with discriminators: the heads' extra updates, then student and heads on one pair."""
    both = Turn(players=(STUDENT, HEADS), loss=make_loss(components, schedule, kind, judge))
    if judge.kind.updates == 1:
        return [both]
    extra = make_loss(components, schedule, kind, judge, heads_alone=True)
    return [Turn(players=(HEADS,), loss=extra, repeat=judge.kind.updates - 1), both]


def make_loss(
    components: Components,
    schedule: Schedule,
    kind: StepKind,
    judge: Judge | None = None,
    *,
    heads_alone: bool = False,
) -> LossFunction:
    """The stage's loss for `make_step`; the trainable tree is the student's LoRA factors, ``ema`` their average.

    With a judge the loss is for `make_round`: the trainable tree is by player, {"student", "heads"}. ``heads_alone``:
    of a turn in which the student stands still.
    """
    distance = mse if kind.distance == "mse" else pseudo_huber(kind.huber_c)

    def loss(
        trainable: Any, ema: Any, frozen: Any, batch: Any, key: jax.Array, controls: Controls
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        nets = Networks(components=components, base=frozen["unet"])
        student, average = (trainable, ema) if judge is None else (trainable[STUDENT], ema[STUDENT])
        rows = {**batch, "uncond": broadcast(frozen["uncond"], batch["cond"])}
        if kind.drops:
            dropped = _dropped(key, batch["places"], controls["prompt_dropout"])
            rows["cond"] = with_dropped(batch["cond"], rows["uncond"], dropped)
        extra = None
        if judge is not None:
            extra = consistency_judgement(
                judge,
                nets,
                trainable[HEADS],
                rows["cond"],
                key,
                batch["places"],
                controls,
                schedule,
                heads_alone=heads_alone,
            )
        value, metrics = consistency_loss(
            kind.method,
            nets.predictor(join(student, frozen["scales"])),
            nets.predictor(join(average, frozen["scales"]), counted=False),
            teacher_of(nets, kind.from_previous, kind.guided, frozen["teacher"], judge),
            rows,
            key,
            segments_of(controls),
            controls if not heads_alone else {**controls, "distance_weight": np.float32(0.0)},
            schedule=schedule,
            distance=distance,
            indices=batch["places"],
            extra=extra,
        )
        if heads_alone:
            assert judge is not None
            return value, {"heads_unet_calls": (metrics["target_calls"] + nets.calls) * (judge.kind.updates - 1)}
        metrics["unet_calls"] = metrics.pop("target_calls") + nets.calls
        return value, metrics

    return loss


def segments_of(controls: Controls) -> Mapping[str, Any]:
    """The part of the controls that `pad_segments` made."""
    return {name: controls[name] for name in SEGMENTS}


def teacher_of(nets: Networks, from_previous: bool, guided: bool, previous: Adapter, judge: Judge | None = None) -> Any:
    """The teacher of a consistency loss: the previous student, or the base, with guidance or without."""

    def unguided(x: jax.Array, t: jax.Array, cond: Conditioning, _uncond: Any, _guidance: Any) -> jax.Array:
        return nets.predictor(previous if from_previous else None)(x, t, cond)

    def with_guidance(x: jax.Array, t: jax.Array, cond: Conditioning, uncond: Any, guidance: Any) -> jax.Array:
        taps = judge.taps if judge is not None and judge.kind.features == "pair" else ()
        return nets.guided(x, t, cond, uncond, guidance, taps=taps)

    return with_guidance if guided and not from_previous else unguided


def _dropped(key: jax.Array, places: jax.Array, share: Any) -> jax.Array:
    """Which rows (B,) lose their caption; by (key, place) alone."""
    mine = jax.random.fold_in(key, DROPOUT_STREAM)
    return jax.vmap(lambda place: jax.random.uniform(jax.random.fold_in(mine, place)))(places) < share
