"""Code and commands that sample with a LoRA: for diffusers, and for this package."""

from __future__ import annotations

import shlex
from typing import Any

from hypersd_jax.interop.recipe import Recipe

_SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "tcd": "TCDScheduler",
    "lcm": "LCMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
}
_LISTED = ("tcd", "lcm")
"""Schedulers of diffusers that take a list of timesteps as it is."""


def diffusers_code(recipe: Recipe, repo: str, base: str) -> str | None:
    """Python for diffusers; None where it has no such call: a solver of its own, or DDIM at other timesteps.

    Args:
        recipe: the call.
        repo: where the LoRA is: a hub id or a folder.
        base: the base model, likewise.
    """
    settings = recipe.settings
    scheduler = _SCHEDULERS.get(settings.sampler)
    if scheduler is None or (settings.timesteps is not None and not _can_list(recipe)):
        return None
    changed: dict[str, Any] = {}
    if settings.sampler not in _LISTED:
        changed["timestep_spacing"] = settings.spacing or "trailing"
    elif settings.timesteps is None and settings.original_inference_steps is not None:
        changed["original_inference_steps"] = settings.original_inference_steps
    if settings.prediction_type == "sample":
        changed["prediction_type"] = "sample"
    call: dict[str, Any] = {"num_inference_steps": settings.steps}
    if settings.timesteps is not None and settings.sampler in _LISTED:
        call["timesteps"] = [int(t) for t in recipe.timesteps]
    if settings.sampler in ("ddim", "tcd"):
        call["eta"] = settings.eta
    call["guidance_scale"] = settings.guidance
    width, height = recipe.size
    call |= {"width": width, "height": height}
    given = "".join(f", {name}={value!r}" for name, value in changed.items())
    return "\n".join(
        [
            "import torch",
            f"from diffusers import DiffusionPipeline, {scheduler}",
            "",
            f'pipe = DiffusionPipeline.from_pretrained("{base}")',
            f'pipe.load_lora_weights("{repo}", weight_name="{recipe.lora}")',
            f"pipe.scheduler = {scheduler}.from_config(pipe.scheduler.config{given})",
            "image = pipe(",
            f"    {recipe.prompt!r},",
            *(f"    {name}={value!r}," for name, value in call.items()),
            f"    generator=torch.Generator().manual_seed({recipe.seed}),",
            ").images[0]",
        ]
    )


def hypersd_command(recipe: Recipe, lora: str, base: str) -> str:
    """The command of this package; the settings are in the LoRA's header."""
    words = ["hypersd", "sample", *([] if base == "embedded" else ["--model", base]), "--lora", lora]
    return shlex.join([*words, "--seed", str(recipe.seed), "--prompt", recipe.prompt])


def _can_list(recipe: Recipe) -> bool:
    """Whether diffusers' scheduler of this solver can be told the recipe's timesteps."""
    return recipe.settings.sampler in _LISTED or (recipe.settings.sampler == "ddim" and recipe.is_trailing)
