"""What there is to train in a stage that starts from the frozen base: state, step, frozen tree, controls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hypersd_jax import adapters
from hypersd_jax.adapters import Adapter
from hypersd_jax.conditioning import Conditioning
from hypersd_jax.config import BASE, PREVIOUS, AdapterStage, Config, ConsistencyStage, ScoreStage
from hypersd_jax.errors import UserError
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.stages import score, tscd
from hypersd_jax.stages.feeding import Inputs
from hypersd_jax.stages.judging import Judge, judge_kind, make_judge
from hypersd_jax.stages.loop import FAKE_STREAM, chosen, optimizer_config, stream
from hypersd_jax.stages.output import Output
from hypersd_jax.stages.pairs import Lead
from hypersd_jax.stages.prompt_feeding import PromptInputs
from hypersd_jax.training import (
    Controls,
    Step,
    StopSignals,
    TrainState,
    Turn,
    init_players,
    init_state,
    make_optimizer,
    make_round,
    make_step,
)

Factors = dict[str, dict[str, jax.Array]]


@dataclasses.dataclass(kw_only=True)
class Run:
    """What the stages of one run share."""

    config: Config
    output: Output
    mesh: Mesh
    pipe: Pipeline
    preview_prompts: tuple[str, ...]
    base_fingerprint: str
    uncond: Conditioning
    scales: dict[str, jax.Array]
    inputs: Inputs | None
    prompt_inputs: PromptInputs | None
    latent_shape: tuple[int, ...]
    steps: dict[Hashable, Step]
    stop: StopSignals = dataclasses.field(default_factory=StopSignals)

    @property
    def grid_length(self) -> int:
        """The longest solver grid of the run; shorter ones are padded to it."""
        return max((solver_steps(stage) for stage in self.config.adapter_stages), default=1)


def solver_steps(stage: AdapterStage) -> int:
    """The grid that a stage's consistency loss runs on; 1 where it has none."""
    if isinstance(stage, ConsistencyStage):
        return stage.solver_steps
    return stage.anchor.solver_steps if stage.anchor else 1


def teachers(stage: AdapterStage) -> set[str]:
    """What a stage of score distillation names as teachers: stages, or BASE and PREVIOUS."""
    if isinstance(stage, ConsistencyStage):
        return set()
    return {settings.teacher for settings in (stage.regression, stage.anchor) if settings}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One stage, ready to be trained; ``student`` takes what the stage hands on out of a state, ``lead`` leads to the
    regression's targets where they are computed before the stage."""

    state: TrainState
    make: Callable[[], Step]
    frozen: Any
    controls: Controls
    student: Callable[[TrainState], Any]
    lead: Lead | None = None


def check_stage(run: Run, stage: AdapterStage, before: Sequence[str]) -> None:
    """Refuse what does not fit this model or the stages ``before``; raises UserError beginning with the stage's key."""
    schedule = run.pipe.schedule
    stage_judge(run, stage)
    if isinstance(stage, ConsistencyStage):
        tscd.stage_controls(stage, schedule, run.grid_length)
        return
    score.score_controls(stage, schedule, dict(run.pipe.components.scheduler_config), run.grid_length)
    if stage.times[0] >= schedule.num_train_timesteps:
        raise UserError(f"times: {stage.times[0]} is not below the {schedule.num_train_timesteps} training times")
    for key in ("regression", "anchor"):
        settings = getattr(stage, key)
        if settings is None or settings.teacher == BASE or (settings.teacher == PREVIOUS and before):
            continue
        if settings.teacher not in before:
            named = ", ".join((BASE, PREVIOUS, *before)) if before else BASE
            raise UserError(f"{key}.teacher={settings.teacher!r}: only {named} can be it here")


def stage_judge(run: Run, stage: AdapterStage) -> Judge | None:
    """The stage's discriminator, if it has one: on the base's features, in score distillation on the fake model's."""
    kind = judge_kind(stage.adversarial)
    if kind is None:
        return None
    settings: dict[str, Any] = {"dtype": run.pipe.dtype, "remat": run.config.model.remat}
    return make_judge(run.pipe.components, kind, run.latent_shape, run.mesh, **settings)


def make_job(run: Run, index: int, stage: AdapterStage, start: Factors, students: Mapping[str, Factors]) -> Job:
    """Prepare a stage.

    Args:
        run: what the stages share.
        index: its place; 0 has no stage before it.
        stage: its settings.
        start: the previous student's factors, or fresh ones.
        students: those of earlier stages that a stage names as its teacher.
    """
    if isinstance(stage, ConsistencyStage):
        return _consistency_job(run, index, stage, start)
    return _score_job(run, index, stage, start, students)


def _consistency_job(run: Run, index: int, stage: ConsistencyStage, start: Factors) -> Job:
    components, schedule = run.pipe.components, run.pipe.schedule
    kind = tscd.step_kind(stage, first=index == 0)
    frozen_teacher = adapters.join(start, run.scales) if kind.from_previous else None
    frozen = tscd.frozen_tree(components, run.uncond, run.scales, frozen_teacher)
    controls = tscd.stage_controls(stage, schedule, run.grid_length)
    tx = make_optimizer(optimizer_config(stage))
    judge = stage_judge(run, stage)
    if judge is None:
        state = init_state(start, tx, run.mesh)

        def make() -> Step:
            loss = tscd.make_loss(components, schedule, kind)
            return make_step(loss, tx, state, frozen, mesh=run.mesh, accumulate=stage.accumulate)

        return Job(
            state=state,
            make=lambda: _shared(run, kind, make),
            frozen=frozen,
            controls=controls,
            student=lambda state: chosen(stage, state),
        )
    trainable = {tscd.STUDENT: start, tscd.HEADS: judge.heads.init(run.config.seed + index)}
    turns = tscd.make_turns(components, schedule, kind, judge)
    return _round_job(run, stage, kind, turns, trainable, frozen, controls)


def _score_job(run: Run, index: int, stage: ScoreStage, start: Factors, students: Mapping[str, Factors]) -> Job:
    components, schedule = run.pipe.components, run.pipe.schedule
    kind = score.score_kind(stage)
    before = adapters.join(start, run.scales)
    adapter_of: dict[str, Adapter | None] = {}
    for key in ("regression", "anchor"):
        settings = getattr(stage, key)
        if settings is not None and settings.teacher != BASE:
            earlier = start if settings.teacher == PREVIOUS else students[settings.teacher]
            adapter_of[key] = adapters.join(earlier, run.scales)
    frozen = score.score_frozen(components, run.uncond, run.scales, adapter_of)
    controls = score.score_controls(stage, schedule, dict(components.scheduler_config), run.grid_length)
    student: Any = start
    if kind.whole:
        masters = {path: leaf.astype(jnp.float32) for path, leaf in components.params["unet"].items()}
        student = adapters.merge(masters, before)
    trainable = {tscd.STUDENT: student}
    if kind.has_fake:
        trainable[score.FAKE], _ = fresh_factors(run, FAKE_STREAM, index)
    judge = stage_judge(run, stage)
    if judge is not None:
        trainable[tscd.HEADS] = judge.heads.init(run.config.seed + index)
    turns = score.make_score_turns(components, schedule, kind, judge, run.latent_shape)
    job = _round_job(run, stage, kind, turns, trainable, frozen, controls)
    if not kind.pairs:
        return job
    return dataclasses.replace(job, lead=score.make_lead(components, schedule, kind, controls, run.latent_shape))


def fresh_factors(run: Run, number: int, index: int) -> tuple[Factors, dict[str, jax.Array]]:
    """New LoRA factors on the 14-module list, whose output is zero, and their scales; from stream ``number``."""
    lora = run.config.lora
    key = stream(run.config.seed, number, index)
    adapter = adapters.init(key, run.pipe.components.unet.shapes, rank=lora.rank, alpha=lora.alpha)
    factors, scales = jax.tree.map(jnp.asarray, adapters.split(adapter))
    return factors, scales


def _round_job(
    run: Run,
    stage: AdapterStage,
    kind: Hashable,
    turns: list[Turn],
    trainable: dict[str, Any],
    frozen: Any,
    controls: Controls,
) -> Job:
    """A stage of several players, each with an optimizer of its own."""
    optimizers = {name: make_optimizer(optimizer_config(stage)) for name in trainable}
    state = init_players(trainable, optimizers, averaged=(tscd.STUDENT,), mesh=run.mesh)

    def make() -> Step:
        return make_round(turns, optimizers, state, frozen, mesh=run.mesh, accumulate=stage.accumulate)

    return Job(
        state=state,
        make=lambda: _shared(run, kind, make),
        frozen=frozen,
        controls=controls,
        student=lambda state: chosen(stage, state)[tscd.STUDENT],
    )


def _shared(run: Run, kind: Hashable, make: Callable[[], Step]) -> Step:
    """One compiled step for all stages of a kind."""
    if kind not in run.steps:
        run.steps[kind] = make()
    return run.steps[kind]
