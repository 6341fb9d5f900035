"""The training loop of one stage, whatever it trains: resume, step, log, save."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from hypersd_jax.config import LogConfig, StageConfig
from hypersd_jax.errors import Interrupted, Terminated, UserError
from hypersd_jax.training.agreement import LAG, Agreement
from hypersd_jax.training.checkpoints import Checkpointer, check_metadata
from hypersd_jax.training.guard import STOPPED, Guard, Watch
from hypersd_jax.training.logging import MetricsLog
from hypersd_jax.training.shardings import abstract
from hypersd_jax.training.skips import SkipWatch
from hypersd_jax.training.state import TrainState
from hypersd_jax.training.step import Step
from hypersd_jax.training.stopping import StopSignals

SKIPPED_ROW = "skipped_in_a_row"
"""Metadata key of a checkpoint: how many skipped steps its state ends with."""


def require_even(stage: StageConfig, mesh: jax.sharding.Mesh) -> None:
    """Refuse (UserError) a stage whose micro-batches cannot be split evenly over the devices."""
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
    metadata: Callable[[int], dict[str, Any]],
    log: LogConfig,
    step: Step,
    frozen: Any,
    batches: Callable[[int], Iterator[tuple[int, Any, float]]],
    key: jax.Array,
    preview: Callable[[TrainState, int], None],
    mesh: jax.sharding.Mesh,
    stop: StopSignals,
    watch: Watch | None = None,
) -> tuple[TrainState, int]:
    """Resume from the newest checkpoint and take the stage's training steps to the last one.

    A signal that asks the run to stop ends it after the current step, with a checkpoint.

    Args:
        stage: its length is read here.
        state: the state before the first step, donated.
        root: the run's folder, for the metrics.
        folder: of the stage's checkpoints.
        metadata: (the stage's number of updates) -> metadata of its checkpoints; one that was saved when the stage was
            shorter or longer may be resumed too.
        log: how often to log, save and sample.
        step: the training step; compiled only if there is a step to do.
        frozen: what the step reads and never changes.
        batches: (finished steps) -> (step from 1, batch, seconds of data loading) from the next step on.
        key: of the stage's randomness.
        preview: samples with a state after a step that is not the last.
        mesh: of the state.
        stop: the signals that have come.
        watch: measures states on the way, and may end the stage, which then has the best of them.

    Returns:
        (the state after the last step, or the best where the stage was ended; how many steps had been done before).

    Raises:
        UserError: the checkpoint is another run's, too many steps in a row were not finite, or the disk is full.
    """
    with contextlib.ExitStack() as opened:
        checkpoints = opened.enter_context(Checkpointer(folder))
        row, like = 0, abstract(mesh, state)
        if checkpoints.latest() is not None:
            found = checkpoints.metadata()
            check_metadata(found, metadata(saved_updates(found, stage.updates)))
            row = int(found.get(SKIPPED_ROW, 0))
            # The caller still holds it: without this, two states would be in memory for the whole stage.
            jax.tree.map(lambda leaf: leaf.delete(), state)
            state, _ = checkpoints.restore(None, like)
            if STOPPED in found:
                return state, stage.updates
        done = int(state.step)
        stop.where = _where(stage, done, done)
        if done >= stage.updates:
            return state, done
        loaded = batches(done)
        skips = SkipWatch(
            stage.name,
            updates=stage.updates,
            limit=log.stop_after_skipped,
            remedy=f"lower stages.{stage.name}.learning_rate ({stage.learning_rate:g})",
            skipped=int(state.skipped),
            in_a_row=row,
        )
        agreement, clock = Agreement(), _Clock(log.checkpoint_minutes)
        guard = Guard(watch, folder / "best", updates=stage.updates) if watch else None
        if guard:
            opened.enter_context(guard)
        saved = made = done
        with MetricsLog(root, stage.updates, stage.name, done, tensorboard=log.tensorboard) as metrics_log:

            def save() -> None:
                nonlocal saved
                metrics_log.flush()
                skips.settle()
                checkpoints.save(made, state, {**metadata(stage.updates), SKIPPED_ROW: skips.in_a_row})
                saved = made
                clock.restart()

            def ended() -> bool:
                """Tell whether the guard ends the stage, whose last checkpoint then has the best state."""
                nonlocal state
                assert guard is not None
                facts = metadata(stage.updates)
                reason = guard.settle(made, state, facts)
                if reason is None:
                    return False
                if jax.process_index() == 0:
                    print(f"{stage.name}: stopped after update {made} of {stage.updates}: {reason}", file=sys.stderr)
                state = guard.best(like)
                # Under the number of the last step, for the stage is finished.
                checkpoints.save(stage.updates, state, {**facts, SKIPPED_ROW: 0, STOPPED: reason})
                return True

            if guard and guard.is_due(done):
                watched = guard.measure(state)
                if not done:
                    metrics_log.write(0, watched)
                if ended():
                    checkpoints.wait()
                    return state, done
            if jax.process_count() > 1:
                stop.hold()  # to the end: no process may leave before the others know
            try:
                for number, batch, data_loading_seconds in loaded:
                    if number > done + 1:  # the first one compiles, for minutes, and there is nothing new to save
                        stop.hold()
                    state, metrics = step(state, frozen, batch, key, stage)
                    stop.hold()
                    made, last = number, number == stage.updates
                    stop.where = _where(stage, made, done)
                    skips.add(number, metrics["skipped"])
                    watched = guard.measure(state) if guard and guard.is_due(number) else {}
                    if number % log.every == 0 or last or watched:
                        metrics_log.write(number, {**metrics, **watched, "input_wait": data_loading_seconds})
                    signalled, due = agreement.largest(stop.signal or 0, clock.due())
                    if number % log.checkpoint_every == 0 or last or watched or (due and number - saved > LAG):
                        save()
                    if watched and ended():
                        break
                    if signalled:
                        raise stop.error(signalled)
                    if jax.process_count() == 1:
                        stop.release()
                    if log.sample_every and number % log.sample_every == 0 and not last:
                        preview(state, number)
            except (Interrupted, Terminated):
                stop.hold()
                if made > saved:
                    save()
                checkpoints.wait()
                raise
        checkpoints.wait()
        stop.release()
        return state, done


class _Clock:
    """A clock for checkpoints that are due by time; of several processes the first one's counts."""

    def __init__(self, minutes: float) -> None:
        self._seconds = minutes * 60
        self.restart()

    def restart(self) -> None:
        self._last = time.monotonic()

    def due(self) -> bool:
        return bool(self._seconds) and jax.process_index() == 0 and time.monotonic() - self._last >= self._seconds


def _where(stage: StageConfig, made: int, done: int) -> str:
    new = "" if made > done or made == stage.updates else ", with nothing new to save"
    return f"at {made} of {stage.updates} of {stage.name}{new}; the same command resumes there"


def saved_updates(found: Mapping[str, Any], updates: int) -> int:
    """Return how many updates the stage had when a checkpoint with this metadata was saved."""
    settings = found.get("settings")
    saved = settings.get("updates") if isinstance(settings, Mapping) else None
    return saved if isinstance(saved, int) and saved > 0 else updates
