"""What lies beside an exported LoRA: a ComfyUI workflow and the web UI's settings."""

from __future__ import annotations

from pathlib import Path

from hypersd_jax.interop.comfyui import workflow, workflow_text
from hypersd_jax.interop.recipe import Recipe
from hypersd_jax.interop.webui import webui_text
from hypersd_jax.png_text import lora_hash
from hypersd_jax.weights.tensors import replacing

WORKFLOW, SETTINGS = ".comfyui.json", ".a1111.txt"
"""Endings that take the place of the LoRA's own."""


def write_beside(file: Path, recipe: Recipe) -> list[Path]:
    """Write both files beside a LoRA's and return them; no workflow where ComfyUI has no such solver."""
    nodes = workflow(recipe)
    texts = {WORKFLOW: None if nodes is None else workflow_text(nodes)}
    texts[SETTINGS] = webui_text(recipe, lora_hash=lora_hash(file))
    written = []
    for ending, text in texts.items():
        path = beside(file, ending)
        if text is None:
            path.unlink(missing_ok=True)  # of an earlier export under this name
            continue
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def beside(file: Path, ending: str) -> Path:
    """The file of this ending that lies beside a LoRA's."""
    return file.with_name(file.name.removesuffix(".safetensors") + ending)
