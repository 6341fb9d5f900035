"""How to sample with one LoRA, settled to the last number: what workflows, settings texts and snippets are made of."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hypersd_jax import presets
from hypersd_jax.pipeline.naming import EMBEDDED, assets
from hypersd_jax.pipeline.settings import Settings, fill_in, table_for
from hypersd_jax.presets import BASE_SD, BASE_SDXL, Preset
from hypersd_jax.weights.lora import header

TIMESTEPS = 1000
"""Of the schedules that the other programs know."""

KNOWN_BASES = {
    "sd_v1": ("stable-diffusion-v1-5/stable-diffusion-v1-5", "v1-5-pruned-emaonly.safetensors"),
    "sd_v2": ("stabilityai/stable-diffusion-2-1", "v2-1_768-ema-pruned.safetensors"),
    "sdxl_base_v1-0": ("stabilityai/stable-diffusion-xl-base-1.0", "sd_xl_base_1.0.safetensors"),
}
"""kohya's name of a family: its first model on the hub, and the file that user interfaces have of it."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One call.

    Attributes:
        lora: name of the LoRA's file, with its suffix.
        base: what the base model is called: a hub id, ``embedded``, or the name of a file or folder.
        family: kohya's name of its family, a key of `KNOWN_BASES`.
        settings: how to sample.
        timesteps: of each step, int or float, descending.
        levels: noise levels sigma / alpha of each step, descending.
        prompt: an example.
        size: (width, height) in pixels.
        seed: of the noise.
    """

    lora: str
    base: str
    family: str
    settings: Settings
    timesteps: tuple[float, ...]
    levels: tuple[float, ...]
    prompt: str
    size: tuple[int, int]
    seed: int = 0

    @property
    def name(self) -> str:
        """The LoRA's name: its file's without suffix."""
        return self.lora.removesuffix(".safetensors")

    @property
    def is_guided(self) -> bool:
        """Whether classifier-free guidance is on."""
        return self.settings.guidance > 1

    @property
    def is_trailing(self) -> bool:
        """Whether the timesteps are the trailing ones, T, T - T/n, ... less 1, rounded down or to the nearest."""
        return self.timesteps in (trailing(self.settings.steps), simple(self.settings.steps))


def trailing(steps: int) -> tuple[float, ...]:
    """diffusers' trailing timesteps."""
    return tuple(float(t) for t in (np.round(np.arange(TIMESTEPS, 0, -TIMESTEPS / steps)) - 1)[:steps])


def simple(steps: int) -> tuple[float, ...]:
    """The timesteps of the schedule that ComfyUI and A1111 call simple."""
    return tuple(float(TIMESTEPS - 1 - int(index * TIMESTEPS / steps)) for index in range(steps))


def stated_preset(file: Path, metadata: Mapping[str, str]) -> Preset:
    """What a LoRA says of its sampling: by its header, where that is ours, else by the name of a released file."""
    stated, _ = presets.read_header(header.stated(metadata))
    return presets.resolve([stated, presets.preset_for_file(file)])


def make_recipe(
    file: Path,
    metadata: Mapping[str, str],
    *,
    base: str,
    family: str,
    scheduler_config: Mapping[str, Any],
    size: tuple[int, int],
    prompt: str,
    embeds_guidance: bool = False,
) -> Recipe:
    """Settle how to sample with a LoRA, as a pipeline with it and the base would.

    Args:
        file: the LoRA.
        metadata: its header.
        base: see `base_name`.
        family: see `Recipe`.
        scheduler_config: the base's.
        size: (width, height) in pixels.
        prompt: an example.
        embeds_guidance: whether the guidance scale is an input of the denoiser.

    Raises:
        UserError: the settings that the LoRA states make no sense on this base.
    """
    default = BASE_SDXL if family.startswith("sdxl") else BASE_SD
    stated = presets.resolve([stated_preset(file, metadata), default])
    settings = fill_in(stated, scheduler_config, embeds_guidance=embeds_guidance)
    table = table_for(settings, scheduler_config)
    levels = np.asarray(table["sigma"], np.float64) / np.asarray(table["alpha"], np.float64)
    return Recipe(
        lora=file.name,
        base=base,
        family=family,
        settings=settings,
        timesteps=tuple(float(t) for t in table["timesteps"]),
        levels=tuple(float(level) for level in levels),
        prompt=prompt,
        size=size,
    )


def base_name(source: str | os.PathLike[str]) -> str:
    """What a base is called: ``embedded``, a hub id (of its cache's folder too), or the name of a file or folder."""
    if str(source) == EMBEDDED or Path(source) == assets() / "teacher":
        return EMBEDDED
    for part in Path(source).parts:
        if part.startswith("models--") and part.count("--") >= 2:
            return part.removeprefix("models--").replace("--", "/", 1)
    return str(source) if is_hub_id(source) else Path(source).absolute().name


def is_hub_id(source: str | os.PathLike[str]) -> bool:
    """Whether this can only be a model on the hub: ``owner/name``, of which nothing is here."""
    text = str(source)
    return text.count("/") == 1 and not text.startswith((".", "/", "~")) and not os.path.exists(source)


def checkpoint_file(recipe: Recipe) -> str:
    """The name under which user interfaces have the base as one file."""
    known, file = KNOWN_BASES.get(recipe.family, (None, None))
    if file is not None and recipe.base == known:
        return file
    return recipe.base.rpartition("/")[2].removesuffix(".safetensors") + ".safetensors"


def example_prompt(base: str) -> str:
    """A prompt for a base that nothing else is known of."""
    return "red apple, fluent flat style" if base == EMBEDDED else "a lighthouse at dusk"
