"""A CLIP, both towers, as transformers' `CLIPModel` keeps it: a folder, or its safetensors file alone."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hypersd_jax.errors import UserError, shown
from hypersd_jax.models.clip_text import ClipTextConfig, clip_text
from hypersd_jax.models.clip_vision import ClipVisionConfig, clip_vision
from hypersd_jax.models.functional import Network, Params, Shapes
from hypersd_jax.paths import expanded
from hypersd_jax.weights.diffusers.component import STEMS, cast, component_files, read_finite, read_json, require_fit
from hypersd_jax.weights.keys import from_torch, torch_key, torch_shape
from hypersd_jax.weights.single_file.clip import guess_config
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

# Buffers that transformers wrote before 4.31.
PASSENGERS = re.compile(r"^(text|vision)_model\.embeddings\.position_ids$")


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


def load_clip_model(source: str | os.PathLike[str], *, dtype: Any) -> LoadedClip:
    """Read a CLIP with both its towers.

    Args:
        source: a folder with ``config.json`` and ``model.safetensors`` (or its shards), or a .safetensors file, which
            is read as its ``config.json`` beside it says, else as `clip_file.guess_config` does. Tokenizer and
            ``preprocessor_config.json`` are looked for in the same folder.
        dtype: of parameters and computation.

    Raises:
        UserError: one line naming the file or key that is missing, damaged, unsupported or fits nothing; pickled
            weights are refused.
    """
    origin = expanded(Path(source))
    if not origin.exists():
        raise UserError(f"{origin}: no such file or folder")
    folder = origin if origin.is_dir() else origin.parent
    files = [open_tensors(path) for path in (component_files(origin, STEMS["clip"]) if origin.is_dir() else [origin])]
    location = folder / "config.json"
    stated = read_json(location) if origin.is_dir() or location.is_file() else guess_config(files[0])
    try:
        text_config, vision_config = read_configs(stated)
    except UserError as error:
        raise UserError(f"{location if location.is_file() else origin}: {error}") from None
    text = clip_text(text_config, dtype=dtype, projection=True)
    vision = clip_vision(vision_config, dtype=dtype)
    shapes = {**text.shapes, **vision.shapes, LOGIT_SCALE: jax.ShapeDtypeStruct((), jnp.float32)}
    placed = {path: jnp.asarray(array) for path, array in _read(origin, files, shapes)}
    return LoadedClip(
        origin=origin,
        text_config=text_config,
        vision_config=vision_config,
        text=text,
        vision=vision,
        params={path: placed[path] for path in shapes},
        image_processor=_image_processor(folder),
        tokenizer=_tokenizer(folder, text_config),
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


def _read(origin: Path, files: Sequence[TensorFile], shapes: Shapes) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters in the order of the files; one UserError with all that does not fit comes before the first."""
    paths = {torch_key(path): path for path in shapes}
    locations: dict[str, TensorFile] = {}
    misfits = []
    for file in files:
        for key in (key for key in file.keys() if not PASSENGERS.match(key)):  # noqa: SIM118 - not a mapping
            if key in locations:
                misfits.append(f"{key} stored twice")
            locations[key] = file
    for key in locations.keys() & paths.keys():
        found, wanted = locations[key].shape(key), torch_shape(paths[key], shapes[paths[key]].shape)
        if found != wanted:
            misfits.append(f"{key} {list(found)} instead of {list(wanted)}")
        elif not jnp.issubdtype(locations[key].dtype(key), jnp.floating):
            misfits.append(f"{key} of type {locations[key].dtype(key)}")
    require_fit(
        origin, [key for key in paths if key not in locations], sorted(locations.keys() - paths.keys()), sorted(misfits)
    )
    for key, file in locations.items():
        path = paths[key]
        yield path, cast(from_torch(path, read_finite(file, key)), shapes[path].dtype, file.path, key)


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
