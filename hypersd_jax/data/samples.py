"""Captioned pictures out of the emoji set: the training stream and the fixed list that models are compared on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image

from hypersd_jax.data.emoji import COLOURS, EmojiSet, Split, caption, composite, load_emoji
from hypersd_jax.data.order import fraction, mix, shuffled
from hypersd_jax.data.source import Batch
from hypersd_jax.errors import UserError

# What a hash is drawn for, so that one draw says nothing about another.
ORDER, WHITE, COLOUR = 0, 1, 2
PREVIEWS = 8


class EmojiSource:
    """An endless stream of pictures on coloured grounds with their captions.

    Each epoch holds every picture once, in an order of its own, and the ground is drawn anew for each position: white
    with probability ``white_fraction``, else one of the other colours. Position p depends on (seed, p) alone.
    """

    def __init__(
        self,
        emoji: EmojiSet | None = None,
        *,
        resolution: int = 64,
        seed: int = 0,
        split: Split = "train",
        white_fraction: float = 0.5,
        groups: Sequence[str] | None = None,
    ) -> None:
        """Choose the pictures; ``groups`` None means all. Raises UserError naming a group that does not exist."""
        self._emoji = load_emoji() if emoji is None else emoji
        self._indices = self._emoji.indices(split, groups)
        self._resolution = resolution
        self._seed = seed
        self._white_fraction = white_fraction

    def __len__(self) -> int:
        """Pictures in an epoch."""
        return len(self._indices)

    @property
    def preview_prompts(self) -> list[str]:
        """The captions of the stream's first pictures, which training sees."""
        return self._drawn(np.arange(min(PREVIEWS, len(self))))[2]

    def batch(self, positions: np.ndarray) -> Batch:
        """The pairs at these positions (B,) of the stream: images (B, resolution, resolution, 3) in -1..1."""
        items, colours, captions = self._drawn(np.asarray(positions, np.int64))
        pictures = [
            ground_picture(self._emoji.images[item], colour, self._resolution)
            for item, colour in zip(items, colours, strict=True)
        ]
        return Batch(np.stack(pictures).astype(np.float32) / np.float32(127.5) - np.float32(1.0), captions)

    def _drawn(self, positions: np.ndarray) -> tuple[np.ndarray, list[str], list[str]]:
        items = self._indices[shuffled(positions, len(self), int(mix(self._seed, ORDER)[0]))]
        colours = draw_colours(positions, self._seed, self._white_fraction)
        records = [self._emoji.records[item] for item in items]
        return items, colours, [caption(r, colour) for r, colour in zip(records, colours, strict=True)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalItem:
    """One prompt of the comparison. ``index`` is its picture in the emoji set, ``seed`` what models draw it with."""

    prompt: str
    seed: int
    ground: str
    index: int
    hexcode: str
    style: str
    group: str


def evaluation_list(
    n: int = 256, seed: int = 0, *, emoji: EmojiSet | None = None, groups: Sequence[str] | None = None
) -> list[EvalItem]:
    """The first ``n`` of a fixed order of held-out (picture, ground) pairs; a short list starts a longer one.

    Pictures repeat, on grounds of their own, only when ``n`` is more than the test split holds.

    Raises:
        UserError: naming a group that does not exist or holds no test pictures.
    """
    emoji = load_emoji() if emoji is None else emoji
    indices = emoji.indices("test", groups)
    if not len(indices):
        raise UserError(f"data.groups: {', '.join(groups or ())} hold no pictures of the test split")
    positions = np.arange(n)
    items = indices[shuffled(positions, len(indices), int(mix(seed, ORDER)[0]))]
    colours = draw_colours(positions, seed, white_fraction=0.5)
    found = []
    for position, item, colour in zip(positions, items, colours, strict=True):
        record = emoji.records[item]
        found.append(
            EvalItem(
                prompt=caption(record, colour),
                seed=int(position),
                ground=colour,
                index=int(item),
                hexcode=record.hexcode,
                style=record.style,
                group=record.group,
            )
        )
    return found


def evaluation_images(items: Sequence[EvalItem], *, emoji: EmojiSet | None = None, resolution: int = 64) -> np.ndarray:
    """The real pictures behind the prompts, uint8 (N, resolution, resolution, 3)."""
    emoji = load_emoji() if emoji is None else emoji
    return np.stack([ground_picture(emoji.images[item.index], item.ground, resolution) for item in items])


def draw_colours(positions: np.ndarray, seed: int, white_fraction: float) -> list[str]:
    """A ground for each position (B,)."""
    white = fraction(mix(seed, WHITE, positions)) < white_fraction
    others = [name for name in COLOURS if name != "white"]
    chosen = mix(seed, COLOUR, positions) % np.uint64(len(others))
    return ["white" if plain else others[int(other)] for plain, other in zip(white, chosen, strict=True)]


def ground_picture(rgba: np.ndarray, colour: str, resolution: int) -> np.ndarray:
    """One picture on its ground, uint8 (resolution, resolution, 3); bicubic where the size changes."""
    picture = composite(rgba, COLOURS[colour])
    if picture.shape[0] == resolution:
        return picture
    return np.asarray(Image.fromarray(picture).resize((resolution, resolution), Image.Resampling.BICUBIC))
