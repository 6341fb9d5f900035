"""The updates of one stage, whatever it trains: resume, step, log, save."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hypersd_jax.config import LogConfig, StageConfig
from hypersd_jax.errors import UserError
from hypersd_jax.training import (
    Checkpointer,
    MetricsLog,
    OptimizerConfig,
    Step,
    TrainState,
    abstract,
    check_facts,
)

# The streams of randomness of a run, told apart by what is folded into the seed's key.
ADAPTER_STREAM, NOISE_STREAM, ENCODER_STREAM, FAKE_STREAM, PAIR_STREAM = range(5)


def optimizer_config(stage: StageConfig) -> OptimizerConfig:
    """The stage's optimizer settings."""
    return OptimizerConfig(
        learning_rate=stage.learning_rate,
        warmup_steps=stage.warmup,
        schedule=stage.schedule,
        beta1=stage.beta1,
        beta2=stage.beta2,
        weight_decay=stage.weight_decay,
        clip_norm=stage.clip_norm,
    )


def require_even(stage: StageConfig, mesh: jax.sharding.Mesh) -> None:
    """UserError unless every micro-batch of the stage can be dealt out evenly to the devices."""
    if stage.batch_size % (stage.accumulate * mesh.size):
        raise UserError(
            f"stages.{stage.name}.batch_size={stage.batch_size} must be a multiple of accumulate ({stage.accumulate}) "
            f"times the number of devices ({mesh.size})"
        )


def run_updates(
    stage: StageConfig,
    state: TrainState,
    *,
    root: Path,
    folder: Path,
    facts: dict[str, Any],
    log: LogConfig,
    make: Callable[[], Step],
    frozen: Any,
    batches: Callable[[int], Iterator[tuple[int, Any, float]]],
    key: jax.Array,
    controls: Any,
    preview: Callable[[TrainState, int], None],
    mesh: jax.sharding.Mesh,
) -> tuple[TrainState, int]:
    """Go on from the newest checkpoint to the stage's last update.

    Args:
        stage: its length is read here.
        state: the state before the first update, donated.
        root: the run's folder, for the metrics.
        folder: of the stage's checkpoints.
        facts: what a checkpoint must agree with to be gone on from.
        log: how often to log, save and draw.
        make: the compiled step; called only if there is an update to do.
        frozen: what the step reads and never changes.
        batches: (finished updates) -> (update number from 1, batch, seconds waited for it) from the next update on.
        key: of the stage's randomness.
        controls: the stage's arrays.
        preview: draws with a state after an update, on the way.
        mesh: of the state.

    Returns:
        (the state after the last update, how many updates had been done before).
    """
    with Checkpointer(folder) as checkpoints:
        if checkpoints.latest() is not None:
            check_facts(checkpoints.facts(), facts)
            like = abstract(mesh, state)
            # The caller still holds it: without this, two states would be in memory for the whole stage.
            jax.tree.map(lambda leaf: leaf.delete(), state)
            state, _ = checkpoints.restore(None, like)
        done = int(state.step)
        if done >= stage.updates:
            return state, done
        step, fed = make(), batches(done)
        with MetricsLog(root, stage.updates, stage.name, done, tensorboard=log.tensorboard) as metrics_log:
            for number, batch, waited in fed:
                state, metrics = step(state, frozen, batch, key, controls)
                last = number == stage.updates
                if number % log.every == 0 or last:
                    metrics_log.write(number, {**metrics, "input_wait": waited})
                if number % log.checkpoint_every == 0 or last:
                    metrics_log.flush()
                    checkpoints.save(number, state, facts)
                if log.sample_every and number % log.sample_every == 0 and not last:
                    preview(state, number)
        return state, done


def chosen(stage: StageConfig, state: TrainState) -> Any:
    """What the stage hands on: the moving average of the weights, or the weights."""
    return state.ema if stage.export == "ema" else state.trainable


def process_rows(rows: int, micro: int) -> np.ndarray:
    """The places (A, B') in a global batch (A, B) that this process loads: its own part of each micro-batch."""
    places = np.arange(rows).reshape(micro, -1)
    share = places.shape[1] // jax.process_count()
    first = jax.process_index() * share
    return places[:, first : first + share]


def stream(seed: int, stream: int, index: int) -> jax.Array:
    """The key of one stream of a run's randomness, for the stage at this place."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), index)
