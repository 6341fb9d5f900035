"""A model as a diffusers folder: read, and written back."""

from __future__ import annotations

import json
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hypersd_jax.errors import UserError, shown
from hypersd_jax.paths import expanded
from hypersd_jax.weights.assembly import Components, Description, HostParams, Shapes, StoredModel, text_names
from hypersd_jax.weights.diffusers.component import read_json, read_params, save_params
from hypersd_jax.weights.keys import Kind
from hypersd_jax.weights.tokenizers import tokenizer_files

PIPELINES = (
    *(
        f"StableDiffusion{family}{task}Pipeline"
        for family in ("", "XL")
        for task in ("", "Img2Img", "Inpaint", "ControlNet", "ControlNetImg2Img", "ControlNetInpaint")
    ),
    # SD 1.5 with a guidance embedding: LCM_Dreamshaper_v7.
    "LatentConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
)
"""Values of `_class_name` in `model_index.json` that are read; a ControlNet in the folder is not part of the model."""

# Parts of a pipeline that check or condition images in ways that are not offered here.
IGNORED = ("safety_checker", "feature_extractor", "image_encoder")

Weights = Mapping[str, jax.Array | np.ndarray]


def kind_of(component: str) -> Kind:
    """The kind of key table that a component of a pipeline needs."""
    return "unet" if component == "unet" else "vae" if component == "vae" else "clip"


def open_folder(folder: Path) -> StoredModel:
    """Describe the model in a diffusers folder; its weights are read later.

    Raises:
        UserError: a configuration is missing or damaged, or the pipeline's class is not supported.
    """
    index = read_json(folder / "model_index.json")
    name = str(index.get("_class_name"))
    if name not in PIPELINES:
        wanted = ", ".join(PIPELINES)
        raise UserError(f"{folder / 'model_index.json'}: _class_name={shown(name)} is not supported, only {wanted}")
    if index.get("requires_aesthetics_score"):
        raise UserError(f"{folder / 'model_index.json'}: requires_aesthetics_score: the SDXL refiner is not supported")
    if present := [part for part in IGNORED if (folder / part).is_dir()]:
        warnings.warn(f"{folder}: {' and '.join(present)} not used here", stacklevel=4)
    texts = text_names(name.startswith("StableDiffusionXL"))
    tokenizers = [part.replace("text_encoder", "tokenizer") for part in texts]
    description = Description(
        origin=folder,
        configs={part: read_json(folder / part / "config.json") for part in ("unet", "vae", *texts)},
        scheduler_config=read_json(folder / "scheduler" / "scheduler_config.json"),
        model_index=index,
        tokenizers={part: tokenizer_files(folder / part) for part in tokenizers},
    )

    def read(shapes: Mapping[str, Shapes], dtypes: Mapping[str, Any]) -> Mapping[str, HostParams]:
        return {
            part: read_params(folder / part, shapes[part], dtype=dtypes[part], component_kind=kind_of(part))
            for part in shapes
        }

    return StoredModel(description=description, read=read)


def save_model(
    components: Components,
    folder: str | os.PathLike[str],
    *,
    params: Mapping[str, Weights] | None = None,
    dtype: Any = None,
) -> None:
    """Write a model that diffusers' ``from_pretrained`` reads; the folder appears in one step, or not at all.

    Args:
        components: the model; its configurations, tokenizers and scheduler are written as they were read.
        folder: must not exist yet, or be empty.
        params: by component, in place of the model's own, such as weights with a LoRA fused in.
        dtype: type to write; None keeps that of each parameter.

    Raises:
        UserError: the folder holds something already, or cannot be written.
    """
    weights = components.params if params is None else params
    write_folder(components.description, folder, weights.__getitem__, dtype=dtype)


def write_folder(
    description: Description,
    folder: str | os.PathLike[str],
    weights: Callable[[str], Weights],
    *,
    dtype: Any = None,
) -> None:
    """Write the folder of `save_model`, with each component's weights asked for when they are written."""
    target = expanded(Path(folder))
    require_free(target)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir(parents=True)
        _write_json(temporary / "model_index.json", _index_of_what_is_written(description))
        _write_json(temporary / "scheduler" / "scheduler_config.json", description.scheduler_config)
        for name, tokenizer in description.tokenizers.items():
            if tokenizer.files:
                tokenizer.write(temporary / name)
        for name, config in description.configs.items():
            save_params(temporary / name, weights(name), config=config, component_kind=kind_of(name), dtype=dtype)
        temporary.replace(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_free(folder: Path) -> None:
    """UserError where there is something already that a new model would be mixed with, or a path without a name."""
    if folder.name in ("", ".."):  # the model is first written under another name in the same folder
        raise UserError(f"{folder}: has no name of its own; name a new folder")
    try:
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise UserError(f"{folder}: exists already; name a new folder")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None


def _index_of_what_is_written(description: Description) -> dict[str, Any]:
    """The index without the parts that were not read: diffusers looks for the folder of each part that it names."""
    written = {**description.configs, **description.tokenizers, "scheduler": None}
    index = {
        name: [None, None] if isinstance(entry, list) and name not in written else entry
        for name, entry in description.model_index.items()
    }
    if "requires_safety_checker" in index:
        index["requires_safety_checker"] = False
    return index


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
