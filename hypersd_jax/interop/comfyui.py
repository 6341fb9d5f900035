"""A ComfyUI workflow that samples with a LoRA as its header says, of nodes that every ComfyUI has.

In ComfyUI's API format, which its page opens like any other workflow, by dragging the file there, and its server takes
under ``/prompt``: ``{id: {"class_type", "inputs", "_meta": {"title"}}}``, where an input is a value or a link
``[id of a node, number of its output]``.

Its samplers walk noise levels sigma / alpha, in which DDIM without fresh noise is Euler's method, DDIM with eta is the
ancestral one with that eta, and TCD with eta 1 re-noises the clean prediction, as LCM does. Of TCD with an eta between
nothing there is the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hypersd_jax.interop.recipe import Recipe, checkpoint_file, simple

Workflow = dict[str, dict[str, Any]]

_PLAIN = {"lcm": "lcm", "euler": "euler", "euler_a": "euler_ancestral", "dpmpp_2m": "dpmpp_2m"}


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A sampler of ComfyUI's.

    Attributes:
        name: of its list; "" for the node of the ancestral one with an eta.
        eta: of that node.
        note: in which way it is not the recipe's; "" where it is.
    """

    name: str
    eta: float = 1.0
    note: str = ""


def sampler_of(recipe: Recipe) -> Sampler | None:
    """ComfyUI's sampler for a recipe; None for a solver that is not of this package."""
    solver, eta = recipe.settings.sampler, recipe.settings.eta
    if solver in ("ddim", "tcd") and eta == 0:
        return Sampler(name="euler")
    if solver == "ddim":
        return Sampler(name="", eta=eta)
    if solver == "tcd":
        if eta == 1:
            return Sampler(name="lcm")
        return Sampler(name="euler", note=f"TCD's eta {eta:g} has no node here, this is eta 0")
    return Sampler(name=_PLAIN[solver]) if solver in _PLAIN else None


def workflow(recipe: Recipe) -> Workflow | None:
    """The nodes of a recipe's call; None where ComfyUI has no such solver."""
    sampler = sampler_of(recipe)
    if sampler is None:
        return None
    settings = recipe.settings
    nodes = _Nodes()
    loaded = nodes.add("CheckpointLoaderSimple", "Base model", ckpt_name=checkpoint_file(recipe))
    lora = nodes.add(
        "LoraLoader",
        recipe.name,
        model=[loaded, 0],
        clip=[loaded, 1],
        lora_name=recipe.lora,
        strength_model=1.0,
        strength_clip=1.0,
    )
    model = lora
    if settings.prediction_type == "sample":
        model = nodes.add("ModelSamplingDiscrete", "It predicts x0", model=[lora, 0], sampling="x0", zsnr=False)
    positive = nodes.add("CLIPTextEncode", "Prompt", clip=[lora, 1], text=recipe.prompt)
    title = "Negative prompt" if recipe.is_guided else "Negative prompt: without guidance it has no part"
    negative = nodes.add("CLIPTextEncode", title, clip=[lora, 1], text="")
    width, height = recipe.size
    latent = nodes.add("EmptyLatentImage", "Size", width=width, height=height, batch_size=1)
    common = {
        "model": [model, 0],
        "cfg": settings.guidance if recipe.is_guided else 1.0,
        "positive": [positive, 0],
        "negative": [negative, 0],
        "latent_image": [latent, 0],
    }
    title = _title(recipe, sampler)
    if sampler.name and recipe.timesteps == simple(settings.steps):
        more = {"steps": settings.steps, "sampler_name": sampler.name, "scheduler": "simple", "denoise": 1.0}
        sampled = nodes.add("KSampler", title, seed=recipe.seed, **common, **more)
    else:
        if sampler.name:
            chosen = nodes.add("KSamplerSelect", "Sampler", sampler_name=sampler.name)
        else:
            chosen = nodes.add("SamplerEulerAncestral", "Sampler", eta=sampler.eta, s_noise=1.0)
        listed = ", ".join(f"{level:.7f}" for level in (*recipe.levels, 0.0))
        sigmas = nodes.add("ManualSigmas", "Noise levels of its timesteps", sigmas=listed)
        more = {"add_noise": True, "noise_seed": recipe.seed, "sampler": [chosen, 0], "sigmas": [sigmas, 0]}
        sampled = nodes.add("SamplerCustom", title, **common, **more)
    decoded = nodes.add("VAEDecode", "Decode", samples=[sampled, 0], vae=[loaded, 2])
    nodes.add("SaveImage", "Save", images=[decoded, 0], filename_prefix=recipe.name)
    return nodes.found


def workflow_text(nodes: Mapping[str, Any]) -> str:
    """A workflow as its file has it."""
    return json.dumps(nodes, indent=2, ensure_ascii=False) + "\n"


class _Nodes:
    """A workflow that grows, its ids counted from 1."""

    def __init__(self) -> None:
        self.found: Workflow = {}

    def add(self, kind: str, title: str, **inputs: Any) -> str:
        name = str(len(self.found) + 1)
        self.found[name] = {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}
        return name


def _title(recipe: Recipe, sampler: Sampler) -> str:
    settings = recipe.settings
    steps = f"{settings.steps} step" + ("" if settings.steps == 1 else "s")
    return f"{settings.sampler}, {steps}" + (f" ({sampler.note})" if sampler.note else "")
