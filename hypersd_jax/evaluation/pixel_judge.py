"""A judge of the embedded images that looks at raw pixels: which style, background and kind of thing an image shows.

It shares nothing with the two text-image scorers: no frozen network beneath, no text tower, and another objective. It
is a small convolutional network that names one of each, trained by cross-entropy; an image's score is how sure it is of
what the prompt says. Its card.json has its accuracy on concepts that it was not trained on.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hypersd_jax.data import COLOURS, load_emoji
from hypersd_jax.errors import UserError
from hypersd_jax.evaluation.lite0 import fitted
from hypersd_jax.weights.components import assets
from hypersd_jax.weights.tensors import open_tensors

SIDE = 64
PARTS = ("style", "background", "subgroup")
"""What it names of an image; a subgroup is Unicode's, such as "animal-bird"."""
UNSAID = -1
"""Class of a part that the prompt does not say, which counts for nothing."""
# (name, kernel, channels, stride)
CONVOLUTIONS = (
    ("stem", 5, 32, 2),
    ("middle.0", 3, 64, 2),
    ("middle.1", 3, 64, 1),
    ("late.0", 3, 128, 2),
    ("late.1", 3, 128, 1),
)

Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelJudge:
    """The static part of the judge (`hypersd_jax.rewards.RewardModel`)."""

    def __call__(self, params: Params, images: jax.Array, ids: jax.Array) -> jax.Array:
        """Compute scores (B,) in 0..100 of images (B, H, W, 3) in 0..1 against classes (B, 3), see `classes_of`.

        The mean probability that it gives to the parts that the prompt says; 0 where it says none.
        """
        said, total, count = ids != UNSAID, jnp.zeros(images.shape[0]), jnp.zeros(images.shape[0])
        for index, logits in enumerate(part_logits(params, images * 255.0)):
            chosen = jnp.maximum(ids[:, index], 0)[:, None]
            probability = jnp.take_along_axis(jax.nn.softmax(logits), chosen, axis=1)[:, 0]
            total = total + jnp.where(said[:, index], probability, 0.0)
            count = count + said[:, index]
        return 100.0 * total / jnp.maximum(count, 1.0)


def part_logits(params: Params, images: jax.Array) -> list[jax.Array]:
    """Compute the logits (B, classes) of each of `PARTS`, for images (B, H, W, 3) in 0..255."""
    x = fitted(images, SIDE) / 127.5 - 1.0
    for name, _, _, stride in CONVOLUTIONS:
        x = jax.lax.conv_general_dilated(
            x, params[f"{name}.kernel"], (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.gelu(x + params[f"{name}.bias"][None, None, None], approximate=False)
    pooled = jnp.concatenate([jnp.mean(x, axis=(1, 2)), jnp.max(x, axis=(1, 2))], axis=-1)
    return [pooled @ params[f"{part}.kernel"] + params[f"{part}.bias"][None] for part in PARTS]


def class_names() -> dict[str, tuple[str, ...]]:
    """List the classes of each part, in the order of their numbers."""
    records = load_emoji().records
    return {
        "style": tuple(sorted({record.style for record in records})),
        "background": tuple(COLOURS),
        "subgroup": tuple(sorted({record.subgroup for record in records})),
    }


def classes_of(prompts: Sequence[str]) -> np.ndarray:
    """Read what captions of the embedded images say of each part: int32 (B, 3), `UNSAID` where they say nothing.

    A caption with a style or a known name, but without a background, means white, as in training.
    """
    numbers = {part: {name: number for number, name in enumerate(names)} for part, names in class_names().items()}
    found = []
    for prompt in prompts:
        rest, background = _split(prompt, "background", numbers["background"])
        label, style = _split(rest, "style", numbers["style"])
        known = _subgroups().get(label)
        if background is None and (style or known):
            background = "white"
        found.append(
            (
                UNSAID if style is None else numbers["style"][style],
                UNSAID if background is None else numbers["background"][background],
                UNSAID if known is None else numbers["subgroup"][known],
            )
        )
    return np.asarray(found, np.int32).reshape(len(found), len(PARTS))


def _split(text: str, part: str, known: Mapping[str, int]) -> tuple[str, str | None]:
    """Part "NAME, RED background" into "NAME" and "RED"; None where it does not end so."""
    rest, comma, last = text.rpartition(", ")
    name = last.removesuffix(f" {part}")
    return (rest, name) if comma and name != last and name in known else (text, None)


@functools.cache
def _subgroups() -> dict[str, str]:
    return {record.label: record.subgroup for record in load_emoji().records}


def init_judge(key: jax.Array) -> dict[str, jax.Array]:
    """Fresh parameters, float32."""
    params, width = {}, 3
    for name, kernel, channels, _ in CONVOLUTIONS:
        key, own = jax.random.split(key)
        deviation = np.sqrt(2.0 / (kernel * kernel * width))
        params[f"{name}.kernel"] = deviation * jax.random.normal(own, (kernel, kernel, width, channels))
        params[f"{name}.bias"] = jnp.zeros((channels,))
        width = channels
    for part, names in class_names().items():
        key, own = jax.random.split(key)
        params[f"{part}.kernel"] = jax.random.normal(own, (2 * width, len(names))) / np.sqrt(2 * width)
        params[f"{part}.bias"] = jnp.zeros((len(names),))
    return params


@functools.cache
def load_pixel_judge(folder: Path | None = None) -> dict[str, np.ndarray]:
    """Load the parameters that ship with the package, or those in another ``folder``, float32.

    Raises:
        UserError: the file is missing or damaged, or its tensors or classes are not this judge's.
    """
    path = (folder or assets() / "scorers" / "pixels") / "model.safetensors"
    with open_tensors(path) as file:
        params = {key: file.read(key).astype(np.float32) for key in file.keys()}  # noqa: SIM118
        classes = file.metadata.get("classes", "")
    expected = {key: value.shape for key, value in jax.eval_shape(init_judge, jax.random.key(0)).items()}
    if expected != {key: value.shape for key, value in params.items()} or classes != json.dumps(class_names()):
        raise UserError(f"{path}: its tensors or classes are not those of the pixel judge")
    return params
