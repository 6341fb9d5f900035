"""A training run: every stage in order, then the comparison."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Any

import jax

from hypersd_jax.compilation import use_compilation_cache
from hypersd_jax.config import Config, StageConfig, to_dict
from hypersd_jax.errors import UserError
from hypersd_jax.evaluation.run_comparison import compare_run
from hypersd_jax.inputs.batches import reporting_cut_captions
from hypersd_jax.stages.context import Run
from hypersd_jax.stages.export import sampling_table
from hypersd_jax.stages.kinds import STUDENT, exported_weights, kind_of, naming, watch_of
from hypersd_jax.stages.opening import open_run
from hypersd_jax.stages.streams import Stream, stream
from hypersd_jax.training import StopSignals, init_state, newest_step
from hypersd_jax.training.first_process import wait_for_all
from hypersd_jax.training.lock import FolderLock
from hypersd_jax.training.loop import require_even, run_updates
from hypersd_jax.training.output import create_output, open_output, set_aside
from hypersd_jax.training.processes import join
from hypersd_jax.training.reuse import history, of_length, require_run, reuse_stages
from hypersd_jax.weights.placement import place

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""Errors that no check beforehand can find."""
STATE = "by model"
"""Layout of the state in a checkpoint; a state of another layout cannot be restored."""


def train(config: Config, *, command: str | None = None, alone: bool = False) -> Path:
    """Train every stage of ``config``, compare the students with the teacher, and return the output folder.

    A stopped run resumes from its last checkpoint, with the same results as if it had not been stopped. A first SIGINT
    or SIGTERM ends it after the current step, with a checkpoint. Another run in the same folder is refused.

    Args:
        config: from `load_config`.
        command: what was typed to start the run, for its report; None: a Python program started it.
        alone: the process is for this run alone, as the command line's is: a signal ends it even while it compiles.

    Raises:
        UserError: one line naming the key or file at fault.
        Interrupted, Terminated: a signal came, and everything has been saved.
    """
    join(config.distributed)
    lock = FolderLock(config.output_dir, "output_dir")
    with lock, StopSignals(alone=alone, leave=lock.release) as stop:
        try:
            return _train(config, command, stop)
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            raise UserError(f"{error.filename or config.output_dir}: cannot be written ({error.strerror})") from None


def _train(config: Config, command: str | None, stop: StopSignals) -> Path:
    output = open_output(config)
    if config.log.compilation_cache:
        use_compilation_cache()
    run = open_run(config, output, stop)
    check_stages(run)
    require_run(config)
    create_output(output, config)
    reused = reuse_stages(config, output, run.base_fingerprint, run.start_fingerprint)
    if reused and jax.process_index() == 0:
        print(f"reused from {config.reuse}: {', '.join(reused)}", file=sys.stderr)
    with reporting_cut_captions(run.base.prompts):
        for index, stage in enumerate(config.active_stages):
            run_stage(run, index, stage)
    run.student, run.students = {}, {}
    if config.adapter_stages and config.compared_samples:
        stop.where = "while it compared the students; the same command resumes there"
        prompts, base = run.preview_prompts, run.base_fingerprint
        compare_run(config, output, run.pipe, base, prompts=prompts, command=command)
    wait_for_all()
    return output.root


def check_stages(run: Run) -> None:
    """Refuse, before anything is trained or written, what a later stage could not do.

    Raises:
        UserError: naming the stage and key.
    """
    earlier: list[str] = []
    for stage in run.config.active_stages:
        require_even(stage, run.mesh)
        kind_of(stage).check(run, stage, earlier)
        with naming(f"stages.{stage.name}"):
            for sampling in stage.samplings:
                sampling_table(stage, sampling, dict(run.base.scheduler_config))
        earlier.append(stage.name)
    _ = run.inputs  # opened here, and refused where a cache does not fit


def run_stage(run: Run, index: int, stage: StageConfig) -> None:
    """Train one stage, or the rest of it, then export its student and pass it on."""
    kind = kind_of(stage)
    frozen = place(run.mesh, kind.frozen(run, stage))
    folder = run.output.checkpoints(stage.name)

    def metadata(updates: int) -> dict[str, Any]:
        config = of_length(run.config, stage, updates)
        return {
            "stage": stage.name,
            "state": STATE,
            "base": run.base_fingerprint,
            "settings": to_dict(config.active_stages[index]),
            "seed": run.config.seed,
            "history": history(config, index + 1, run.base_fingerprint, run.start_fingerprint),
        }

    if (newest_step(folder) or 0) < stage.updates:
        set_aside(run.output, run.output.student(stage), stage.name)
    state, done = run_updates(
        stage,
        init_state(kind.trainable(run, index, stage), stage, averaged=(STUDENT,), mesh=run.mesh),
        root=run.output.root,
        folder=folder,
        metadata=metadata,
        log=run.config.log,
        step=run.step,
        frozen=frozen,
        batches=lambda done: kind.batches(run, index, stage, frozen, done),
        key=stream(run.config.seed, Stream.NOISE, index),
        preview=lambda state, number: kind.preview(
            run, stage, exported_weights(stage, state), f"{stage.name}-{number:06d}"
        ),
        mesh=run.mesh,
        stop=run.stop,
        watch=watch_of(run, stage),
    )
    student = exported_weights(stage, state)
    del state  # the optimizer's part, before anything is sampled
    kind.finish(run, stage, student, trained=done < stage.updates)
