"""A model in one file or as a diffusers folder: its family, parts and scheduler, checked to every tensor's shape."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from hypersd_jax import presets
from hypersd_jax.inspection.report import Report, command, counted, labelled, metadata_lines, size_text
from hypersd_jax.weights.assembly import Components, parse
from hypersd_jax.weights.components import describe_components
from hypersd_jax.weights.diffusers.component import read_json
from hypersd_jax.weights.single_file.model import generation_of
from hypersd_jax.weights.tensors import open_tensors

_FAMILIES = {"sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL"}


def inspect_model(path: Path) -> Report:
    """Describe a model whose parts are all there and of the right shapes.

    Raises:
        UserError: one line naming what is missing, unknown, damaged or not supported.
    """
    components = describe_components(path, dtype=jnp.float32)
    description = components.description
    kind = generation_of(parse(description), description.is_xl)
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    dtypes: Counter[str] = Counter()
    metadata: dict[str, str] = {}
    for file in files:
        with open_tensors(file) as tensors:
            dtypes.update(tensors.dtype(key).name for key in tensors.keys())  # noqa: SIM118 - not a mapping
            metadata |= {} if path.is_dir() else tensors.metadata
    scheduler = description.scheduler_config
    data = {
        "file": str(path),
        "what": "model",
        "form": "diffusers folder" if path.is_dir() else "single file",
        "bytes": sum(file.stat().st_size for file in files),
        "dtypes": dict(dtypes),
        "family": kind,
        "pipeline": description.model_index.get("_class_name"),
        "prediction_type": scheduler.get("prediction_type", "epsilon"),
        "scheduler": scheduler.get("_class_name"),
        "pixels": _pixels(components),
        "inpainting": components.unet_config.in_channels != components.unet_config.out_channels,
        "parameters": {name: _count(shapes) for name, shapes in components.params.items()},
        "tokenizers": {name: bool(found.files) for name, found in description.tokenizers.items()},
        "metadata": metadata,
        "call": _call(path),
    }
    return Report(data=data, lines=_lines(data))


def inspect_component(path: Path) -> Report:
    """Describe one part of a pipeline in a folder of its own, such as a ControlNet or an autoencoder, by its config."""
    config = read_json(path / "config.json")
    kind = str(config.get("_class_name") or ", ".join(config.get("architectures") or ["of no named class"]))
    files = sorted(path.glob("*.safetensors"))
    parameters = 0
    for file in files:
        with open_tensors(file) as tensors:
            parameters += sum(math.prod(tensors.shape(key)) for key in tensors.keys())  # noqa: SIM118
    option = {"ControlNetModel": "--controlnet", "AutoencoderKL": "--vae", "AutoencoderTiny": "--vae"}.get(kind)
    call = None
    if option is not None:
        call = command("hypersd", "sample", "--model", "MODEL", option, str(path), "--prompt", "a lighthouse at dusk")
    size = sum(file.stat().st_size for file in files)
    data = {
        "file": str(path),
        "what": "component",
        "class": kind,
        "bytes": size,
        "parameters": parameters,
        "config": config,
        "call": call,
    }
    lines = [f"{path}: {kind}, part of a pipeline, {size_text(size)}"]
    lines.append(labelled("parameters", f"{parameters:,} in {counted(len(files), 'file')}"))
    return Report(data=data, lines=lines if call is None else [*lines, labelled("try", call)])


def _count(shapes: Mapping[str, Any]) -> int:
    return sum(math.prod(leaf.shape) for leaf in shapes.values())


def _pixels(components: Components) -> list[int] | None:
    """[height, width] of its images; None where the model does not say."""
    size = components.unet_config.sample_size
    height, width = size if isinstance(size, tuple) else (size, size)
    scale = components.vae_config.downscale
    return [height * scale, width * scale] if height and width else None


def _call(path: Path) -> str:
    name = presets.name_for_file(path)
    words = ["hypersd", "sample", "--model", str(path)]
    words += [] if name is None else ["--preset", name]
    return command(*words, "--prompt", "a lighthouse at dusk")


def _lines(data: Mapping[str, Any]) -> list[str]:
    parameters = ", ".join(f"{name} {count / 1e6:,.1f} M" for name, count in data["parameters"].items())
    form = data["form"] + (" for inpainting" if data["inpainting"] else "")
    pixels = "not said" if data["pixels"] is None else "x".join(str(side) for side in reversed(data["pixels"]))
    lines = [f"{data['file']}: {_FAMILIES[data['family']]} model, {form}, {size_text(data['bytes'])}"]
    lines.append(labelled("types", ", ".join(f"{count:,} {name}" for name, count in data["dtypes"].items())))
    lines.append(labelled("parameters", parameters))
    lines.append(labelled("predicts", f"{data['prediction_type']}, {pixels} pixels, {data['scheduler']}"))
    # A model of ours holds its whole configuration in one entry.
    shown = {key: value for key, value in data["metadata"].items() if not _is_json(value)}
    return [*lines, *metadata_lines(shown), labelled("try", data["call"])]


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
