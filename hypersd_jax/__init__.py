"""Hyper-SD in JAX: distil a Stable Diffusion model into a few-step LoRA, sample with it, export it everywhere.

import hypersd_jax as hs
pipe = hs.Pipeline.from_pretrained("embedded")
pipe.load_lora("loras/tscd-4.safetensors")
images = pipe("red apple, fluent flat style")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hypersd_jax import adapters, diffusion, distill, rewards
    from hypersd_jax.config import load_config
    from hypersd_jax.errors import UserError
    from hypersd_jax.pipeline import Pipeline
    from hypersd_jax.planning.plan import plan_run
    from hypersd_jax.png_text import save_images
    from hypersd_jax.stages import train
    from hypersd_jax.weights.conversion import convert_model
    from hypersd_jax.weights.lora.convert import convert_lora
    from hypersd_jax.weights.lora.extract import extract_lora
    from hypersd_jax.weights.lora.merge import merge_loras

__version__ = "0.1.0"
__all__ = [
    "Pipeline",
    "UserError",
    "adapters",
    "convert_lora",
    "convert_model",
    "diffusion",
    "distill",
    "extract_lora",
    "load_config",
    "merge_loras",
    "plan_run",
    "rewards",
    "save_images",
    "train",
]

_HOMES = {
    "Pipeline": "pipeline",
    "UserError": "errors",
    "convert_lora": "weights.lora.convert",
    "convert_model": "weights.conversion",
    "extract_lora": "weights.lora.extract",
    "load_config": "config",
    "merge_loras": "weights.lora.merge",
    "plan_run": "planning.plan",
    "save_images": "png_text",
    "train": "stages",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that ``--help`` and usage errors do not wait for JAX."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    """List the names that are imported on first use, for completion."""
    return sorted(__all__)
