"""What a call samples with, where the call, a preset, the LoRAs, the model's name and its defaults have a say."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from hypersd_jax import presets
from hypersd_jax.diffusion import solver_table
from hypersd_jax.errors import UserError, short
from hypersd_jax.pipeline.lora_stack import LoadedLora
from hypersd_jax.presets import Preset
from hypersd_jax.weights.components import Components
from hypersd_jax.weights.lora import header as lora_header


def resolve_settings(
    explicit: Preset, preset: str | None, loras: Iterable[LoadedLora], components: Components
) -> Preset:
    """The call's own settings, else the preset's, else the last LoRA's that states any, else the model's.

    A LoRA states settings by its header, if that is ours, and by its file name, if it is a released one. Its scale has
    no part in this: at scale 0 it is still loaded, and the base is sampled as the LoRA would be.

    Args:
        explicit: what the call says; None where it says nothing.
        preset: the name of one of `presets.PRESETS`.
        loras: in loading order.
        components: the model.

    Raises:
        UserError: the preset is not known; or a value of the header that is to be used cannot be read.
    """
    first = [explicit, *([] if preset is None else [presets.find(preset)])]
    last = [
        presets.preset_for_file(str(components.folder)),
        presets.BASE_SDXL if components.is_xl else presets.BASE_SD,
    ]
    for lora in reversed(list(loras)):
        stated, unreadable = presets.read_header(_own_entries(lora))
        by_name = Preset() if lora.origin is None else presets.preset_for_file(lora.origin)
        if unreadable or (stated, by_name) != (Preset(), Preset()):
            _refuse_unreadable(presets.resolve(first), stated, unreadable, lora)
            return presets.resolve([*first, stated, by_name, *last])
    return presets.resolve([*first, *last])


def _own_entries(lora: LoadedLora) -> Mapping[str, str]:
    """The header's entries that speak of sampling; what was given in memory does, unless it is some file's header."""
    of_a_file = any(key == "format" or key.startswith(("ss_", "modelspec.")) for key in lora.metadata)
    return lora.metadata if lora.origin is None and not of_a_file else lora_header.stated(lora.metadata)


def _refuse_unreadable(given: Preset, stated: Preset, unreadable: Mapping[str, str], lora: LoadedLora) -> None:
    """UserError for an unreadable entry of the header that would be used, a warning for one that might have been.

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
        warnings.warn(f"{where} ({short(f'{key}: {reason}')}); the {key} are left out", stacklevel=4)


def table_for(plan: Preset, components: Components, strength: float = 1.0) -> dict[str, np.ndarray]:
    """The solver's table of these settings on the model's schedule; raises UserError where the solver has none such."""
    config: dict[str, Any] = dict(components.scheduler_config)
    for key in ("original_inference_steps", "prediction_type"):
        if getattr(plan, key) is not None:
            config[key] = getattr(plan, key)
    return solver_table(
        str(plan.sampler),
        plan.steps,
        eta=float(plan.eta or 0.0),
        spacing=plan.spacing,
        scheduler_config=config,
        timesteps=plan.timesteps,
        strength=strength,
    )
