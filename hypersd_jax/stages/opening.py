"""Open a training run: the mesh, the base, the data, and the first student."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from hypersd_jax import adapters
from hypersd_jax.adapters import Adapter
from hypersd_jax.bases import TextToImage, load_base
from hypersd_jax.config import PREVIOUS, Config
from hypersd_jax.data import Prompts, Source, open_prompts, open_source
from hypersd_jax.errors import UserError
from hypersd_jax.inputs.encoding import unconditional
from hypersd_jax.inputs.prompts import PromptInputs
from hypersd_jax.pipeline import parse_dtype
from hypersd_jax.stages.context import Run, fingerprints
from hypersd_jax.stages.kinds import training_step
from hypersd_jax.stages.mesh_choice import make_run_mesh
from hypersd_jax.stages.streams import Stream
from hypersd_jax.training import StopSignals
from hypersd_jax.training.output import Output
from hypersd_jax.training.processes import connect
from hypersd_jax.weights.fingerprints import fingerprint
from hypersd_jax.weights.hub import fetch_lora
from hypersd_jax.weights.lora import read_lora
from hypersd_jax.weights.placement import place


def open_run(config: Config, output: Output, stop: StopSignals | None = None) -> Run:
    """Load the base and the data, and lay out the mesh.

    Raises:
        UserError: naming the key or file at fault.
    """
    mesh = make_run_mesh(config)
    connect(mesh)
    dtype = parse_dtype(config.model.dtype)
    adapters_alone = bool(config.adapter_stages)
    own: dict[str, Any] = {}
    if not adapters_alone:  # the weights themselves are trained, in float32
        own = {"param_dtype": jnp.float32, "fresh": config.model.fresh, "seed": config.seed}
    own |= {"resolution": config.data.resolution, "remat": config.model.remat}
    base = load_base(config.model.source, dtype=dtype, mesh=mesh, **own)
    resolution = base.image_side  # refused here, where it does not suit the autoencoder
    source, prompts = open_data(config, resolution)
    texts = source or prompts
    assert texts is not None
    run = Run(
        config=config,
        output=output,
        mesh=mesh,
        base=base,
        base_fingerprint=fingerprints(config, base),
        preview_prompts=tuple(texts.preview_prompts),
        uncond=unconditional(base, mesh) if config.adapter_stages else None,
        source=source,
        prompt_inputs=PromptInputs(prompts, base, mesh, resolution=resolution) if prompts else None,
        step=training_step(base, mesh),
        stop=stop or StopSignals(),
    )
    if config.adapter_stages:
        run.student, run.scales = run.fresh_factors(Stream.ADAPTER, 0)
        run.fresh_scales = run.scales
        if config.lora.start is not None:
            start = start_factors(base, config.lora.start, run.teacher(PREVIOUS))
            run.student, run.scales = place(mesh, start)
            leaves = {f"{path}.{name}": leaf for path, pair in run.student.items() for name, leaf in pair.items()}
            run.start_fingerprint = fingerprint({**leaves, **run.scales})
    return run


def open_data(config: Config, resolution: int) -> tuple[Source | None, Prompts | None]:
    """Open the images and captions, and the prompts, as far as a stage reads them.

    Raises:
        UserError: naming the key or file at fault.
    """
    source = prompts = None
    if any(stage.reads_images for stage in config.active_stages):
        source = open_source(config.data, resolution=resolution, seed=config.seed, batch_size=config.batch_size)
    elif config.data.cache is not None:
        raise UserError("data.cache: no stage of this run reads images (data_free)")
    if not all(stage.reads_images for stage in config.active_stages):
        prompts = open_prompts(config.data, seed=config.seed)
    return source, prompts


def start_factors(base: TextToImage, start: str, fresh: Adapter) -> tuple[Any, Any]:
    """Read the LoRA that a run starts from: its factors and scales, and fresh ones where it adapts nothing.

    Raises:
        UserError: the file cannot be read, is of another base, or holds more than a LoRA on the denoiser.
    """
    try:
        file = read_lora(fetch_lora(start), base.shapes)
    except UserError as error:
        raise UserError(f"lora.start: {error}") from None
    others = [*(name for name in file.adapters if name != base.denoiser), *file.differences]
    if others or base.denoiser not in file.adapters:
        what = "".join(f"{kind} " for kind in file.report.kinds)
        raise UserError(
            f"lora.start: {file.report.file}: can be sampled with, but is no start for training: only plain LoRAs on "
            f"the {base.denoiser} are ({what}on {', '.join(file.report.modules)})"
        )
    return adapters.split({**fresh, **file.adapters[base.denoiser]})
