"""Measure the first updates of every stage on this machine, in a temporary folder."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from hypersd_jax.compilation import use_compilation_cache
from hypersd_jax.config import Config
from hypersd_jax.errors import UserError
from hypersd_jax.planning.opening import pass_on
from hypersd_jax.stages.context import Run
from hypersd_jax.stages.kinds import STUDENT, exported_weights, kind_of
from hypersd_jax.stages.opening import open_run
from hypersd_jax.stages.run import check_stages
from hypersd_jax.stages.streams import Stream, stream
from hypersd_jax.training import init_state
from hypersd_jax.training.output import Output
from hypersd_jax.weights.placement import place


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timed:
    """Wall-clock seconds of a stage's updates here; previews, checkpoints and the comparison are not among them.

    Attributes:
        first: of the first update, which compiles the step and loads its first batch.
        each: of one of those after it, data loading included.
        updates: how many were measured.
    """

    first: float
    each: float
    updates: int


def time_updates(config: Config, updates: int) -> dict[str, Timed]:
    """Train every stage for one update and ``updates`` more, each from the student of the one before.

    The run's own folder is not touched. ODE pairs and margins are computed before a stage's first update, as in a run,
    and are not in its time; of ODE pairs there are no more than these updates read.

    Returns:
        By the stage's name.

    Raises:
        UserError: what the run itself would refuse.
    """
    if config.distributed.address is not None:
        raise UserError("--timed-updates: measures this process alone; leave distributed.coordinator out")
    config = _shortened(config, updates + 1)
    if config.log.compilation_cache:
        use_compilation_cache()
    with tempfile.TemporaryDirectory(prefix="hypersd_jax-") as folder:
        run = open_run(config, Output(Path(folder)))
        check_stages(run)
        return {stage.name: _time_stage(run, index, updates) for index, stage in enumerate(config.active_stages)}


def _time_stage(run: Run, index: int, updates: int) -> Timed:
    stage: Any = run.config.active_stages[index]
    kind = kind_of(stage)
    frozen = place(run.mesh, kind.frozen(run, stage))
    state = init_state(kind.trainable(run, index, stage), stage, averaged=(STUDENT,), mesh=run.mesh)
    key = stream(run.config.seed, Stream.NOISE, index)
    loaded = kind.batches(run, index, stage, frozen, 0)
    stamps = [time.perf_counter()]
    for number, batch, _ in loaded:
        state, metrics = run.step(state, frozen, batch, key, stage)
        if number in (1, updates + 1):  # in between the devices run on, as they do in training
            jax.block_until_ready((state, metrics))
            stamps.append(time.perf_counter())
    if run.config.adapter_stages:
        pass_on(run, stage, exported_weights(stage, state))
    begin, compiled, end = stamps
    return Timed(first=compiled - begin, each=(end - compiled) / updates, updates=updates)


def _shortened(config: Config, updates: int) -> Config:
    """Return the configuration with stages of so many updates, and no more ODE pairs than they read."""
    stages = []
    for stage in config.stages:
        changes: dict[str, Any] = {"updates": updates}
        regression: Any = getattr(stage, "regression", None)
        if regression is not None:
            pairs = min(regression.pairs, updates * stage.batch_size)
            changes["regression"] = dataclasses.replace(regression, pairs=pairs)
        stages.append(dataclasses.replace(stage, **changes))
    return dataclasses.replace(config, stages=tuple(stages))
