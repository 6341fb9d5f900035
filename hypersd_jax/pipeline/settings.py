"""Resolve: the settings of a call, by its arguments, a preset, the loaded LoRAs, the model's name and defaults."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from hypersd_jax import presets
from hypersd_jax.bases import TextToImage
from hypersd_jax.config import nearest
from hypersd_jax.diffusion import SOLVERS, Schedule, solver_table
from hypersd_jax.diffusion.grids import ORIGINAL_STEPS, whole_steps
from hypersd_jax.diffusion.names import require_name
from hypersd_jax.diffusion.sigma_grids import RESPACINGS
from hypersd_jax.errors import UserError, short
from hypersd_jax.pipeline import arguments
from hypersd_jax.pipeline.image_guides import control_strengths
from hypersd_jax.pipeline.image_inputs import image_size
from hypersd_jax.pipeline.lora_stack import LoadedLora
from hypersd_jax.pipeline.steering import Steering
from hypersd_jax.presets import Preset
from hypersd_jax.weights.diffusers.controlnet import LoadedControlNet
from hypersd_jax.weights.lora import header as lora_header


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Sampling settings with every default filled in.

    Attributes:
        sampler: the solver, a key of `SOLVERS`.
        steps: number of steps, before `CallSettings.strength` leaves out the first of them.
        eta: share of fresh noise; 0 for a solver that has none.
        guidance: guidance scale; 0 and 1 are off.
        guided: whether each step evaluates the UNet with and without the prompt: `guidance` is above 1, and the UNet
            does not embed it.
        spacing: how timesteps are spaced; None where they are listed, or are points of the distillation grid.
        timesteps: the timesteps where they are listed, else None.
        original_inference_steps: number of points of the distillation grid; None where none is stated or used.
        respacing: the one of `RESPACINGS` that rearranges the noise levels; None for none.
        prediction_type: what the UNet outputs.
    """

    sampler: str
    steps: int
    eta: float
    guidance: float
    guided: bool
    spacing: str | None
    timesteps: tuple[int, ...] | None
    original_inference_steps: int | None
    respacing: str | None
    prediction_type: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallSettings(Settings, Steering):
    """Settings of a call with every default filled in: with prompts and images, all that its result depends on.

    Attributes:
        seed: of the noise.
        num_images: images for each prompt.
        height, width: of the images, in pixels.
        strength: the share of the steps that is walked, the last ones; 1 from noise alone.
        control_scales: how strongly each ControlNet steers.
        guess_mode: whether ControlNets steer the prompted half of the batch alone.
        long_prompts: ``cut`` or ``chunk``.
        tiled: whether images are encoded and decoded in tiles.
    """

    seed: int
    num_images: int
    height: int
    width: int
    strength: float
    control_scales: tuple[float, ...]
    guess_mode: bool
    long_prompts: str
    tiled: bool


def resolve_settings(explicit: Preset, preset: str | None, loras: Iterable[LoadedLora], base: TextToImage) -> Settings:
    """Resolve how to sample: by the call's settings, else the preset's, else a LoRA's, else the model's.

    The last LoRA that states settings decides. A LoRA states them by its header, if that is ours, and by its file name,
    if it is a released one. Its scale has no part in this: at scale 0 it is still loaded, and the base is sampled as
    the LoRA would be.

    Args:
        explicit: the call's settings, None where it has none.
        preset: the name of one of `presets.PRESETS`.
        loras: in loading order.
        base: the model.

    Raises:
        UserError: a name is not known, a number is none, or a value of the header that is to be used cannot be read.
    """
    stated = _stated(explicit, preset, loras, base)
    return fill_in(stated, base.scheduler_config, embeds_guidance=base.embeds_guidance)


def fill_in(stated: Preset, scheduler_config: Mapping[str, Any], *, embeds_guidance: bool) -> Settings:
    """Fill in what presets leave to the solver and to the model's scheduler configuration.

    Args:
        stated: with a sampler, and steps or timesteps.
        scheduler_config: the model's scheduler_config.json.
        embeds_guidance: whether the guidance scale is an input of the denoiser.

    Raises:
        UserError: an unknown sampler; steps, a guidance scale or eta that is no number; a negative guidance scale.
    """
    solver = SOLVERS[require_name("sampler", stated.sampler, SOLVERS)]
    guidance, eta = stated.guidance or 0.0, stated.eta or 0.0
    scale = float(arguments.checked("guidance", guidance, ()))
    if scale < 0:
        raise UserError(f"guidance={scale:g} is negative")
    arguments.checked("eta", eta, ())
    spacing, origin = stated.spacing, stated.original_inference_steps
    if stated.timesteps is None:
        spacing = spacing or solver.spacing_in(scheduler_config)
        if spacing is None and origin is None:
            origin = scheduler_config.get("original_inference_steps") or ORIGINAL_STEPS
    respacing = next((key for key in RESPACINGS if scheduler_config.get(key)), None) if solver.respaces else None
    return Settings(
        sampler=solver.name,
        steps=whole_steps(stated.steps),
        eta=float(eta),
        guidance=float(guidance),
        guided=scale > 1 and not embeds_guidance,
        spacing=spacing,
        timesteps=stated.timesteps,
        original_inference_steps=origin,
        respacing=respacing,
        prediction_type=stated.prediction_type or Schedule.from_config(dict(scheduler_config)).prediction_type,
    )


def resolve_call(
    settings: Settings,
    base: TextToImage,
    controlnets: Sequence[LoadedControlNet],
    *,
    seed: int,
    num_images: int,
    height: int | None,
    width: int | None,
    image: Any,
    strength: float | None,
    mask: Any,
    control_image: Any,
    control_scale: float | Sequence[float],
    guess_mode: bool,
    long_prompts: str,
    tiled: bool,
    steering: Steering,
) -> CallSettings:
    """Resolve what a call's own arguments settle; they are those of `Pipeline.generate`, the last five in `steering`.

    Raises:
        UserError: an argument is out of range, or one is given without another that it needs.
    """
    if long_prompts not in ("cut", "chunk"):
        raise UserError(f"long_prompts={long_prompts!r} is not valid{nearest(long_prompts, ('cut', 'chunk'))}")
    if num_images < 1:
        raise UserError(f"num_images must be at least 1, not {num_images}")
    if steering.guidance_steps is not None and settings.guidance <= 1:
        raise UserError(f"guidance_steps: guidance={settings.guidance:g} is off")
    factor = base.downscale
    given = ("image", image) if image is not None else ("control_image", control_image)
    if None in (height, width) and given[1] is not None:
        own = image_size(*given, factor)
        height, width = own[0] if height is None else height, own[1] if width is None else width
    h, w = arguments.latent_size(height, width, base.native_size, factor)
    scales, guess_mode = control_strengths(controlnets, control_image, control_scale, guess_mode)
    return CallSettings(
        **_fields(settings),
        **_fields(steering),
        seed=seed,
        num_images=num_images,
        height=h * factor,
        width=w * factor,
        strength=arguments.share(strength, image, mask, default=base.default_strength),
        control_scales=scales,
        guess_mode=guess_mode,
        long_prompts=long_prompts,
        tiled=tiled,
    )


def _fields(record: Settings | Steering) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


def table_for(
    settings: Settings, scheduler_config: Mapping[str, Any], *, strength: float = 1.0
) -> dict[str, np.ndarray]:
    """The solver's table of these settings on a model's schedule; raises UserError where the solver has none such."""
    config = {**scheduler_config, "prediction_type": settings.prediction_type}
    if settings.original_inference_steps is not None:
        config["original_inference_steps"] = settings.original_inference_steps
    return solver_table(
        settings.sampler,
        settings.steps,
        eta=settings.eta,
        spacing=settings.spacing,
        scheduler_config=config,
        timesteps=settings.timesteps,
        strength=strength,
    )


def _stated(explicit: Preset, preset: str | None, loras: Iterable[LoadedLora], base: TextToImage) -> Preset:
    first = [explicit, *([] if preset is None else [presets.find(preset)])]
    last = [presets.preset_for_file(str(base.source)), base.defaults]
    for lora in reversed(list(loras)):
        stated, unreadable = presets.read_header(_own_entries(lora))
        by_name = Preset() if lora.origin is None else presets.preset_for_file(lora.origin)
        if unreadable or (stated, by_name) != (Preset(), Preset()):
            _refuse_unreadable(presets.resolve(first), stated, unreadable, lora)
            return presets.resolve([*first, stated, by_name, *last])
    return presets.resolve([*first, *last])


def _own_entries(lora: LoadedLora) -> Mapping[str, str]:
    """The header's entries about sampling; those given in memory are ours, unless they are some file's header."""
    of_a_file = any(key == "format" or key.startswith(("ss_", "modelspec.")) for key in lora.metadata)
    return lora.metadata if lora.origin is None and not of_a_file else lora_header.stated(lora.metadata)


def _refuse_unreadable(given: Preset, stated: Preset, unreadable: Mapping[str, str], lora: LoadedLora) -> None:
    """Refuse an unreadable entry of the header that would be used; warn of one that might have been.

    Args:
        given: what the call and its preset settle.
        stated: what of the header can be read.
        unreadable: why the rest cannot, by key.
        lora: whose header it is.
    """
    another = given.sampler not in (None, stated.sampler)  # which leaves the header's eta and timesteps unused
    unused = {
        "eta": another,
        "timesteps": another or given.spacing is not None,
        "original_inference_steps": another or given.timesteps is not None or given.spacing is not None,
    }
    for key, reason in unreadable.items():
        if getattr(given, key) is not None or unused.get(key):
            continue
        where = f"{lora.origin or 'its LoRA'}: its header's sampling settings cannot be read"
        if given.steps is None or key not in ("timesteps", "original_inference_steps"):
            raise UserError(f"{where} ({short(f'{key}: {reason}')})")
        warnings.warn(f"{where} ({short(f'{key}: {reason}')}); the {key} are left out", stacklevel=5)
