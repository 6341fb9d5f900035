"""Base models behind one protocol: all that stages, sampling, evaluation and the encoding of data see of a model."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from hypersd_jax.bases.base import HALF as HALF
from hypersd_jax.bases.base import Base as Base
from hypersd_jax.bases.base import Features as Features
from hypersd_jax.bases.base import Networks as Networks
from hypersd_jax.bases.base import in_one_call as in_one_call
from hypersd_jax.bases.base import in_one_loop as in_one_loop
from hypersd_jax.bases.base import with_dropped as with_dropped
from hypersd_jax.bases.stable_diffusion import StableDiffusion as StableDiffusion
from hypersd_jax.bases.text_to_image import ControlInputs as ControlInputs
from hypersd_jax.bases.text_to_image import TextToImage as TextToImage
from hypersd_jax.weights.components import describe_components, load_components


def load_base(
    source: str | Path,
    *,
    dtype: Any,
    mesh: Mesh | None = None,
    resolution: int | None = None,
    remat: bool = False,
    param_dtype: Any = None,
    fresh: Collection[str] = (),
    seed: int = 0,
) -> TextToImage:
    """Load the model that ``source`` names: the one place that decides its family.

    Args:
        source: a diffusers folder, a single .safetensors file, the hub id of either, or ``embedded``.
        dtype: of the computation.
        mesh: devices with axes ``data`` and ``fsdp``: large parameters are split over ``fsdp``.
        resolution: side of a training run's images in pixels; None is the model's own.
        remat: recompute activations in the backward pass.
        param_dtype: of the parameters, where it is not that of the computation: float32 for weights that are trained.
        fresh: components whose weights are random instead, from ``seed``.
        seed: see ``fresh``.

    Raises:
        UserError: one line naming the file or key that is missing, unsupported or damaged.
    """
    how: dict[str, Any] = {"remat": remat, "param_dtype": param_dtype, "fresh": fresh, "seed": seed}
    components = load_components(source, dtype=dtype, mesh=mesh, **how)
    return StableDiffusion(components=components, dtype=dtype, mesh=mesh, resolution=resolution, remat=remat)


def describe_base(
    source: str | Path,
    *,
    dtype: Any,
    mesh: Mesh | None = None,
    resolution: int | None = None,
    remat: bool = False,
    param_dtype: Any = None,
    fresh: Collection[str] = (),
    read: Collection[str] = (),
) -> TextToImage:
    """Describe the model that `load_base` would load, with `jax.ShapeDtypeStruct`s in place of its parameters.

    Args:
        source, dtype, resolution, remat, param_dtype, fresh: as of `load_base`.
        mesh: what the networks are traced for.
        read: components that are read all the same.

    Raises:
        UserError: as `load_base`, but for weights that are not finite.
    """
    how: dict[str, Any] = {"remat": remat, "param_dtype": param_dtype, "fresh": fresh, "read": read}
    components = describe_components(source, dtype=dtype, mesh=mesh, **how)
    return StableDiffusion(components=components, dtype=dtype, mesh=mesh, resolution=resolution, remat=remat)
