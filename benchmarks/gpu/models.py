"""Full-size models with random weights in memory: neither a download nor gigabytes on the disk."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.model_configs import SCHEDULER, model_configs, text_encoders
from hypersd_jax.bases import StableDiffusion
from hypersd_jax.compilation import use_compilation_cache
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.weights.assembly import Description, StoredModel, load
from hypersd_jax.weights.components import assets, default_dtype
from hypersd_jax.weights.families import model_index
from hypersd_jax.weights.tokenizers import tokenizer_files


def start(*, tiny: bool) -> jax.Device:
    """Return the device that is measured, and keep compiled programs; without a GPU the process ends, unless tiny."""
    use_compilation_cache()
    device = jax.devices()[0]
    if not tiny and device.platform != "gpu":
        sys.exit(f"JAX has no GPU, only {device.device_kind}; JAX_PLATFORMS is {os.environ.get('JAX_PLATFORMS')}")
    return device


def stored_model(family: str, *, tiny: bool) -> StoredModel:
    """Describe a family's model whose weights are random numbers when they are read."""
    configs = model_configs(family, tiny=tiny)
    names = text_encoders(configs)
    tokenizer = tokenizer_files(assets() / "teacher" / "tokenizer")
    description = Description(
        origin=Path(f"random {family}"),
        configs=configs,
        scheduler_config={"_class_name": "DDIMScheduler", **SCHEDULER},
        model_index=model_index("DDIMScheduler", xl=len(names) > 1, inpainting=False),
        tokenizers={name.replace("text_encoder", "tokenizer"): tokenizer for name in names},
    )

    def read(shapes: Mapping[str, Mapping[str, Any]], dtypes: Mapping[str, Any]) -> dict[str, Any]:
        return {name: _random_params(part, dtypes[name]) for name, part in shapes.items()}

    return StoredModel(description=description, read=read)


def pipeline(family: str, *, tiny: bool) -> Pipeline:
    """Build a pipeline in bfloat16 on a GPU, in float32 on a CPU."""
    dtype = default_dtype()
    components = load(stored_model(family, tiny=tiny), dtype=dtype)
    pipe = Pipeline(StableDiffusion(components=components, dtype=dtype))
    jax.block_until_ready(pipe.base.params)
    return pipe


def _random_params(shapes: Mapping[str, jax.ShapeDtypeStruct], dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yield PyTorch's first weights, norms being the identity and biases zero.

    Leaves of one kind and shape are copies of one array: a network of billions of weights is drawn in seconds, and runs
    as fast as any other.
    """
    random = np.random.default_rng(0)
    known: dict[tuple[bool, tuple[int, ...]], np.ndarray] = {}
    for path, leaf in shapes.items():
        name = path.rpartition(".")[2]
        if name in ("bias", "scale"):
            yield path, np.full(leaf.shape, name == "scale", dtype)
            continue
        key = name == "kernel", leaf.shape
        if key not in known:
            bound = math.prod(leaf.shape[:-1]) ** -0.5 if name == "kernel" else 0.03
            known[key] = ((2 * random.random(leaf.shape, np.float32) - 1) * bound).astype(dtype)
        yield path, known[key]


def peak_bytes(device: jax.Device) -> int | None:
    """Return the most memory that this process has held on the device, compilation included; None on a CPU."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use")
