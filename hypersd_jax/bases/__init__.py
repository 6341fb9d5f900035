"""Base models behind one protocol: all that stages, sampling, evaluation and the encoding of data see of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from hypersd_jax.bases.base import HALF as HALF
from hypersd_jax.bases.base import Base as Base
from hypersd_jax.bases.base import Features as Features
from hypersd_jax.bases.base import Networks as Networks
from hypersd_jax.bases.base import in_one_call as in_one_call
from hypersd_jax.bases.base import with_dropped as with_dropped
from hypersd_jax.bases.stable_diffusion import StableDiffusion as StableDiffusion
from hypersd_jax.bases.text_to_image import ControlInputs as ControlInputs
from hypersd_jax.bases.text_to_image import TextToImage as TextToImage
from hypersd_jax.weights.components import load_components


def load_base(source: str | Path, *, dtype: Any, mesh: Mesh | None = None) -> StableDiffusion:
    """Load the model that ``source`` names, of whatever family it is.

    Args:
        source: a diffusers folder, a single .safetensors file, the hub id of either, or ``embedded``.
        dtype: of parameters and computation.
        mesh: devices with axes ``data`` and ``fsdp``: large parameters are split over ``fsdp``.

    Raises:
        UserError: one line naming the file or key that is missing, unsupported or damaged.
    """
    return StableDiffusion(components=load_components(source, dtype=dtype, mesh=mesh), dtype=dtype, mesh=mesh)
