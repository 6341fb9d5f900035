"""An image: the settings that it was sampled with, as A1111, this package or ComfyUI wrote them into the file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, UnidentifiedImageError

from hypersd_jax.diffusion import SOLVERS
from hypersd_jax.errors import UserError
from hypersd_jax.inspection.report import Report, command, counted, labelled, option, shortened

_ENTRY = re.compile(r'\s*(?P<key>\w[\w /-]+):\s*(?P<value>"(?:\\.|[^"\\])+"|[^,]*)(?:,|$)')
_LORA = re.compile(r"<lora:(?P<name>[^:>]+):(?P<scale>[^:>]+)[^>]*>")
_FEWEST = 3
"""Entries by which A1111 tells a line of settings from one of the prompt."""


def inspect_image(path: Path) -> Report:
    """Describe an image; its pixels are not decoded.

    Raises:
        UserError: it cannot be read as an image.
    """
    try:
        with Image.open(path) as image:
            size, kind, texts = image.size, image.format, _texts(image)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, ValueError, SyntaxError) as error:
        raise UserError(f"{path}: cannot be read as an image ({' '.join(str(error).split())})") from None
    data: dict[str, Any] = {"file": str(path), "what": "image", "format": kind, "size": list(size), "call": None}
    lines = [f"{path}: {kind} image, {size[0]}x{size[1]}"]
    if "parameters" in texts:
        found = parse_settings(texts["parameters"])
        data |= {**found, "call": _call(found)}
        lines.append(labelled("prompt", shortened(found["prompt"])))
        lines += [labelled("negative", shortened(found["negative"]))] if found["negative"] else []
        lines += [labelled("LoRA", f"{each['name']} at {each['scale']}") for each in found["loras"]]
        lines += [labelled("settings", f"{key}: {shortened(value)}") for key, value in found["settings"].items()]
        number = found["settings"].get("Image", "0.0")
        data["alone"] = number == "0.0"
        if number != "0.0":
            text = (
                f"it was {number} among several prompts and images (prompt.image, from 0), so alone it has other noise"
            )
            lines.append(labelled("note", text))
        lines.append(labelled("try", data["call"]))
    nodes = _comfyui_nodes(texts)
    if nodes is not None:
        data["comfyui_nodes"] = nodes
        lines.append(labelled("ComfyUI", f"a workflow of {counted(sum(nodes.values()), 'node')}: {', '.join(nodes)}"))
    if len(lines) == 1:
        lines.append(labelled("settings", "it holds none"))
    return Report(data=data, lines=lines)


def parse_settings(text: str) -> dict[str, Any]:
    """Read A1111's text: ``{"prompt", "negative", "loras": [{"name", "scale"}], "settings": {key: value}}``."""
    lines = text.strip().split("\n")
    entries = list(_ENTRY.finditer(lines[-1]))
    if len(entries) >= _FEWEST:
        lines.pop()
    else:
        entries = []
    prompt: list[str] = []
    negative: list[str] | None = None
    for line in lines:
        if line.startswith("Negative prompt:"):
            negative = [line.removeprefix("Negative prompt:").strip()]
        else:
            (prompt if negative is None else negative).append(line)
    written = "\n".join(prompt)
    return {
        "prompt": _LORA.sub("", written).strip(),
        "negative": "\n".join(negative or []),
        "loras": [{"name": found["name"], "scale": found["scale"]} for found in _LORA.finditer(written)],
        "settings": {entry["key"]: _value(entry["value"]) for entry in entries},
    }


def _texts(image: Image.Image) -> dict[str, str]:
    """The texts in a file, A1111's under "parameters" whatever the format."""
    found = {key: value for key, value in image.info.items() if isinstance(key, str) and isinstance(value, str)}
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    if isinstance(comment, bytes) and comment.startswith(b"UNICODE\0"):
        found.setdefault("parameters", comment[8:].decode("utf-16-be", "replace"))
    return found


def _value(text: str) -> str:
    if len(text) > 1 and text[0] == text[-1] == '"':
        try:
            return str(json.loads(text))
        except (ValueError, RecursionError):
            return text
    return text.strip()


def _call(found: Mapping[str, Any]) -> str:
    """The command that samples such an image; settings that have no option here are left to the reader."""
    settings = found["settings"]
    model = settings.get("Model")
    words = ["hypersd", "sample"] + ([] if model == "embedded" else ["--model", model or "MODEL"])
    for lora in found["loras"]:
        words += ["--lora", f"{lora['name']}@{lora['scale']}"]
    words += ["--lora-dir", "FOLDER"] if found["loras"] else []
    samplers = {solver.webui_name: name for name, solver in SOLVERS.items()}
    width, _, height = settings.get("Size", "").partition("x")
    steps = settings.get("Timesteps")
    options = {
        "sampler": samplers.get(settings.get("Sampler", "")),
        "steps": settings.get("Steps"),
        "eta": settings.get("Eta") or settings.get("Eta DDIM"),
        "guidance": settings.get("CFG scale"),
        "timesteps": steps.replace(" ", "") if steps else None,
        "seed": settings.get("Seed"),
        "width": width,
        "height": height,
    }
    for name, value in options.items():
        words += option(name, value) if value else []
    words += option("negative-prompt", found["negative"]) if found["negative"] else []
    return command(*words, *option("prompt", found["prompt"]))


def _comfyui_nodes(texts: Mapping[str, str]) -> dict[str, int] | None:
    """How many nodes of each class ComfyUI's prompt has; None where there is none, or another program's text."""
    try:
        nodes = json.loads(texts.get("prompt", ""))
        kinds = [str(node["class_type"]) for node in nodes.values()]
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError):
        return None
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
