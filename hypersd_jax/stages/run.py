"""A whole run: every stage in order, then the comparison."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hypersd_jax import adapters
from hypersd_jax.compilation import use_compilation_cache
from hypersd_jax.conditioning import Conditioning
from hypersd_jax.config import Config, ConsistencyStage, to_dict
from hypersd_jax.data import Source, open_source
from hypersd_jax.errors import UserError
from hypersd_jax.pipeline import Pipeline, parse_dtype
from hypersd_jax.stages import tscd
from hypersd_jax.stages.comparison import compare
from hypersd_jax.stages.export import export_student, sampling_header
from hypersd_jax.stages.feeding import Fed, Inputs
from hypersd_jax.stages.inputs import unconditional
from hypersd_jax.stages.loop import (
    ADAPTER_STREAM,
    ENCODER_STREAM,
    NOISE_STREAM,
    chosen,
    optimizer_config,
    require_even,
    run_updates,
    stream,
)
from hypersd_jax.stages.output import Output, create_output, open_output
from hypersd_jax.stages.preview import draw_preview
from hypersd_jax.stages.whole import open_whole, train_whole
from hypersd_jax.training import (
    Step,
    init_state,
    make_mesh,
    make_optimizer,
    make_step,
)
from hypersd_jax.weights.components import load_components
from hypersd_jax.weights.folder import fingerprint

Factors = dict[str, dict[str, jax.Array]]


@dataclasses.dataclass(kw_only=True)
class Run:
    """What the stages of one run share."""

    config: Config
    output: Output
    mesh: Mesh
    pipe: Pipeline
    source: Source
    base_fingerprint: str
    uncond: Conditioning
    scales: dict[str, jax.Array]
    inputs: Inputs
    steps: dict[tscd.StepKind, Step]

    @property
    def grid_length(self) -> int:
        """The longest solver grid of the run; shorter ones are padded to it."""
        return max(stage.solver_steps for stage in self.config.adapter_stages)


def train(config: Config) -> Path:
    """Train every stage of ``config``, compare the students with the teacher, and return the output folder.

    A run that was stopped goes on where its last checkpoint stands, with the same results as if it had not been.

    Raises:
        UserError: one line naming the key or file at fault.
    """
    output = open_output(config)
    if config.log.compilation_cache:
        use_compilation_cache()
    if not config.adapter_stages:
        whole = open_whole(config, output)
        create_output(output, config)
        train_whole(whole)
        return output.root
    run = open_run(config, output)
    check_stages(run)
    create_output(output, config)
    factors = _initial_factors(run)
    teacher: Factors | None = None
    for index, stage in enumerate(config.adapter_stages):
        student = run_stage(run, index, stage, factors, teacher)
        factors = teacher = student
    if config.compared_samples:
        compare(config, output, run.pipe, run.base_fingerprint)
    return output.root


def open_run(config: Config, output: Output) -> Run:
    """Load the base and the data, and lay out the mesh."""
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    dtype = parse_dtype(config.model.dtype)
    components = load_components(config.model.source, dtype=dtype, remat=config.model.remat, mesh=mesh)
    pipe = Pipeline(components, dtype=dtype, mesh=mesh)
    resolution = config.data.resolution or pipe.native_size[0]
    source = open_source(config.data, resolution=resolution, seed=config.seed, batch_size=config.batch_size)
    return Run(
        config=config,
        output=output,
        mesh=mesh,
        pipe=pipe,
        source=source,
        base_fingerprint=fingerprint(components.params["unet"]),
        uncond=unconditional(components, pipe.prompts, dtype),
        scales={},
        inputs=Inputs(config, source, components, pipe.prompts, mesh, dtype),
        steps={},
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
    for stage in run.config.adapter_stages:
        where = f"stages.{stage.name}."
        require_even(stage, run.mesh)
        try:
            tscd.stage_controls(stage, run.pipe.schedule, run.grid_length)
            sampling_header(stage, dict(run.pipe.components.scheduler_config))
        except UserError as error:
            raise UserError(f"{where}{error}") from None


def run_stage(run: Run, index: int, stage: ConsistencyStage, start: Factors, teacher: Factors | None) -> Factors:
    """Train one stage from ``start`` and export it; returns the exported factors, where the next stage starts.

    Args:
        run: what the stages share.
        index: the stage's place, for its randomness and its data.
        stage: its settings.
        start: the previous student's factors, or fresh ones.
        teacher: the previous student's factors; None in the first stage.
    """
    components, schedule = run.pipe.components, run.pipe.schedule
    kind = tscd.step_kind(stage, first=teacher is None)
    state = init_state(start, make_optimizer(optimizer_config(stage)), run.mesh)
    frozen_teacher = adapters.join(teacher, run.scales) if teacher is not None and kind.from_previous else None
    frozen = tscd.frozen_tree(components, run.uncond, run.scales, frozen_teacher)
    controls = tscd.stage_controls(stage, schedule, run.grid_length)
    facts = {"stage": stage.name, "base": run.base_fingerprint, "settings": to_dict(stage), "seed": run.config.seed}

    def make() -> Step:
        if kind not in run.steps:
            loss = tscd.make_loss(components, schedule, kind)
            tx = make_optimizer(optimizer_config(stage))
            run.steps[kind] = make_step(loss, tx, state, frozen, mesh=run.mesh, accumulate=stage.accumulate)
        return run.steps[kind]

    state, done = run_updates(
        stage,
        state,
        root=run.output.root,
        folder=run.output.checkpoints(stage.name),
        facts=facts,
        log=run.config.log,
        make=make,
        frozen=frozen,
        batches=lambda done: _batches(run, index, stage, done),
        key=stream(run.config.seed, NOISE_STREAM, index),
        controls=controls,
        preview=lambda state, number: _preview(run, stage, chosen(stage, state), f"{stage.name}-{number:06d}"),
        mesh=run.mesh,
    )
    exported: Factors = chosen(stage, state)
    file = run.output.loras / f"{stage.name}.safetensors"
    if done < stage.updates or not file.exists():
        _finish(run, stage, exported, file)
    return exported


def _batches(run: Run, index: int, stage: ConsistencyStage, done: int) -> Iterator[Fed]:
    """The stage's batches from update ``done + 1`` on."""
    before = sum(s.updates * s.batch_size for s in run.config.adapter_stages[:index])
    key = stream(run.config.seed, ENCODER_STREAM, index)
    return run.inputs.conditioned(stage, before=before, done=done, key=key)


def _finish(run: Run, stage: ConsistencyStage, factors: Factors, file: Path) -> None:
    """Export the student, and draw with it, which also proves that the adapter is on."""
    adapter = jax.device_get(adapters.join(factors, run.scales))
    if jax.process_index() == 0:
        export_student(file, adapter, stage, run.pipe.components, base_fingerprint=run.base_fingerprint)
    _preview(run, stage, factors, stage.name)


def _preview(run: Run, stage: ConsistencyStage, factors: Factors, name: str) -> None:
    adapter = adapters.join(factors, run.scales)
    path = run.output.samples / f"{name}.png"
    # The comparison's batch size, so that both share their compiled programs.
    draw_preview(
        run.pipe, adapter, stage, run.source.preview_prompts, path, batch_size=run.config.evaluation.batch_size
    )


def _initial_factors(run: Run) -> Factors:
    """Fresh LoRA factors on the 14-module list; fills ``run.scales``."""
    lora = run.config.lora
    adapter = adapters.init(
        stream(run.config.seed, ADAPTER_STREAM, 0),
        run.pipe.components.unet.shapes,
        rank=lora.rank,
        alpha=lora.alpha,
    )
    factors, scales = adapters.split(adapter)
    run.scales = jax.tree.map(jnp.asarray, scales)
    return jax.tree.map(jnp.asarray, factors)
