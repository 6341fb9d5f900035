"""A training step's work, counted from its trace: UNet calls as the step counts them, and floating-point operations."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hypersd_jax.config import StageConfig
from hypersd_jax.planning.opening import StageShapes, without_measuring
from hypersd_jax.planning.work import flops_of
from hypersd_jax.stages.batch_shapes import MicroBatch
from hypersd_jax.stages.context import Run
from hypersd_jax.stages.kinds import kind_of
from hypersd_jax.training import Phase

MANY = 64
"""Samples of the micro-batch that calls are counted on, and random keys: with few samples a step that spares the
target's call may be drawn, which large batches never do."""


def micro_batch(run: Run, stage: StageConfig, size: int) -> MicroBatch | None:
    """Describe a stage's micro-batch of so many samples; None where its kind does not say."""
    shapes: Any = getattr(kind_of(stage), "batch_shapes", None)
    found: MicroBatch | None = None if shapes is None else shapes(run, stage, size)
    return found


def calls_of(
    run: Run, stage: StageConfig, shapes: StageShapes, batch: Mapping[str, Any], mesh: Mesh
) -> tuple[float, float] | None:
    """Count the denoiser's forward calls of a training step, a sample: the fewest and the most; None if none is told.

    They are what the step itself reports in ``metrics.jsonl`` ("calls", "fake_calls", "discriminator_calls"): a call
    that stops at the middle block is 1/2, and both halves of guidance are 2. Of these numbers alone the losses are
    compiled, with all that the networks compute left out, and evaluated for `MANY` keys.

    Args:
        run: from `open_abstract`.
        stage: one of its stages.
        shapes: of the stage.
        batch: shapes of a micro-batch of `MANY` samples.
        mesh: that the networks are traced for.
    """
    found = []
    for phase in _phases(run, stage):
        reported = jax.jit(functools.partial(_reported_calls, phase, shapes, batch))
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            counts = [reported(jax.random.key(seed)) for seed in range(MANY)]
        if counts[0] is not None:
            found.append((float(min(counts)), float(max(counts))))
    return (sum(low for low, _ in found), sum(high for _, high in found)) if found else None


def _reported_calls(phase: Phase, shapes: StageShapes, batch: Mapping[str, Any], key: jax.Array) -> jax.Array | None:
    """Sum the calls that a loss reports, on arrays of zeros but for the tables that are known."""

    def filled(leaf: Any) -> Any:
        return jnp.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf

    state = shapes.state
    models, ema, frozen, values = jax.tree.map(filled, (state.trainable, state.ema, shapes.frozen, dict(batch)))
    values["indices"] = jnp.arange(len(values["indices"]))  # each sample draws its own
    _, metrics = phase.loss(models, ema, frozen, values, key)
    counts = [jnp.asarray(value) for name, value in metrics.items() if name.endswith("calls")]
    return functools.reduce(jnp.add, counts) if counts else None


def step_flops(run: Run, stage: StageConfig, shapes: StageShapes, batch: Mapping[str, Any], mesh: Mesh) -> float:
    """Count the operations of a training step on all devices: every phase's loss and gradient, on all micro-batches.

    Args:
        run, stage, shapes, mesh: as of `calls_of`.
        batch: shapes of one of the stage's micro-batches.

    Raises:
        NotCounted: see `work.flops_of`.
    """
    total = 0.0
    key = jax.eval_shape(lambda: jax.random.key(0))
    for phase in _phases(run, stage):

        def both(models: Any, ema: Any, frozen: Any, values: Any, key: jax.Array, phase: Phase = phase) -> Any:
            def loss_of(trained: Any) -> Any:
                return phase.loss({**models, **trained}, ema, frozen, values, key)

            return jax.value_and_grad(loss_of, has_aux=True)({name: models[name] for name in phase.models})

        state = shapes.state
        arrays = (state.trainable, state.ema, shapes.frozen, dict(batch), key)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            once = flops_of(both, *arrays, loop_steps=phase.loop_steps)
        total += once * phase.repeats * stage.accumulate
    return total


def encoding_flops(run: Run, batch: MicroBatch, mesh: Mesh) -> float:
    """Count the operations, a sample, of what is encoded before the step: the image, the caption."""
    base = run.base
    total = 0.0
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        if batch.encodes_images:
            image = jax.ShapeDtypeStruct((1, base.image_side, base.image_side, 3), jnp.float32)
            total += flops_of(base.posterior, dict(base.params[base.autoencoder]), image)
        if batch.encodes_texts:
            params = {name: dict(base.params[name]) for name in base.text_encoders}
            ids = tuple(np.asarray(each) for each in base.prompts.tokenize([""]))
            total += flops_of(base.encode_prompts, params, ids)
    return total


def _phases(run: Run, stage: StageConfig) -> Sequence[Phase]:
    return kind_of(stage).phases(run.base, without_measuring(stage))
