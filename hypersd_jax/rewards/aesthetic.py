"""LAION's aesthetic predictors: a head on the unit image embedding of a CLIP; prompts are not read.

| head | stored as | computes |
|---|---|---|
| v1 (LAION-AI/aesthetic-predictor) | `weight`, `bias` | one affine map |
| v2 (improved-aesthetic-predictor), `*-linearMSE.pth` | `layers.{0,2,4,6,7}` | five affine maps, no activation |
| v2, `ava+logos-l14-reluMSE.pth` | `layers.{0,3,6,9,11}` | the same with ReLU between them |

Scores are some 1 to 10. ReLUs are not stored: they are known by the indices, which skip theirs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from hypersd_jax.errors import UserError
from hypersd_jax.models.functional import Network
from hypersd_jax.rewards.clip_score import image_steps
from hypersd_jax.rewards.heads import LEAVES, Layers, apply_head, collapsed, head_params, read_layers
from hypersd_jax.rewards.preprocess import ImageSteps, preprocess, torchvision_crop
from hypersd_jax.rewards.reward import LoadedReward, no_tokens, part, unit, weights_path
from hypersd_jax.weights.diffusers.clip import load_vision_tower
from hypersd_jax.weights.diffusers.component import few
from hypersd_jax.weights.tensors import TensorFile, open_tensors

HEAD_FILE = "aesthetic_head.safetensors"
SINGLE = ("",)
LINEAR = tuple(f"layers.{index}." for index in (0, 2, 4, 6, 7))
RELU = tuple(f"layers.{index}." for index in (0, 3, 6, 9, 11))
"""Prefixes of the layers with weights in the three kinds of head."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AestheticModel:
    """The static part: an image tower, its preprocessing, and how many layers with ReLU between them the head has."""

    vision: Network
    steps: ImageSteps
    layers: int

    def __call__(self, params: Mapping[str, jax.Array], images: jax.Array, ids: jax.Array) -> jax.Array:
        """Compute scores (B,) as `RewardModel` says; `ids` (B, 0)."""
        del ids
        seen = self.vision(part(params, self.vision.shapes), preprocess(images, self.steps))
        return apply_head(params, unit(seen.projected), self.layers)


def load_aesthetic(path: str | os.PathLike[str]) -> LoadedReward:
    """An aesthetic predictor, computed in float32.

    Args:
        path: a folder with a CLIP (see `load_clip_model`; for the published heads OpenAI's ViT-L/14) and the head as
            ``aesthetic_head.safetensors``; or a head's file with the CLIP in the same folder.

    Raises:
        UserError: one line naming the file or key that is missing, damaged, unsupported or fits nothing.
    """
    path = weights_path(path)
    file = path / HEAD_FILE if path.is_dir() else path
    layers = _read_head(open_tensors(file))
    loaded = load_vision_tower(_require_clip(file), dtype=jnp.float32, activation="quick_gelu")
    width, wanted = loaded.config.projection_dim, layers[0][0].shape[1]
    if width != wanted:
        raise UserError(f"{file}: reads embeddings {wanted} wide, but those of {loaded.origin} are {width} wide")
    steps = image_steps(loaded, loaded.config.image_size, torchvision_crop)
    return LoadedReward(
        model=AestheticModel(vision=loaded.network, steps=steps, layers=len(layers)),
        params={**loaded.params, **head_params(layers)},
        tokenize=no_tokens,
    )


def _require_clip(head: Path) -> Path:
    """The folder of a head's file, where it has the weights of a CLIP too."""
    folder = head.parent
    if any(folder.glob("model*.safetensors*")) or (folder / "open_clip_model.safetensors").is_file():
        return folder
    raise UserError(f"{folder}: no CLIP beside {head.name} (model.safetensors or open_clip_model.safetensors)")


def _read_head(file: TensorFile) -> Layers:
    """The layers of a head, those in a row without activation multiplied out into one."""
    keys = set(file.keys())
    for prefixes in (SINGLE, LINEAR, RELU):
        if keys == {f"{prefix}{leaf}" for prefix in prefixes for leaf in LEAVES}:
            layers = read_layers(file, prefixes)
            return layers if prefixes == RELU else collapsed(layers)
    kinds = "layers 0, 2, 4, 6, 7 or 0, 3, 6, 9, 11, or one weight and bias"
    raise UserError(f"{file.path}: is no aesthetic head ({kinds}), but holds {few(sorted(keys))}")
