"""A CLIP, both towers or the image tower alone, in transformers' layout or OpenCLIP's: a folder, or its file alone."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from hypersd_jax.errors import UserError, shown
from hypersd_jax.models.clip_text import ClipTextConfig, clip_text
from hypersd_jax.models.clip_vision import ClipVisionConfig, clip_vision
from hypersd_jax.models.functional import Network, Params
from hypersd_jax.paths import expanded
from hypersd_jax.weights.diffusers.component import STEMS, component_files, read_json
from hypersd_jax.weights.located import Locate, Shapes, read_located
from hypersd_jax.weights.single_file.clip import from_open_clip, guess_config
from hypersd_jax.weights.single_file.keys import Stored, is_open_clip, open_clip_place
from hypersd_jax.weights.tensors import TensorFile, open_tensors
from hypersd_jax.weights.tokenizers import CLIP_TOKENS, END, TokenizerFiles, clip_tokenizer

TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
"""The files of a model's folder that belong to its tokenizer."""

LOGIT_SCALE = "logit_scale"
"""Path of the logarithm of what cosines are multiplied by, a scalar beside the towers' parameters."""

OPEN_CLIP = "open_clip_model"
OPEN_CLIP_CONFIG = "open_clip_config.json"
"""The names of OpenCLIP's files on the hub."""

# Buffers that transformers wrote before 4.31, and OpenCLIP's causal mask.
BUFFERS = r"^(text|vision)_model\.embeddings\.position_ids$|^attn_mask$"
PASSENGERS = re.compile(BUFFERS)
# What an image tower is not read with, in both layouts.
TEXT_SIDE = re.compile(
    BUFFERS + r"|^text_model\.|^text_projection(\.weight)?$|^logit_scale$"
    r"|^(token_embedding\.weight|positional_embedding)$|^(transformer|ln_final)\."
)


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedClip:
    """A CLIP's structure, networks and parameters, and what it says about its inputs.

    Attributes:
        params: of both towers and `LOGIT_SCALE`, by path; the towers have no path in common.
        image_processor: content of `preprocessor_config.json`, empty where there is none.
        tokenizer: its own, else that of CLIP.
    """

    origin: Path
    text_config: ClipTextConfig
    vision_config: ClipVisionConfig
    text: Network
    vision: Network
    params: Params
    image_processor: Mapping[str, Any]
    tokenizer: TokenizerFiles


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedVision:
    """A CLIP's image tower, and what its folder says about images, as in `LoadedClip`."""

    origin: Path
    config: ClipVisionConfig
    network: Network
    params: Params
    image_processor: Mapping[str, Any]


def load_clip_model(source: str | os.PathLike[str], *, dtype: Any, activation: str | None = None) -> LoadedClip:
    """Read a CLIP with both its towers.

    Args:
        source: a folder with ``config.json`` and ``model.safetensors`` (or its shards), or with OpenCLIP's
            ``open_clip_model.safetensors``; or a .safetensors file of either layout, which is read as its
            ``config.json`` (``open_clip_config.json``) beside it says, else as `guess_config` does. Tokenizer and
            ``preprocessor_config.json`` are looked for in the same folder.
        dtype: of parameters and computation.
        activation: the `hidden_act` of a file without a configuration; None guesses, with a warning.

    Raises:
        UserError: one line naming the file or key that is missing, damaged, unsupported or fits nothing; pickled
            weights are refused.
    """
    stored = _open(source, activation)
    text = clip_text(stored.text_config, dtype=dtype, projection=True)
    vision = clip_vision(stored.vision_config, dtype=dtype)
    shapes = {**text.shapes, **vision.shapes, LOGIT_SCALE: jax.ShapeDtypeStruct((), jnp.float32)}
    return LoadedClip(
        origin=stored.origin,
        text_config=stored.text_config,
        vision_config=stored.vision_config,
        text=text,
        vision=vision,
        params=stored.read(shapes, PASSENGERS),
        image_processor=stored.image_processor,
        tokenizer=_tokenizer(stored.folder, stored.text_config),
    )


def load_vision_tower(source: str | os.PathLike[str], *, dtype: Any, activation: str | None = None) -> LoadedVision:
    """Read the image tower of a CLIP, without its text tower; arguments and errors are those of `load_clip_model`."""
    stored = _open(source, activation)
    network = clip_vision(stored.vision_config, dtype=dtype)
    return LoadedVision(
        origin=stored.origin,
        config=stored.vision_config,
        network=network,
        params=stored.read(network.shapes, TEXT_SIDE),
        image_processor=stored.image_processor,
    )


def read_configs(values: Mapping[str, Any]) -> tuple[ClipTextConfig, ClipVisionConfig]:
    """Both towers' structures out of the `config.json` of a `CLIPModel`; UserError names what cannot be honoured.

    Some old files say things twice: where there is a ``text_config_dict`` it counts and ``text_config`` does not, and
    the same for vision. The joint space is as wide as the top level says, whatever the towers' parts say of it.
    """
    if values.get("model_type", "clip") != "clip":
        raise UserError(f"CLIPModel config: model_type={shown(values['model_type'])} is not supported, only 'clip'")
    parts: list[dict[str, Any]] = []
    for name in ("text_config", "vision_config"):
        part = values.get(f"{name}_dict")
        part = values.get(name) if part is None else part
        if not isinstance(part, dict):
            raise UserError(f"CLIPModel config: {name}={shown(part)} is not an object")
        parts.append({**part, "projection_dim": values.get("projection_dim")})
    return ClipTextConfig.from_dict(parts[0]), ClipVisionConfig.from_dict(parts[1])


@dataclass(frozen=True, kw_only=True, eq=False)
class _StoredClip:
    """The open files of a CLIP and what is known without reading a tensor."""

    origin: Path
    folder: Path
    files: Sequence[TensorFile]
    locate: Locate
    text_config: ClipTextConfig
    vision_config: ClipVisionConfig
    image_processor: Mapping[str, Any]

    def read(self, shapes: Shapes, extras: re.Pattern[str]) -> Params:
        """The parameters of these paths, on the default device."""
        read = read_located(self.origin, self.files, shapes, self.locate, extras)
        return {path: jnp.asarray(array) for path, array in read}


def _open(source: str | os.PathLike[str], activation: str | None) -> _StoredClip:
    origin = expanded(Path(source))
    if not origin.exists():
        raise UserError(f"{origin}: no such file or folder")
    folder = origin if origin.is_dir() else origin.parent
    files = [open_tensors(path) for path in (_weight_files(origin) if origin.is_dir() else [origin])]
    other = is_open_clip(files[0].keys())
    location = folder / (OPEN_CLIP_CONFIG if other else "config.json")
    stated: Mapping[str, Any] | None = None
    if location.is_file() or (origin.is_dir() and not other):
        stated = read_json(location)
    if stated is None:
        text_config, vision_config = read_configs(guess_config(files[0], activation))
    else:
        try:
            text_config, vision_config = read_configs(from_open_clip(stated) if other else stated)
        except UserError as error:
            raise UserError(f"{location}: {error}") from None
    return _StoredClip(
        origin=origin,
        folder=folder,
        files=files,
        locate=open_clip_place if other else Stored.named,
        text_config=text_config,
        vision_config=vision_config,
        image_processor=_open_clip_processor(stated or {}) if other else _image_processor(folder),
    )


def _weight_files(folder: Path) -> list[Path]:
    alone = folder / f"{OPEN_CLIP}.safetensors"
    if alone.is_file() and not any(folder.glob(f"{STEMS['clip']}*.safetensors")):
        return [alone]
    return component_files(folder, STEMS["clip"])


def _open_clip_processor(config: Mapping[str, Any]) -> dict[str, Any]:
    """What OpenCLIP's configuration says about images, in the words of transformers'."""
    found = config.get("preprocess_cfg")
    found = found if isinstance(found, dict) else {}
    return {f"image_{key}": found[key] for key in ("mean", "std") if key in found}


def _image_processor(folder: Path) -> dict[str, Any]:
    """The configuration of the image processor: its own file or, from transformers 5, a part of the processor's."""
    if (folder / "preprocessor_config.json").is_file():
        return read_json(folder / "preprocessor_config.json")
    if (folder / "processor_config.json").is_file():
        found = read_json(folder / "processor_config.json").get("image_processor")
        return found if isinstance(found, dict) else {}
    return {}


def _tokenizer(folder: Path, config: ClipTextConfig) -> TokenizerFiles:
    """The tokenizer in a folder; CLIP's own where there is none and the vocabulary has its size."""
    try:
        files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror or error})") from error
    if not files and config.vocab_size == CLIP_TOKENS:
        return clip_tokenizer(END, config.max_position_embeddings)
    return TokenizerFiles(origin=str(folder), files=files)
