"""Captioned images out of the emoji set: the training stream and the fixed list that models are compared on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image

from hypersd_jax.data.emoji import COLOURS, EmojiSet, Split, caption, composite, load_emoji
from hypersd_jax.data.looks import LOOKS
from hypersd_jax.data.order import fraction, mix, shuffled
from hypersd_jax.data.source import Batch
from hypersd_jax.errors import UserError

# What a random number is for, so that one says nothing about another.
ORDER, WHITE, COLOUR = 0, 1, 2
PREVIEWS = 8
BACKGROUNDS = tuple(COLOURS)  # white is the first


class EmojiSource:
    """An endless stream of images on coloured backgrounds with their captions.

    Each epoch holds every image once, in an order of its own, and a background of its own at each position: white
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
        look: str | None = None,
    ) -> None:
        """Choose the images; ``groups`` None means all, ``look`` is one of `LOOKS` or None.

        Raises:
            UserError: naming a group that does not exist.
        """
        self._emoji = load_emoji() if emoji is None else emoji
        self._indices = self._emoji.indices(split, groups)
        self._resolution = resolution
        self._seed = seed
        self._white_fraction = white_fraction
        self._look = look

    def __len__(self) -> int:
        """Count the images of an epoch."""
        return len(self._indices)

    @property
    def preview_prompts(self) -> list[str]:
        """The captions of the stream's first images, which training sees."""
        return self.prompts(np.arange(min(PREVIEWS, len(self))))

    @property
    def identity(self) -> None:
        """None: the dataset ships with the package."""
        return None

    @property
    def contents(self) -> None:
        """None: the dataset ships with the package."""
        return None

    @property
    def uncacheable(self) -> None:
        """None: there are but a few backgrounds."""
        return None

    @property
    def files(self) -> None:
        """None: the images are one file."""
        return None

    def batch(self, positions: np.ndarray) -> Batch:
        """Make the examples at these positions (B,) of the stream: images (B, resolution, resolution, 3)."""
        return self.variant_batch(self.keys(positions))

    def prompts(self, positions: np.ndarray) -> list[str]:
        """The captions at these positions (B,) alone."""
        return self.captions(self.keys(positions))

    def captions(self, keys: np.ndarray) -> list[str]:
        """The captions of these keys (B,)."""
        return [caption(self._emoji.records[item], colour) for item, colour in _split_keys(keys)]

    def keys(self, positions: np.ndarray) -> np.ndarray:
        """Index in the emoji set times the number of backgrounds, plus the background's index, int64 (B,)."""
        positions = np.asarray(positions, np.int64)
        items = self._indices[shuffled(positions, len(self), int(mix(self._seed, ORDER)[0]))]
        colours = sample_backgrounds(positions, self._seed, self._white_fraction)
        return items * len(COLOURS) + np.asarray([BACKGROUNDS.index(colour) for colour in colours], np.int64)

    def variants(self) -> np.ndarray:
        """List every image on every background that can occur, as keys."""
        possible = {1.0: BACKGROUNDS[:1], 0.0: BACKGROUNDS[1:]}.get(self._white_fraction, BACKGROUNDS)
        backgrounds = np.asarray([BACKGROUNDS.index(colour) for colour in possible], np.int64)
        return (self._indices[:, None] * len(COLOURS) + backgrounds).reshape(-1)

    def variant_batch(self, keys: np.ndarray) -> Batch:
        """Make the examples of these keys (B,)."""
        pairs = _split_keys(keys)
        pixels = [on_background(self._emoji.images[item], colour, self._resolution) for item, colour in pairs]
        if self._look is not None:
            pixels = [LOOKS[self._look](image) for image in pixels]
        captions = self.captions(keys)
        size = (*self._emoji.images.shape[1:3], 0, 0, self._resolution, self._resolution)
        return Batch(np.stack(pixels), captions, np.tile(np.asarray(size, np.float32), (len(pairs), 1)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalItem:
    """One prompt of the comparison. ``index`` is its image in the emoji set, ``seed`` that of models' latents."""

    prompt: str
    seed: int
    background: str
    index: int
    hexcode: str
    style: str
    group: str


def evaluation_list(
    n: int = 256, seed: int = 0, *, emoji: EmojiSet | None = None, groups: Sequence[str] | None = None
) -> list[EvalItem]:
    """List the first ``n`` of a fixed order of held-out (image, background) pairs; a short list starts a longer one.

    Images repeat, on backgrounds of their own, only when ``n`` is more than the test split holds.

    Raises:
        UserError: naming a group that does not exist or holds no test images.
    """
    emoji = load_emoji() if emoji is None else emoji
    indices = emoji.indices("test", groups)
    if not len(indices):
        raise UserError(f"data.groups: {', '.join(groups or ())} hold no images of the test split")
    positions = np.arange(n)
    items = indices[shuffled(positions, len(indices), int(mix(seed, ORDER)[0]))]
    colours = sample_backgrounds(positions, seed, white_fraction=0.5)
    found = []
    for position, item, colour in zip(positions, items, colours, strict=True):
        record = emoji.records[item]
        found.append(
            EvalItem(
                prompt=caption(record, colour),
                seed=int(position),
                background=colour,
                index=int(item),
                hexcode=record.hexcode,
                style=record.style,
                group=record.group,
            )
        )
    return found


def evaluation_images(items: Sequence[EvalItem], *, emoji: EmojiSet | None = None, resolution: int = 64) -> np.ndarray:
    """Make the real images of the prompts, uint8 (N, resolution, resolution, 3)."""
    emoji = load_emoji() if emoji is None else emoji
    return np.stack([on_background(emoji.images[item.index], item.background, resolution) for item in items])


def _split_keys(keys: np.ndarray) -> list[tuple[int, str]]:
    """The index in the emoji set and the background of each key (B,)."""
    pairs = (divmod(int(key), len(COLOURS)) for key in keys)
    return [(item, BACKGROUNDS[background]) for item, background in pairs]


def sample_backgrounds(positions: np.ndarray, seed: int, white_fraction: float) -> list[str]:
    """Choose a background for each position (B,)."""
    white = fraction(mix(seed, WHITE, positions)) < white_fraction
    others = [name for name in COLOURS if name != "white"]
    chosen = mix(seed, COLOUR, positions) % np.uint64(len(others))
    return ["white" if plain else others[int(other)] for plain, other in zip(white, chosen, strict=True)]


def on_background(rgba: np.ndarray, colour: str, resolution: int) -> np.ndarray:
    """Lay one image on its background, uint8 (resolution, resolution, 3); bicubic where the size changes."""
    image = composite(rgba, COLOURS[colour])
    if image.shape[0] == resolution:
        return image
    return np.asarray(Image.fromarray(image).resize((resolution, resolution), Image.Resampling.BICUBIC))
