"""The header of a single file: the entries of the public model specification, and one that makes it complete."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hypersd_jax.errors import UserError
from hypersd_jax.weights.assembly import Description, Structure, is_xl, text_names
from hypersd_jax.weights.diffusers.model import PIPELINES
from hypersd_jax.weights.single_file.configs import Generation
from hypersd_jax.weights.tensors import TensorFile
from hypersd_jax.weights.tokenizers import TokenizerFiles, is_clip_tokenizer

KEY = "hypersd.model"
"""JSON of ``{"configs", "model_index", "tokenizers"}``: all that the tensors do not show."""


@dataclass(frozen=True, kw_only=True)
class Stated:
    """The configuration in a file's header; empty where it was written by another program."""

    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    model_index: Mapping[str, Any] = field(default_factory=dict)
    tokenizers: Mapping[str, TokenizerFiles] = field(default_factory=dict)


def pad_token(kind: Generation, tokenizer: str) -> str:
    """The token that pads prompts: see `tokenizers.clip_tokenizer`."""
    return "!" if kind == "sd2" or tokenizer == "tokenizer_2" else "<|endoftext|>"


def read_header(file: TensorFile, kind: Generation) -> Stated:
    """Read what `write_header` wrote; UserError where the entry is not of that form, or of a model of another kind."""
    text = file.metadata.get(KEY)
    if text is None:
        return Stated()
    try:
        content = json.loads(text)
        tokenizers = {
            role: TokenizerFiles(
                origin=f"{file.path} ({role})", files={name: text.encode() for name, text in files.items()}
            )
            for role, files in content["tokenizers"].items()
        }
        configs = {name: dict(config) for name, config in content["configs"].items()}
        stated = Stated(configs=configs, model_index=dict(content["model_index"]), tokenizers=tokenizers)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        raise UserError(f"{file.path}: its header's {KEY} is damaged") from None
    index = stated.model_index
    if index.get("_class_name") not in PIPELINES or is_xl(index) != (kind == "sdxl"):
        raise UserError(f"{file.path}: its header's {KEY} is of another model")
    if any("/" in name or "\\" in name or name.startswith(".") for part in tokenizers.values() for name in part.files):
        raise UserError(f"{file.path}: its header's {KEY} names a tokenizer file outside the tokenizer's folder")
    return stated


def write_header(description: Description, structure: Structure, kind: Generation) -> dict[str, str]:
    """The metadata of a file that holds this model."""
    prediction = description.scheduler_config.get("prediction_type", "epsilon")
    size = structure.unet.sample_size
    height, width = size if isinstance(size, tuple) else (size, size)
    scale = structure.vae.downscale
    architecture = {
        "sd1": "stable-diffusion-v1",
        "sd2": "stable-diffusion-v2-768-v" if prediction == "v_prediction" else "stable-diffusion-v2-512",
        "sdxl": "stable-diffusion-xl-v1-base",
    }[kind]
    header = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.prediction_type": "v" if prediction == "v_prediction" else prediction,
        "modelspec.title": description.origin.stem,
    }
    if height and width:
        header["modelspec.resolution"] = f"{width * scale}x{height * scale}"
    content = {
        "configs": {**description.configs, "scheduler": description.scheduler_config},
        "model_index": description.model_index,
        "tokenizers": unusual_tokenizers(description, structure, kind),
    }
    return {**header, KEY: json.dumps(content, sort_keys=True)}


def unusual_tokenizers(description: Description, structure: Structure, kind: Generation) -> dict[str, dict[str, str]]:
    """The tokenizers that a reader would not choose anyway: ``{role: {file name: text}}``."""
    found = {}
    for name in text_names(description.is_xl):
        role = name.replace("text_encoder", "tokenizer")
        tokenizer, length = description.tokenizers[role], structure.text[name].max_position_embeddings
        if tokenizer.files and not is_clip_tokenizer(tokenizer, pad_token(kind, role), length):
            try:
                found[role] = {file: content.decode() for file, content in tokenizer.files.items()}
            except UnicodeDecodeError:
                raise UserError(f"{tokenizer.origin}: holds a file that is not text") from None
    return found
