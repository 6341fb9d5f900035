"""Shared by score distillation and regression: a student's own samples, regression and consistency regulariser."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hypersd_jax import distill
from hypersd_jax.adapters import Adapter, concatenate, join
from hypersd_jax.bases import Networks, in_one_call, in_one_loop
from hypersd_jax.config import BASE, PREVIOUS, GeneratorStage
from hypersd_jax.diffusion import solver_table
from hypersd_jax.distill import (
    Drawn,
    Model,
    Sample,
    Segments,
    Trajectory,
    draw_trajectory,
    endpoint,
    endpoint_and_calls,
    frozen_sample,
    mse,
    path_loss,
)
from hypersd_jax.errors import UserError
from hypersd_jax.inputs.batches import LoadedBatch, Reading, nothing
from hypersd_jax.inputs.ode_pairs import make_ode_pairs, repeat_batches
from hypersd_jax.stages import adapter_student
from hypersd_jax.stages.batch_shapes import MicroBatch, conditioned
from hypersd_jax.stages.consistency import segments_of
from hypersd_jax.stages.context import Run
from hypersd_jax.stages.kinds import STUDENT, naming
from hypersd_jax.stages.regulariser import SolverStep, begin_step, regulariser_loss
from hypersd_jax.stages.streams import Stream, stream
from hypersd_jax.training import Metrics


class Tables(NamedTuple):
    """Arrays derived from a stage's settings."""

    regression_times: Any = None  # (steps,) int32, of the many-step teacher
    path_bounds: Any = None  # (2,) int32, range of the second point's timestep
    segments: Segments | None = None  # of the consistency regulariser


class Frozen(NamedTuple):
    """Arrays that the training step reads and never changes."""

    weights: Any
    uncond: Any  # of one sample
    scales: Any  # of the LoRAs' factors
    regression: Adapter  # the regression's teacher, empty where it is the base
    regulariser: Adapter  # the consistency regulariser's teacher, likewise
    tables: Tables
    bounds: Any = None  # (2,) int32, the times that samples are noised to
    fake_bounds: Any = None  # likewise, for the fake score model
    fake_scales: Any = None  # of the fake score model's factors
    under: Adapter | None = None  # on the base beneath the student's factors
    feedback: Any = None  # what the rewards' term reads
    structure: Any = None  # parameters of the structure term's network


def check(run: Run, stage: GeneratorStage, earlier: Sequence[str]) -> None:
    """Refuse what does not fit the model or the earlier stages."""
    adapter_student.check(run)
    with naming(f"stages.{stage.name}"):
        _check(run, stage, earlier)


def _check(run: Run, stage: GeneratorStage, earlier: Sequence[str]) -> None:
    tables(run, stage)
    last = run.base.schedule.num_train_timesteps
    if stage.times[0] >= last:
        raise UserError(f"times: {stage.times[0]} is not below the {last} training times")
    for key, settings in (("regression", stage.regression), ("anchor", stage.anchor)):
        if settings is None or settings.teacher == BASE or (settings.teacher == PREVIOUS and run.has_student(earlier)):
            continue
        if settings.teacher not in earlier:
            named = ", ".join((BASE, PREVIOUS, *earlier)) if run.has_student(earlier) else BASE
            raise UserError(f"{key}.teacher={settings.teacher!r}: only {named} can be it here")


def tables(run: Run, stage: GeneratorStage) -> Tables:
    """Compute the arrays of a stage."""
    found = Tables()
    if stage.regression:
        config = dict(run.base.scheduler_config)
        with naming("regression"):
            table = solver_table("ddim", stage.regression.steps, eta=0.0, scheduler_config=config)
        found = found._replace(
            regression_times=np.asarray(table["timesteps"], np.int32),
            path_bounds=times_between(run, stage.regression.path_range),
        )
    if stage.anchor:
        with naming("anchor"):
            found = found._replace(segments=segments_of(run, stage.anchor.solver_steps, stage.anchor.k))
    return found


def times_between(run: Run, shares: tuple[float, float]) -> np.ndarray:
    """Compute a range of timesteps (2,) int32 from shares of the last one."""
    last = run.base.schedule.num_train_timesteps - 1
    return np.asarray([round(share * last) for share in shares], np.int32)


def frozen(run: Run, stage: GeneratorStage) -> Frozen:
    """Collect what the training step of either kind reads."""
    return Frozen(
        weights=run.base.weights,
        uncond=run.uncond,
        scales=run.scales,
        regression=run.teacher(stage.regression.teacher) if stage.regression else {},
        regulariser=run.teacher(stage.anchor.teacher) if stage.anchor else {},
        tables=tables(run, stage),
    )


def first_student(run: Run, stage: GeneratorStage) -> Any:
    """Return the student before the first step: LoRA factors, or in full fine-tuning the UNet with them merged in."""
    return run.base.masters(run.teacher(PREVIOUS)) if stage.exports_model else run.student


def batches(
    run: Run, index: int, stage: GeneratorStage, frozen: Frozen, done: int, read: Reading = nothing
) -> Iterator[LoadedBatch]:
    """Load batches {"cond", "indices"}, "latents" where images are read, and "noise" and "endpoint" of ODE pairs.

    They also hold what ``read`` makes of the samples.
    """
    if stage.regression is None or not stage.regression.paired:
        return _batches(run, index, stage, done, read)
    return _paired_batches(run, index, stage, frozen, done, read)


def _paired_batches(
    run: Run, index: int, stage: GeneratorStage, frozen: Frozen, done: int, read: Reading
) -> Iterator[LoadedBatch]:
    """Compute the ODE pairs of the stage's first batches, and repeat these batches."""
    assert stage.regression is not None
    few = dataclasses.replace(stage, updates=stage.regression.pairs // stage.batch_size)
    key, order = jax.random.split(stream(run.config.seed, Stream.ODE_PAIR, index))

    def rollout(frozen: Frozen, noise: jax.Array, cond: Any) -> jax.Array:
        return regression_endpoint(Networks(base=run.base, weights=frozen.weights), stage, frozen, noise, cond)

    settings: dict[str, Any] = {"batches": few.updates, "latent_shape": run.base.latent_shape, "mesh": run.mesh}
    pairs = make_ode_pairs(_batches(run, index, few, 0, read), rollout, frozen, key=key, name=stage.name, **settings)
    yield from repeat_batches(pairs, updates=stage.updates, done=done, key=order)


def _batches(run: Run, index: int, stage: GeneratorStage, done: int, read: Reading = nothing) -> Iterator[LoadedBatch]:
    before = run.images_before(index)
    if not stage.reads_images:
        assert run.prompt_inputs is not None
        return run.prompt_inputs.prompted(stage, before=before, done=done, read=read)
    assert run.inputs is not None
    key = stream(run.config.seed, Stream.ENCODER, index)
    return run.inputs.conditioned(stage, before=before, done=done, key=key, read=read)


def batch_shapes(run: Run, stage: GeneratorStage, size: int, read: Reading = nothing) -> MicroBatch:
    """Describe a micro-batch, with the ODE pairs and what ``read`` makes of the samples."""
    found = conditioned(run, size, images=stage.reads_images, read=read)
    if stage.regression is None or not stage.regression.paired:
        return found
    latents = jax.ShapeDtypeStruct((size, *run.base.latent_shape), jnp.float32)
    return found.holding({"noise": latents, "endpoint": latents})


def predictor(nets: Networks, stage: GeneratorStage, weights: Any, frozen: Frozen) -> Model:
    """Return the student's prediction function, from LoRA factors or the weights of a fully fine-tuned UNet."""
    if stage.exports_model:
        return nets.predictor(weights=weights)
    own = join(weights, frozen.scales)
    return nets.predictor(concatenate([frozen.under, own]) if frozen.under else own)


def guided_base(nets: Networks, stage: GeneratorStage, frozen: Frozen) -> tuple[Model, float]:
    """Return the base under the stage's guidance, and count the calls that it takes."""
    if not stage.guided:
        return nets.predictor(), 1.0

    def predict(x: jax.Array, t: jax.Array, cond: Any) -> jax.Array:
        guidance = jnp.broadcast_to(stage.guidance, t.shape)
        return nets.guided(x, t, cond, nets.base.unconditional(frozen.uncond, cond), guidance)[0]

    return predict, 2.0


def fake_sample(
    nets: Networks, stage: GeneratorStage, models: Any, frozen: Frozen, batch: Any, key: jax.Array
) -> tuple[Drawn, Sample]:
    """Draw the randomness and the student's sample without gradient, for a fake-score step."""
    drawn, student = draws(nets, stage, batch, key), _frozen_student(nets, stage, models, frozen)
    return drawn, frozen_sample(student, batch["cond"], drawn, _trajectory(nets, stage, frozen.fake_bounds))


def student_sample(
    nets: Networks, stage: GeneratorStage, models: Any, frozen: Frozen, batch: Any, key: jax.Array
) -> tuple[Drawn, Sample, SolverStep | None]:
    """Draw the randomness, the student's sample, and the regulariser's solver step with the student's prediction.

    The sample starts from the batch's noise where it has some. A solver step on images depends on no sample, so the
    student's last call computes it too; one on the student's own samples is another call.
    """
    drawn = draws(nets, stage, batch, key)
    if "noise" in batch:
        drawn = drawn._replace(noise=batch["noise"])
    student = predictor(nets, stage, models[STUDENT], frozen)

    def begin(latents: jax.Array) -> SolverStep | None:
        if frozen.tables.segments is None:
            return None
        return begin_step(frozen.tables.segments, latents, stage.guidance, batch, key, nets.base.schedule)

    solver_step = begin(batch["latents"]) if stage.reads_images else None

    def last_step(*inputs: Any) -> tuple[jax.Array, list[jax.Array]]:
        output, *others = in_one_call(student, inputs, *([solver_step.inputs] if solver_step else []))
        return output, others

    frozen_student, trajectory = _frozen_student(nets, stage, models, frozen), _trajectory(nets, stage, frozen.bounds)
    sample, others = distill.student_sample(last_step, frozen_student, batch["cond"], drawn, trajectory)
    if not stage.reads_images and (solver_step := begin(jax.lax.stop_gradient(sample.x0))):
        others = [student(*solver_step.inputs)]
    return drawn, sample, solver_step._replace(student=others[0]) if solver_step else None


def _frozen_student(nets: Networks, stage: GeneratorStage, models: Any, frozen: Frozen) -> Model:
    return predictor(nets, stage, jax.lax.stop_gradient(models[STUDENT]), frozen)


def draws(nets: Networks, stage: GeneratorStage, batch: Any, key: jax.Array) -> Drawn:
    """Draw the random numbers of the student's samples."""
    latents = batch["latents"].shape[1:] if stage.reads_images else nets.base.latent_shape
    shape, steps = (batch["indices"].shape[0], *latents), len(stage.times)
    return draw_trajectory(key, shape, steps, batch["indices"], last=stage.gradient_steps)


def earlier_steps(stage: GeneratorStage) -> float:
    """Compute the mean number of the student's steps before the one that carries the gradient (`draws`)."""
    return mean_before(len(stage.times), stage.gradient_steps)


def mean_before(steps: int, last: int) -> float:
    """Compute the mean number of steps before one that is chosen from the ``last`` of so many ``steps``."""
    return steps - (last + 1) / 2


def _trajectory(nets: Networks, stage: GeneratorStage, bounds: Any) -> Trajectory:
    """Describe the student's steps, and the range of timesteps that its samples are noised to; without any, none is."""
    return Trajectory(
        times=jnp.asarray(stage.times),
        bounds=jnp.zeros(2, jnp.int32) if bounds is None else jnp.asarray(bounds),
        schedule=nets.base.schedule,
        deterministic=stage.deterministic,
    )


def regression_endpoint(
    nets: Networks, stage: GeneratorStage, frozen: Frozen, noise: jax.Array, cond: Any
) -> jax.Array:
    """Roll the regression's teacher out from noise to its endpoint x_0 (B, h, w, C), without gradient."""
    assert stage.regression is not None
    model = guided_base(nets, stage, frozen)[0] if stage.regression.from_base else nets.predictor(frozen.regression)
    times = jnp.asarray(frozen.tables.regression_times)
    return endpoint(model, noise, cond, times, schedule=nets.base.schedule)


def base_calls(
    nets: Networks, stage: GeneratorStage, frozen: Frozen, noise: jax.Array, cond: Any, calls: Sequence[Any]
) -> tuple[list[jax.Array], jax.Array | None]:
    """Call the guided base, in one loop with the regression's rollout where that is the base's too.

    Args:
        nets, stage, frozen: the step's.
        noise, cond: where the rollout begins, and its conditioning.
        calls: arguments of each call, of equal structure and shapes.

    Returns:
        (the prediction of each call, without gradient; the rollout's endpoint, None where it is not computed).
    """
    model, regression = guided_base(nets, stage, frozen)[0], stage.regression
    if regression is None or regression.paired or not regression.from_base:
        return in_one_loop(model, *calls), None
    times = jnp.asarray(frozen.tables.regression_times)
    target, found = endpoint_and_calls(model, noise, cond, times, calls, schedule=nets.base.schedule)
    return found, target


def adapter_call(
    nets: Networks, stage: GeneratorStage, frozen: Frozen, noise: jax.Array, adapter: Adapter, call: Any
) -> tuple[jax.Array, jax.Array | None]:
    """Call the base under an adapter as in `base_calls`: with the rollout of a teacher whose adapter has its shapes.

    Both have the conditioning of ``call``, (x, t, cond).
    """
    (x, t, cond), regression = call, stage.regression

    def model(x: jax.Array, t: jax.Array, given: tuple[Any, Adapter]) -> jax.Array:
        return nets.predictor(given[1])(x, t, given[0])

    alike = jax.tree.map(jnp.shape, adapter) == jax.tree.map(jnp.shape, frozen.regression)
    if regression is None or regression.paired or regression.from_base or not alike:
        return model(x, t, (cond, adapter)), None
    times = jnp.asarray(frozen.tables.regression_times)
    target, (found,) = endpoint_and_calls(
        model, noise, (cond, frozen.regression), times, [(x, t, (cond, adapter))], schedule=nets.base.schedule
    )
    return found, target


def regression_term(
    nets: Networks,
    stage: GeneratorStage,
    student: Model,
    frozen: Frozen,
    batch: Any,
    drawn: Drawn,
    sampled: Sample,
    target: jax.Array | None,
) -> tuple[jax.Array, Metrics, float]:
    """Compute the weighted distance to the teacher's endpoint, its metrics, and the calls that it takes.

    ``target`` is that endpoint where it is known.
    """
    config, cond = stage.regression, batch["cond"]
    assert config is not None
    calls = 0.0
    if config.paired:
        target = batch["endpoint"]
    else:
        calls = config.steps * (2.0 if config.from_base and stage.guided else 1.0)
        if target is None:
            target = regression_endpoint(nets, stage, frozen, drawn.noise, cond)
    metrics = {"regression": jnp.mean(mse(sampled.x0, target))}
    loss = config.weight * metrics["regression"]
    if config.follows_path:
        bounds, start = jnp.asarray(frozen.tables.path_bounds), jnp.asarray(stage.times)[0]
        metrics["path"] = path_loss(student, sampled, drawn, target, cond, start, bounds, schedule=nets.base.schedule)
        loss = loss + config.path_weight * metrics["path"]
        calls += 1.0
    return loss, metrics, calls


def regulariser_term(
    nets: Networks, stage: GeneratorStage, ema: Any, frozen: Frozen, solver_step: SolverStep
) -> tuple[jax.Array, Metrics, jax.Array]:
    """Compute the weighted consistency regulariser, its metrics, and its calls, the student's included."""
    assert stage.anchor is not None
    if frozen.regulariser:
        teacher_fn, teacher_calls = nets.predictor(frozen.regulariser), 1.0
    else:
        teacher_fn, teacher_calls = guided_base(nets, stage, frozen)
    if solver_step.teacher is None:
        solver_step = solver_step._replace(teacher=teacher_fn(*solver_step.inputs))
    loss, target_calls = regulariser_loss(solver_step, predictor(nets, stage, ema[STUDENT], frozen), nets.base.schedule)
    return stage.anchor.weight * loss, {"anchor": loss}, 1.0 + teacher_calls + target_calls


def teacher_terms(
    nets: Networks,
    stage: GeneratorStage,
    models: Any,
    ema: Any,
    frozen: Frozen,
    batch: Any,
    drawn: Drawn,
    sampled: Sample,
    solver_step: SolverStep | None,
    target: jax.Array | None = None,
) -> tuple[list[jax.Array], Metrics, jax.Array]:
    """Compute the terms of regression and consistency regulariser, where the stage has them, metrics and calls.

    ``target`` is the regression's where it is known.
    """
    terms: list[jax.Array] = []
    metrics = Metrics()
    calls = jnp.float32(0.0)
    if stage.regression is not None:
        student = predictor(nets, stage, models[STUDENT], frozen)
        term, more, cost = regression_term(nets, stage, student, frozen, batch, drawn, sampled, target)
        terms, metrics, calls = [*terms, term], metrics | more, calls + cost
    if solver_step is not None:
        term, more, spent = regulariser_term(nets, stage, ema, frozen, solver_step)
        terms, metrics, calls = [*terms, term], metrics | more, calls + spent
    return terms, metrics, calls
