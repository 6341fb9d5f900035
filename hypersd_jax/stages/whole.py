"""A run that trains whole networks, not adapters: the autoencoder, or the UNet with its text encoders.

What comes out is a model in diffusers' layout, ``OUTPUT/model``, which the next run or anything else reads.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hypersd_jax.conditioning import PromptEncoder
from hypersd_jax.config import AutoencoderStage, Config, StageConfig, TeacherStage, to_dict
from hypersd_jax.data import Source, open_source
from hypersd_jax.diffusion import Schedule
from hypersd_jax.errors import UserError
from hypersd_jax.pipeline import Pipeline, parse_dtype
from hypersd_jax.stages import autoencoder, teacher
from hypersd_jax.stages.export import require_finite
from hypersd_jax.stages.feeding import Fed, Inputs, feed, pictures
from hypersd_jax.stages.loop import (
    ENCODER_STREAM,
    NOISE_STREAM,
    chosen,
    optimizer_config,
    require_even,
    run_updates,
    stream,
)
from hypersd_jax.stages.output import Output
from hypersd_jax.stages.preview import require_finite_images
from hypersd_jax.stages.reference import MANY_STEPS
from hypersd_jax.stages.result_files import write_strips
from hypersd_jax.training import (
    StopSignals,
    TrainState,
    init_state,
    make_mesh,
    make_optimizer,
    make_step,
    optimizer_controls,
)
from hypersd_jax.weights.components import Components, load_components
from hypersd_jax.weights.diffusers.component import fingerprint, host
from hypersd_jax.weights.diffusers.model import save_model

Params = dict[str, dict[str, jax.Array]]
# How many pictures the latents' standard deviation is taken over, and how many are encoded at a time.
SCALE_PICTURES, SCALE_BATCH = 512, 32


@dataclasses.dataclass(kw_only=True)
class WholeRun:
    """What the stages of such a run share; ``components`` holds the newest weights."""

    config: Config
    output: Output
    mesh: Mesh
    dtype: Any
    components: Components
    prompts: PromptEncoder
    schedule: Schedule
    source: Source
    stop: StopSignals


def open_whole(config: Config, output: Output, stop: StopSignals) -> WholeRun:
    """Load the model, its ``fresh`` parts drawn from the run's seed, and the data.

    Raises:
        UserError: naming the key or file at fault.
    """
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    dtype = parse_dtype(config.model.dtype)
    components = load_components(
        config.model.source,
        dtype=dtype,
        remat=config.model.remat,
        mesh=mesh,
        param_dtype=jnp.float32,
        fresh=config.model.fresh,
        seed=config.seed,
    )
    for stage in config.active_stages:
        require_even(stage, mesh)
    pipe = Pipeline(components, dtype=dtype, mesh=mesh)
    resolution = config.data.resolution or pipe.native_size[0]
    source = open_source(config.data, resolution=resolution, seed=config.seed, batch_size=config.batch_size)
    _require_fit(config, components, resolution)
    if config.data.cache is not None:
        Inputs(config, source, components, pipe.prompts, mesh, dtype, trained=components.text_encoders)
    return WholeRun(
        config=config,
        output=output,
        mesh=mesh,
        dtype=dtype,
        components=components,
        prompts=pipe.prompts,
        schedule=pipe.schedule,
        source=source,
        stop=stop,
    )


def _require_fit(config: Config, components: Components, resolution: int) -> None:
    """Refuse what a stage would stumble over after the run has written something."""
    factor = components.vae_config.downscale
    if resolution % factor:
        raise UserError(f"data.resolution={resolution} must be a multiple of the autoencoder's {factor}")
    for stage in config.active_stages:
        where = f"stages.{stage.name}"
        if isinstance(stage, AutoencoderStage):
            for key in ("bucket_step", "cache"):
                if getattr(config.data, key) is not None:
                    raise UserError(f"data.{key}: {where} trains the autoencoder, on whole square pictures")
        elif components.is_inpainting or components.unet_config.time_cond_proj_dim:
            raise UserError(f"model: {where} does not train inpainting models or UNets that embed the guidance scale")


def train_whole(run: WholeRun) -> None:
    """Train every stage in order and write the model; what is there already is not done again."""
    for index, stage in enumerate(run.config.active_stages):
        if isinstance(stage, TeacherStage) and stage.prediction_type is not None:
            run = _predicting(run, stage.prediction_type)
        trained = _run_stage(run, index, stage)
        require_finite(trained, stage)
        run.components = _with_weights(run.components, trained)
        if isinstance(stage, AutoencoderStage) and stage.part == "all":
            run.components = _with_scaling(run)
        _preview(run, stage, stage.name, last=True)
    params = {name: {path: host(value) for path, value in part.items()} for name, part in run.components.params.items()}
    if jax.process_index() == 0:
        target, new = run.output.root / "model", run.output.root / "model-new"
        for left in (*run.output.root.glob(".model-new.*.tmp"), new):
            shutil.rmtree(left, ignore_errors=True)
        save_model(run.components, new, params=params)
        shutil.rmtree(target, ignore_errors=True)
        new.replace(target)


def _run_stage(run: WholeRun, index: int, stage: StageConfig) -> Params:
    """Train one stage; returns the new weights by component."""
    params = run.components.params
    frozen: dict[str, Any]
    if isinstance(stage, AutoencoderStage):
        start = {"vae": autoencoder.trained_part(stage, params["vae"])}
        frozen = {"vae": {path: value for path, value in params["vae"].items() if path not in start["vae"]}}
    else:
        start = {name: dict(params[name]) for name in ("unet", *run.components.text_encoders)}
        frozen = {"empty": tuple(jnp.asarray(ids) for ids in run.prompts.tokenize([""]))}
    tx = make_optimizer(optimizer_config(stage))
    given = {name: fingerprint(part) for name, part in params.items()}
    state = init_state(start, tx, run.mesh)

    def make() -> Any:
        if isinstance(stage, AutoencoderStage):
            loss = autoencoder.make_loss(run.components, stage, run.dtype)
        else:
            assert isinstance(stage, TeacherStage)
            loss = teacher.make_loss(run.components, run.prompts, run.schedule, stage, run.dtype)
        return make_step(loss, tx, state, frozen, mesh=run.mesh, accumulate=stage.accumulate)

    def preview(now: TrainState, number: int) -> None:
        shown = dataclasses.replace(run, components=_with_weights(run.components, chosen(stage, now)))
        _preview(shown, stage, f"{stage.name}-{number:06d}")

    state, _ = run_updates(
        stage,
        state,
        root=run.output.root,
        folder=run.output.checkpoints(stage.name),
        facts=lambda updates: {
            "stage": stage.name,
            "base": given,
            "settings": to_dict(dataclasses.replace(stage, updates=updates)),
            "seed": run.config.seed,
        },
        log=run.config.log,
        make=make,
        frozen=frozen,
        batches=lambda done: _batches(run, index, stage, done),
        key=stream(run.config.seed, NOISE_STREAM, index),
        controls={
            **optimizer_controls(optimizer_config(stage), stage.updates),
            "ema_decay": np.asarray(stage.ema, np.float32),
        },
        preview=preview,
        mesh=run.mesh,
        stop=run.stop,
    )
    trained: Params = chosen(stage, state)
    return trained


def _batches(run: WholeRun, index: int, stage: StageConfig, done: int) -> Iterator[Fed]:
    """The stage's batches from update ``done + 1`` on."""
    before = sum(each.updates * each.batch_size for each in run.config.active_stages[:index])
    if isinstance(stage, AutoencoderStage):
        load = pictures(run.source)
        return feed(stage, before=before, done=done, mesh=run.mesh, load=load, finish=lambda _number, loaded: loaded)
    trained = run.components.text_encoders
    inputs = Inputs(run.config, run.source, run.components, run.prompts, run.mesh, run.dtype, trained=trained)
    key = stream(run.config.seed, ENCODER_STREAM, index)
    return inputs.captioned(stage, before=before, done=done, key=key)


def _with_weights(components: Components, trained: Params) -> Components:
    """The components with these of their weights in place of their own."""
    params = {name: {**part, **trained.get(name, {})} for name, part in components.params.items()}
    return dataclasses.replace(components, params=params)


def _predicting(run: WholeRun, kind: str) -> WholeRun:
    """The run with a UNet that is said to predict ``kind``; its weights are as they were."""
    description = run.components.description
    config = {**description.scheduler_config, "prediction_type": kind}
    description = dataclasses.replace(description, scheduler_config=config)
    return dataclasses.replace(
        run,
        components=dataclasses.replace(run.components, description=description),
        schedule=dataclasses.replace(run.schedule, prediction_type=kind),
    )


def _with_scaling(run: WholeRun) -> Components:
    """The components with the scaling factor that gives the latents of the stream's first pictures unit variance."""
    components = run.components
    images = jnp.asarray(run.source.batch(np.arange(SCALE_PICTURES)).images)

    def moments(part: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean, logvar = components.vae(dict(components.params["vae"]), part.astype(run.dtype), method="encode")
        mean = mean.astype(jnp.float32)
        return jnp.mean(mean), jnp.mean(jnp.square(mean) + jnp.exp(logvar.astype(jnp.float32)))

    parts = images.reshape(-1, SCALE_BATCH, *images.shape[1:])
    first, second = (jnp.mean(each) for each in jax.jit(lambda rows: jax.lax.map(moments, rows))(parts))
    factor = float(1.0 / jnp.sqrt(second - jnp.square(first)))
    description = components.description
    config = {**description.configs["vae"], "scaling_factor": factor}
    return dataclasses.replace(
        components,
        description=dataclasses.replace(description, configs={**description.configs, "vae": config}),
        vae_config=dataclasses.replace(components.vae_config, scaling_factor=factor),
    )


def _preview(run: WholeRun, stage: StageConfig, name: str, *, last: bool = False) -> None:
    """Pictures over their reconstructions, or drawings of the stream's first captions.

    Raises:
        UserError: the ``last`` ones of a stage are not finite.
    """
    pipe = Pipeline(run.components, dtype=run.dtype, mesh=run.mesh)
    prompts: list[str] = []
    if isinstance(stage, AutoencoderStage):
        rows = [*reconstructed(pipe, run.source.batch(np.arange(run.config.evaluation.batch_size)).images)]
    else:
        prompts = run.source.preview_prompts
        settings: dict[str, Any] = {"steps": MANY_STEPS, "sampler": "ddim", "guidance": run.config.evaluation.guidance}
        rows = [pipe(prompts, output="np", batch_size=run.config.evaluation.batch_size, stepwise=True, **settings)]
    require_finite_images(rows[-1], stage, name, last=last)
    if jax.process_index() == 0:
        write_strips(run.output.samples / f"{name}.png", rows, prompts)


def reconstructed(pipe: Pipeline, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (B, H, W, 3) in -1..1 and what the autoencoder makes of them, by its posterior's mean; both in 0..1."""
    components = pipe.components

    def back_and_forth(params: Any, pictures: jax.Array) -> jax.Array:
        mean, _ = components.vae(params, pictures.astype(pipe.dtype), method="encode")
        return components.vae(params, mean, method="decode").astype(jnp.float32)

    output = np.asarray(jax.jit(back_and_forth)(dict(components.params["vae"]), jnp.asarray(images)))
    return images * 0.5 + 0.5, np.clip(output * 0.5 + 0.5, 0.0, 1.0)
