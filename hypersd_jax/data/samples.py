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
GROUNDS = tuple(COLOURS)  # white is the first


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
        return self.prompts(np.arange(min(PREVIEWS, len(self))))

    @property
    def identity(self) -> None:
        """None: the set ships with the package."""
        return None

    @property
    def contents(self) -> None:
        """None: the set ships with the package."""
        return None

    @property
    def uncacheable(self) -> None:
        """None: there are but a few grounds."""
        return None

    def batch(self, positions: np.ndarray) -> Batch:
        """The pairs at these positions (B,) of the stream: images (B, resolution, resolution, 3) in -1..1."""
        return self.variant_batch(self.keys(positions))

    def prompts(self, positions: np.ndarray) -> list[str]:
        """The captions at these positions (B,) alone."""
        return [caption(self._emoji.records[item], colour) for item, colour in _drawn(self.keys(positions))]

    def keys(self, positions: np.ndarray) -> np.ndarray:
        """Place in the emoji set times the number of grounds, plus the ground's place among them, int64 (B,)."""
        positions = np.asarray(positions, np.int64)
        items = self._indices[shuffled(positions, len(self), int(mix(self._seed, ORDER)[0]))]
        colours = draw_colours(positions, self._seed, self._white_fraction)
        return items * len(COLOURS) + np.asarray([GROUNDS.index(colour) for colour in colours], np.int64)

    def variants(self) -> np.ndarray:
        """Every picture on every ground that can be drawn."""
        possible = {1.0: GROUNDS[:1], 0.0: GROUNDS[1:]}.get(self._white_fraction, GROUNDS)
        grounds = np.asarray([GROUNDS.index(colour) for colour in possible], np.int64)
        return (self._indices[:, None] * len(COLOURS) + grounds).reshape(-1)

    def variant_batch(self, keys: np.ndarray) -> Batch:
        """The pairs of these keys (B,)."""
        drawn = _drawn(keys)
        pictures = [ground_picture(self._emoji.images[item], colour, self._resolution) for item, colour in drawn]
        images = np.stack(pictures).astype(np.float32) / np.float32(127.5) - np.float32(1.0)
        captions = [caption(self._emoji.records[item], colour) for item, colour in drawn]
        size = (*self._emoji.images.shape[1:3], 0, 0, self._resolution, self._resolution)
        return Batch(images, captions, np.tile(np.asarray(size, np.float32), (len(drawn), 1)))


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


def _drawn(keys: np.ndarray) -> list[tuple[int, str]]:
    """The place in the emoji set and the ground of each key (B,)."""
    pairs = (divmod(int(key), len(COLOURS)) for key in keys)
    return [(item, GROUNDS[ground]) for item, ground in pairs]


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
