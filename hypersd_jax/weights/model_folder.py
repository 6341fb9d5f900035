"""A whole model written back as a diffusers folder."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hypersd_jax.errors import UserError
from hypersd_jax.weights.components import Components, Params
from hypersd_jax.weights.folder import read_json, save_params
from hypersd_jax.weights.keys import Kind

# What a folder holds beside the networks, copied as it is.
BESIDE = ("model_index.json", "scheduler", "tokenizer", "tokenizer_2")


def save_model(
    components: Components,
    folder: str | os.PathLike[str],
    *,
    params: Mapping[str, Params] | None = None,
    dtype: Any = None,
) -> None:
    """Write a model that diffusers' ``from_pretrained`` reads; the folder appears in one step, or not at all.

    Args:
        components: the model; its configurations, tokenizers and scheduler are copied from where it was read.
        folder: must not exist yet, or be empty.
        params: by component, in place of the model's own, such as weights with a LoRA fused in.
        dtype: type to write; None keeps that of each parameter.

    Raises:
        UserError: the folder holds something already, or cannot be written.
    """
    target = Path(folder)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target}: exists already; name a new folder")
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir(parents=True)
        for name in BESIDE:
            source = components.folder / name
            if source.is_dir():
                shutil.copytree(source, temporary / name)
            elif source.is_file():
                shutil.copyfile(source, temporary / name)
        for name, weights in (params or components.params).items():
            kind: Kind = "unet" if name == "unet" else "vae" if name == "vae" else "clip"
            config = read_json(components.folder / name / "config.json")
            save_params(temporary / name, weights, config=config, component_kind=kind, dtype=dtype)
        temporary.replace(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
