"""A LoRA's settings as AUTOMATIC1111's web UI and Forge read them: pasted into the prompt, the arrow below it sets all.

    PROMPT <lora:NAME:1>
    Steps: 4, Sampler: Euler, Schedule type: Simple, CFG scale: 1, Seed: 0, Size: 512x512, Model: NAME

The web UI's own DDIM knows leading timesteps alone, so that DDIM without fresh noise is Euler's method there. Its
schedule ``Simple`` has the trailing timesteps, and it has none for the 50-point grid of TCD and LCM.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypersd_jax.diffusion import SOLVERS
from hypersd_jax.interop.recipe import Recipe, checkpoint_file, simple
from hypersd_jax.png_text import schedule_type


@dataclass(frozen=True, kw_only=True)
class WebuiSettings:
    """What to choose in the web UI.

    Attributes:
        sampler: of its list.
        schedule: of its schedule types; None leaves it as it is.
        eta: of ancestral samplers; None leaves it.
        notes: in which ways this is not the recipe's call; empty where it is.
    """

    sampler: str
    schedule: str | None
    eta: float | None
    notes: tuple[str, ...]


def webui_settings(recipe: Recipe) -> WebuiSettings:
    """The nearest to a recipe that the web UI has."""
    settings = recipe.settings
    solver, eta = settings.sampler, settings.eta
    notes = []
    name, ancestral = SOLVERS[solver].webui_name, None
    if solver in ("ddim", "tcd"):
        name = "Euler"
        if solver == "ddim" and eta > 0:
            name, ancestral = "Euler a", eta
        elif eta >= 0.5:
            name = "LCM"
        if solver == "tcd" and 0 < eta < 1:
            notes.append(f"TCD's eta {eta:g} is {int(eta >= 0.5)} here")
    schedule = "Simple"
    if recipe.timesteps != simple(settings.steps):
        own = schedule_type(settings) if solver not in ("ddim", "tcd", "lcm") else None
        schedule = own or "Simple"
        if own is None:
            wanted = ", ".join(f"{t:g}" for t in recipe.timesteps)
            notes.append(f"its timesteps are {wanted}, which the web UI cannot be told; Simple is near")
    return WebuiSettings(sampler=name, schedule=schedule, eta=ancestral, notes=tuple(notes))


def webui_text(recipe: Recipe, *, lora_hash: str | None = None) -> str:
    """The text to paste.

    Args:
        recipe: the call.
        lora_hash: `png_text.lora_hash` of the LoRA's file, by which the web UI knows it under another name.
    """
    settings, chosen = recipe.settings, webui_settings(recipe)
    values = {
        "Steps": str(settings.steps),
        "Sampler": chosen.sampler,
        "Schedule type": chosen.schedule,
        "CFG scale": f"{settings.guidance if recipe.is_guided else 1:g}",
        "Seed": str(recipe.seed),
        "Size": "x".join(map(str, recipe.size)),
        "Model": checkpoint_file(recipe).removesuffix(".safetensors"),
        "Eta": None if chosen.eta is None else f"{chosen.eta:g}",
        "Lora hashes": None if lora_hash is None else f'"{recipe.name}: {lora_hash}"',
    }
    line = ", ".join(f"{key}: {value}" for key, value in values.items() if value is not None)
    return f"{recipe.prompt} <lora:{recipe.name}:1>\n{line}\n"
