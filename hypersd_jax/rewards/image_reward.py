"""ImageReward (Xu et al. 2023, arXiv:2304.05977): a BLIP that reads the prompt while it looks at the image.

The state of the first token goes through five affine layers, which are one dot product here, and is standardised: some
-2 to 2, with mean 0 and deviation 1 over the images that its authors compared.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hypersd_jax.errors import UserError, short
from hypersd_jax.models.bert import BertConfig
from hypersd_jax.models.blip import PADDING, blip
from hypersd_jax.models.blip_vision import BlipVisionConfig
from hypersd_jax.models.functional import Network
from hypersd_jax.rewards.heads import apply_head, collapsed, head_params, read_layers
from hypersd_jax.rewards.preprocess import ImageSteps, preprocess, torchvision_crop
from hypersd_jax.rewards.reward import LoadedReward, part, weights_path
from hypersd_jax.weights.located import read_located
from hypersd_jax.weights.single_file.keys import Stored
from hypersd_jax.weights.tensors import TensorFile, open_tensors

FILE = "model.safetensors"
PREFIX = "blip."
MLP = tuple(f"mlp.layers.{index}." for index in (0, 2, 4, 6, 7))
# The projections of BLIP's contrastive training, a buffer, and the head, which is read apart.
EXTRAS = re.compile(
    r"^blip\.(vision|text)_proj\.|^blip\.text_encoder\.embeddings\.position_ids$"
    r"|^mlp\.layers\.[02467]\.(weight|bias)$"
)

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""By which the head's numbers are standardised."""

LENGTH = 35
"""Tokens that a prompt is cut or filled up to."""

HEAD_WIDTH = 64
"""Width of an attention head in both encoders, which no tensor shows."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageRewardModel:
    """The static part: both encoders and the preprocessing of images."""

    network: Network
    steps: ImageSteps

    def __call__(self, params: Mapping[str, jax.Array], images: jax.Array, ids: jax.Array) -> jax.Array:
        """Compute scores (B,) as `RewardModel` says."""
        state = self.network(part(params, self.network.shapes), preprocess(images, self.steps), ids)
        return (apply_head(params, state, 1) - MEAN) / STD


def load_image_reward(path: str | os.PathLike[str]) -> LoadedReward:
    """ImageReward, computed in float32.

    Args:
        path: a folder with ``model.safetensors``, which is ``ImageReward.pt`` after ``hypersd convert reward``, and
            the tokenizer of bert-base-uncased (``vocab.txt``, or ``tokenizer.json`` too); or the file in such a folder.

    Raises:
        UserError: one line naming the file or key that is missing, damaged, unsupported or fits nothing.
    """
    path = weights_path(path)
    file = open_tensors(path / FILE if path.is_dir() else path)
    vision, text = read_sizes(file)
    network = blip(vision, text)
    read = read_located(file.path, [file], network.shapes, lambda key: Stored(key=PREFIX + key), EXTRAS)
    params = {name: jnp.asarray(array) for name, array in read}
    layers = collapsed(read_layers(file, MLP))
    if layers[0][0].shape[1] != text.width:
        raise UserError(f"{file.path}: {MLP[0]}weight reads {layers[0][0].shape[1]} numbers instead of {text.width}")
    return LoadedReward(
        model=ImageRewardModel(network=network, steps=ImageSteps(size=vision.image_size, fit=torchvision_crop)),
        params={**params, **head_params(layers)},
        tokenize=WordPieces(tokenizer=_tokenizer(file.path.parent, text.vocabulary), length=LENGTH),
    )


def read_sizes(file: TensorFile) -> tuple[BlipVisionConfig, BertConfig]:
    """The sizes of both encoders from the shapes of a file's tensors; UserError where it is no ImageReward."""
    keys = set(file.keys())

    def shape(key: str, axes: int) -> tuple[int, ...]:
        name = PREFIX + key
        if name not in keys or len(file.shape(name)) != axes or 0 in file.shape(name):
            raise UserError(f"{file.path}: holds no ImageReward (no {name} of {axes} axes)")
        return file.shape(name)

    def count(pattern: str) -> int:
        return next(n for n in itertools.count() if PREFIX + pattern.format(n) not in keys)

    width, _, patch, _ = shape("visual_encoder.patch_embed.proj.weight", 4)
    side = math.isqrt(shape("visual_encoder.pos_embed", 3)[1] - 1)
    vocabulary, text_width = shape("text_encoder.embeddings.word_embeddings.weight", 2)
    vision = BlipVisionConfig(
        width=width,
        inner=shape("visual_encoder.blocks.0.mlp.fc1.weight", 2)[0],
        layers=count("visual_encoder.blocks.{}.mlp.fc1.weight"),
        heads=_heads(file, width),
        image_size=patch * side,
        patch_size=patch,
    )
    text = BertConfig(
        vocabulary=vocabulary,
        positions=shape("text_encoder.embeddings.position_embeddings.weight", 2)[0],
        width=text_width,
        inner=shape("text_encoder.encoder.layer.0.intermediate.dense.weight", 2)[0],
        layers=count("text_encoder.encoder.layer.{}.intermediate.dense.weight"),
        heads=_heads(file, text_width),
        context_width=width,
    )
    return vision, text


def _heads(file: TensorFile, width: int) -> int:
    if width % HEAD_WIDTH:
        raise UserError(f"{file.path}: an encoder {width} wide cannot be split into heads {HEAD_WIDTH} wide")
    return width // HEAD_WIDTH


@dataclass(frozen=True, kw_only=True)
class WordPieces:
    """Turns texts into BERT's token ids (B, length) int32, which begin with [CLS]; longer prompts are cut."""

    tokenizer: Any
    length: int

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Each ends with [SEP], also where it was cut, and is filled up with [PAD]."""
        found = self.tokenizer(list(texts), padding="max_length", truncation=True, max_length=self.length)
        return np.asarray(found["input_ids"], np.int32)


def _tokenizer(folder: Path, vocabulary: int) -> Any:
    from transformers import BertTokenizer  # slow to import

    if not any((folder / name).is_file() for name in ("vocab.txt", "tokenizer.json")):
        raise UserError(f"{folder}: no tokenizer files (vocab.txt of bert-base-uncased)")
    try:
        read = BertTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the library raises many kinds on broken files
        reason = short(next(iter(str(error).splitlines()), type(error).__name__))
        raise UserError(f"{folder}: the tokenizer cannot be read ({reason})") from None
    if len(read) > vocabulary:
        raise UserError(f"{folder}: the tokenizer has {len(read)} tokens, but the text encoder {vocabulary}")
    if read.pad_token_id != PADDING:
        raise UserError(f"{folder}: the tokenizer pads with {read.pad_token_id}, but BERT with {PADDING}")
    return read
