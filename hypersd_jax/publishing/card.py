"""The model card, README.md: YAML that the hub reads, and all that a reader needs to get the same images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from hypersd_jax.evaluation.columns import column_notes
from hypersd_jax.evaluation.run_comparison import SHOWN_SETTINGS
from hypersd_jax.evaluation.tables import markdown_table
from hypersd_jax.interop.beside import SETTINGS, WORKFLOW
from hypersd_jax.interop.comfyui import sampler_of
from hypersd_jax.interop.snippets import diffusers_code, hypersd_command
from hypersd_jax.interop.webui import webui_settings, webui_text
from hypersd_jax.publishing.contents import Contents, Exported
from hypersd_jax.publishing.images import Reference

PROJECT = "hypersd_jax"
_FAMILY_TAGS = {"sd_v1": "stable-diffusion", "sd_v2": "stable-diffusion", "sdxl_base_v1-0": "stable-diffusion-xl"}


def model_card(
    contents: Contents, repo: str, references: Mapping[str, Sequence[Reference]], *, licence: str, licence_is: str
) -> str:
    """Write the card.

    Args:
        contents: the run.
        repo: the hub id that it is published under.
        references: images by LoRA.
        licence: the hub's id of the licence.
        licence_is: where it is from, in words.
    """
    named = contents.base_model or contents.base
    kinds = ", ".join(dict.fromkeys(lora.stage.kind for lora in contents.loras))
    parts = [
        f"# {repo.partition('/')[2]}",
        f"Few-step LoRAs for **{named}**, trained with {PROJECT} ({kinds}). Each says in its safetensors header how to "
        "sample with it; other programs must be told.",
        _base_note(contents),
        "## Settings",
        _settings_table(contents.loras),
        *_eta_notes(contents.loras),
        *_images(contents, references),
        *_measured(contents),
        *_usage(contents, repo),
        "## Training",
        _training(contents),
        "## Licence",
        f"`{licence}`, {licence_is}.",
    ]
    return f"---\n{_front_matter(contents, licence)}---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(contents: Contents, licence: str) -> str:
    family = _FAMILY_TAGS.get(contents.loras[0].recipe.family)
    matter: dict[str, Any] = {"license": licence, "library_name": "diffusers", "pipeline_tag": "text-to-image"}
    if contents.base_model is not None:
        matter |= {"base_model": contents.base_model, "base_model_relation": "adapter"}
    methods = sorted({lora.stage.kind for lora in contents.loras})
    tags = ["text-to-image", "diffusers", "lora", family, "few-step", "distillation", "hyper-sd", *methods, PROJECT]
    matter["tags"] = [tag for tag in dict.fromkeys(tags) if tag]
    return yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)


def _base_note(contents: Contents) -> str:
    if contents.base == "embedded":
        made = "hypersd convert model embedded BASE --to diffusers"
        return (
            f"The base is the small model inside {PROJECT}; `{made}` writes it as a folder for diffusers. ComfyUI and "
            "the web UIs know no model of its size, so that what is for them here shows settings alone."
        )
    if contents.base_model is None:
        return f"The base was read from a folder or file called `{contents.base}`, which has no address here."
    return ""


def _settings_table(loras: Sequence[Exported]) -> str:
    rows = ["| file | sampler | steps | timesteps | eta | guidance | rank |", "|---|---|---|---|---|---|---|"]
    for lora in loras:
        recipe, settings = lora.recipe, lora.recipe.settings
        timesteps = ", ".join(f"{t:g}" for t in recipe.timesteps)
        eta = f"{settings.eta:g}" if settings.sampler in ("ddim", "tcd") else "-"
        rank = lora.metadata.get("ss_network_dim", "-")
        others = [str(each["steps"]) for each in lora.stage.samplings if each["steps"] != settings.steps]
        steps = f"{settings.steps}" + (f" (also {', '.join(others)})" if others else "")
        cells = [f"`{recipe.lora}`", settings.sampler, steps, timesteps, eta, f"{settings.guidance:g}", rank]
        rows.append(f"| {' | '.join(map(str, cells))} |")
        rows += [f"| `{part.name}` | a part of the one above, to scale by itself | | | | | |" for part in lora.parts]
    return "\n".join(rows)


def _eta_notes(loras: Sequence[Exported]) -> list[str]:
    notes = ["Strength 1. Guidance 0 or 1 is off (a web UI's CFG scale 1), and a negative prompt then has no part."]
    if any(lora.recipe.settings.sampler == "tcd" for lora in loras):
        notes.append(
            "`tcd` is diffusers' `TCDScheduler`. Its eta (the paper's gamma) is the share of fresh noise, 0 (none) to "
            "1 (all). No other sampler's eta is the same; a program without TCD is nearest with Euler at 0, LCM at 1."
        )
    return notes


def _images(contents: Contents, references: Mapping[str, Sequence[Reference]]) -> list[str]:
    parts = []
    for lora in contents.loras:
        found = references.get(lora.recipe.name, ())
        if not found:
            continue
        parts.append(f"`{lora.recipe.lora}`")
        head = " | ".join(f"seed {each.seed}" for each in found)
        pictures = " | ".join(f"![{_cell(each.prompt)}]({each.path})" for each in found)
        prompts = " | ".join(_cell(each.prompt) for each in found)
        parts.append(f"| {head} |\n|{'---|' * len(found)}\n| {pictures} |\n| {prompts} |")
    if parts:
        again = (
            f"Sampled by {PROJECT}, each as the only image of its prompt: `hypersd sample --lora ... --prompt ... "
            "--seed ...` makes the same. Other programs draw other noise from a seed. Each file holds its settings."
        )
        parts = ["## Reference images", again, *parts]
    if contents.grid is not None:
        parts += ["The run's own comparison, the same latents along each row:", "![grid](grid.png)"]
    return parts


def _measured(contents: Contents) -> list[str]:
    if not contents.rows:
        return []
    keys = [key for row in contents.rows for key in row]
    protocols = dict.fromkeys(str(row["protocol"]) for row in contents.rows if row.get("protocol"))
    parts = ["## Measured", markdown_table(contents.rows).strip()]
    parts += [f"Protocol `{name}`: figures of another protocol do not compare." for name in protocols]
    return [*parts, *column_notes(keys)]


def _usage(contents: Contents, repo: str) -> list[str]:
    base = contents.base_model or "BASE"
    parts = []
    for lora in contents.loras:
        recipe = lora.recipe
        code = diffusers_code(recipe, repo, base)
        if code is not None:
            parts += [f"`{recipe.lora}`:", f"```python\n{code}\n```"]
        else:
            parts.append(f"`{recipe.lora}`: diffusers has no scheduler that takes these timesteps.")
    parts = ["## In diffusers", *parts]
    first = contents.loras[0].recipe
    notes = [
        f"`{lora.recipe.name}`: {sampler.note}"
        for lora in contents.loras
        if (sampler := sampler_of(lora.recipe)) is not None and sampler.note
    ]
    parts += [
        "## In ComfyUI",
        f"Put the LoRA into `models/loras` and drag its workflow (`{first.name}{WORKFLOW}`) onto the page; choose your "
        "file of the base in the first node." + "".join(f" {note}." for note in notes),
        "## In AUTOMATIC1111, Forge",
        f"Put the LoRA into `models/Lora`, paste its text (`{first.name}{SETTINGS}`) into the prompt and press the "
        "arrow below *Generate*:",
    ]
    for lora in contents.loras:
        parts.append(f"```text\n{webui_text(lora.recipe)}```")
        parts += [f"`{lora.recipe.name}`: {note}." for note in webui_settings(lora.recipe).notes]
    own = "embedded" if contents.base == "embedded" else base
    commands = [hypersd_command(lora.recipe, f"{repo}/{lora.recipe.lora}", own) for lora in contents.loras]
    lines = "\n".join(commands)
    return [*parts, f"## In {PROJECT}", f"```sh\n{lines}\n```"]


def _training(contents: Contents) -> str:
    config = contents.config
    data = config.data.source
    shown = data if data == "emoji" or (data.count("/") == 1 and not data.startswith(("/", ".", "~"))) else "one's own"
    rows = [f"* data: {shown}", f"* LoRA rank {config.lora.rank}, seed {config.seed}"]
    for lora in contents.loras:
        settings = dataclasses.asdict(lora.stage)
        told = ", ".join(f"{key} {_plain(settings[key])}" for key in (*SHOWN_SETTINGS, "guidance") if key in settings)
        rows.append(f"* `{lora.stage.name}` ({lora.stage.kind}): {told}")
    return "\n".join(rows)


def _plain(value: Any) -> str:
    if isinstance(value, tuple | list):
        return "-".join(_plain(each) for each in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    """A text inside a cell of a table."""
    return " ".join(text.split()).replace("|", "/").replace("[", "(").replace("]", ")")
