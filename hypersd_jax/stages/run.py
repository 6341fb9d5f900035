"""A whole run: every stage in order, then the comparison."""

from __future__ import annotations

import dataclasses
import errno
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from hypersd_jax.compilation import use_compilation_cache
from hypersd_jax.config import AdapterStage, Config, ScoreStage, to_dict
from hypersd_jax.data import open_prompts, open_source
from hypersd_jax.errors import UserError
from hypersd_jax.pipeline import Pipeline, parse_dtype
from hypersd_jax.stages.comparison import compare
from hypersd_jax.stages.export import sampling_table, student_path
from hypersd_jax.stages.feeding import Fed, Inputs, telling_of_cut_captions
from hypersd_jax.stages.inputs import unconditional
from hypersd_jax.stages.jobs import Factors, Job, Run, check_stage, fresh_factors, make_job, teachers
from hypersd_jax.stages.lock import FolderLock
from hypersd_jax.stages.loop import (
    ADAPTER_STREAM,
    ENCODER_STREAM,
    NOISE_STREAM,
    PAIR_STREAM,
    require_even,
    run_updates,
    stream,
)
from hypersd_jax.stages.output import Output, create_output, open_output, set_aside
from hypersd_jax.stages.pairs import again_and_again, make_pairs
from hypersd_jax.stages.preview import finish, preview
from hypersd_jax.stages.prompt_feeding import PromptInputs
from hypersd_jax.stages.reuse import history, of_length, require_run, take_over
from hypersd_jax.stages.student import compared_samplings
from hypersd_jax.stages.whole import open_whole, train_whole
from hypersd_jax.training import StopSignals, make_mesh, newest_step
from hypersd_jax.weights.components import load_components
from hypersd_jax.weights.diffusers.component import fingerprint

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""What no check beforehand can find out."""


def train(config: Config, *, command: str | None = None, alone: bool = False) -> Path:
    """Train every stage of ``config``, compare the students with the teacher, and return the output folder.

    A run that was stopped resumes where its last checkpoint stands, with the same results as if it had not been. A
    first SIGINT or SIGTERM ends it after the update in hand, with a checkpoint. Another run in the same folder is
    refused.

    Args:
        config: from `load_config`.
        command: what was typed to start the run, for its report; None: a Python program started it.
        alone: the process is for this run alone, as the command line's is: a signal ends it even while it compiles.

    Raises:
        UserError: one line naming the key or file at fault.
        Interrupted, Terminated: a signal came, and everything has been saved.
    """
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
    if not config.adapter_stages:
        whole = open_whole(config, output, stop)
        create_output(output, config)
        with telling_of_cut_captions(whole.prompts):
            train_whole(whole)
        return output.root
    run = open_run(config, output, stop)
    check_stages(run)
    require_run(config)
    create_output(output, config)
    taken = take_over(config, output, run.base_fingerprint)
    if taken and jax.process_index() == 0:
        print(f"taken over from {config.reuse}: {', '.join(taken)}", file=sys.stderr)
    factors, run.scales = fresh_factors(run, ADAPTER_STREAM, 0)
    students: dict[str, Factors] = {}
    with telling_of_cut_captions(run.pipe.prompts):
        for index, stage in enumerate(config.adapter_stages):
            factors = run_stage(run, index, stage, factors, students)
            if any(stage.name in teachers(later) for later in config.adapter_stages[index + 1 :]):
                students[stage.name] = factors
    del factors, students
    if config.compared_samples:
        stop.where = "while it compared the students; the same command resumes there"
        prompts, base = run.preview_prompts, run.base_fingerprint
        compare(config, output, run.pipe, base, prompts=prompts, command=command)
    return output.root


def open_run(config: Config, output: Output, stop: StopSignals | None = None) -> Run:
    """Load the base and the data, and lay out the mesh."""
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    dtype = parse_dtype(config.model.dtype)
    components = load_components(config.model.source, dtype=dtype, remat=config.model.remat, mesh=mesh)
    pipe = Pipeline(components, dtype=dtype, mesh=mesh)
    resolution = config.data.resolution or pipe.native_size[0]
    free = [isinstance(stage, ScoreStage) and stage.data_free for stage in config.adapter_stages]
    pairs = prompts = None
    if not all(free):
        pairs = open_source(config.data, resolution=resolution, seed=config.seed, batch_size=config.batch_size)
    elif config.data.cache is not None:
        raise UserError("data.cache: no stage of this run reads pictures (data_free)")
    if any(free):
        prompts = open_prompts(config.data, seed=config.seed)
    texts = pairs or prompts
    assert texts is not None
    factor = components.vae_config.downscale
    if resolution % factor:
        raise UserError(f"data.resolution={resolution} must be a multiple of the autoencoder's {factor}")
    return Run(
        config=config,
        output=output,
        mesh=mesh,
        pipe=pipe,
        preview_prompts=tuple(texts.preview_prompts),
        base_fingerprint=fingerprint(components.params["unet"]),
        uncond=unconditional(components, pipe.prompts, dtype, mesh),
        scales={},
        inputs=Inputs(config, pairs, components, pipe.prompts, mesh, dtype) if pairs else None,
        prompt_inputs=PromptInputs(prompts, components, pipe.prompts, mesh, dtype, resolution=resolution)
        if prompts
        else None,
        latent_shape=(resolution // factor, resolution // factor, components.unet_config.in_channels),
        steps={},
        stop=stop or StopSignals(),
    )


def check_stages(run: Run) -> None:
    """Refuse, before anything is trained or written, what a later stage would stumble over.

    Raises:
        UserError: naming the stage and key.
    """
    if run.pipe.components.unet_config.time_cond_proj_dim:
        raise UserError("model: its UNet embeds the guidance scale (time_cond_proj_dim), which no stage trains yet")
    if run.pipe.components.is_inpainting:
        raise UserError("model: an inpainting model (unet in_channels=9), which no stage trains")
    for index, stage in enumerate(run.config.adapter_stages):
        require_even(stage, run.mesh)
        try:
            check_stage(run, stage, [each.name for each in run.config.adapter_stages[:index]])
            for sampling in compared_samplings(stage):
                sampling_table(stage, sampling, dict(run.pipe.components.scheduler_config))
        except UserError as error:
            raise UserError(f"stages.{stage.name}.{error}") from None


def run_stage(run: Run, index: int, stage: AdapterStage, start: Factors, students: Mapping[str, Factors]) -> Any:
    """Train one stage and export it; returns the exported factors, where the next stage starts, or the whole UNet.

    Args:
        run: what the stages share.
        index: the stage's place, for its randomness and its data.
        stage: its settings.
        start: the previous student's factors, or in the first stage fresh ones.
        students: those of earlier stages that a stage names as its teacher.
    """
    job = make_job(run, index, stage, start, students)
    take, pairs = job.student, _pairs(run, index, stage, job)

    def facts(updates: int) -> dict[str, Any]:
        config = of_length(run.config, stage, updates)
        return {
            "stage": stage.name,
            "base": run.base_fingerprint,
            "settings": to_dict(config.adapter_stages[index]),
            "seed": run.config.seed,
            "history": history(config, index + 1, run.base_fingerprint),
        }

    if (newest_step(run.output.checkpoints(stage.name)) or 0) < stage.updates:
        set_aside(run.output, student_path(run.output, stage), stage.name)
    state, done = run_updates(
        stage,
        job.state,
        root=run.output.root,
        folder=run.output.checkpoints(stage.name),
        facts=facts,
        log=run.config.log,
        make=job.make,
        frozen=job.frozen,
        batches=lambda done: _batches(run, index, stage, done) if pairs is None else pairs(done),
        key=stream(run.config.seed, NOISE_STREAM, index),
        controls=job.controls,
        preview=lambda state, number: preview(run, stage, take(state), f"{stage.name}-{number:06d}"),
        mesh=run.mesh,
        stop=run.stop,
    )
    student = take(state)
    del state, job  # the optimizer's part, before anything is drawn
    if done < stage.updates or not student_path(run.output, stage).exists():
        finish(run, stage, student)
    return student


def _pairs(run: Run, index: int, stage: AdapterStage, job: Job) -> Callable[[int], Iterator[Fed]] | None:
    """(finished updates) -> pairs from the stage's first batches, again and again; None where a stage has none."""
    if not isinstance(stage, ScoreStage) or stage.regression is None or job.lead is None:
        return None
    few = dataclasses.replace(stage, updates=stage.regression.pairs // stage.batch_size)
    key, order = jax.random.split(stream(run.config.seed, PAIR_STREAM, index))
    settings: dict[str, Any] = {"batches": few.updates, "latent_shape": run.latent_shape, "mesh": run.mesh}
    lead, frozen = job.lead, job.frozen

    def again(done: int) -> Iterator[Fed]:
        pairs = make_pairs(_batches(run, index, few, 0), lead, frozen, key=key, name=stage.name, **settings)
        return again_and_again(pairs, updates=stage.updates, done=done, key=order)

    return again


def _batches(run: Run, index: int, stage: AdapterStage, done: int) -> Iterator[Fed]:
    """The stage's batches from update ``done + 1`` on."""
    before = sum(s.updates * s.batch_size for s in run.config.adapter_stages[:index])
    key = stream(run.config.seed, ENCODER_STREAM, index)
    if isinstance(stage, ScoreStage) and stage.data_free:
        assert run.prompt_inputs is not None
        return run.prompt_inputs.prompted(stage, before=before, done=done)
    assert run.inputs is not None
    return run.inputs.conditioned(stage, before=before, done=done, key=key)
