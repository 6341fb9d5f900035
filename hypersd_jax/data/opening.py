"""From a configuration to a source of captioned images, or of prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from hypersd_jax.config import DataConfig
from hypersd_jax.data.emoji import Split
from hypersd_jax.data.emoji_source import EmojiSource
from hypersd_jax.data.image_text import ImageTextSource
from hypersd_jax.data.prompts import PromptSource
from hypersd_jax.data.reading import read_examples
from hypersd_jax.data.source import Prompts, Source
from hypersd_jax.errors import UserError

EMOJI = "emoji"
EMOJI_KEYS = ("white_fraction", "groups", "look")
TABLE_KEYS = ("image_column", "caption_column", "crop", "flip", "bucket_step", "min_size")


def open_source(config: DataConfig, *, resolution: int, seed: int, batch_size: int | None = None) -> Source:
    """Open the captioned images that ``config.source`` names.

    Args:
        config: of the data.
        resolution: of the images, or of the square whose area aspect buckets keep to.
        seed: of the order and all randomness.
        batch_size: of all stages, which aspect buckets need; None where they differ.

    Raises:
        UserError: naming the source or key at fault.
    """
    if config.source == EMOJI:
        return _open_emoji(config, resolution, seed)
    _refuse(config, EMOJI_KEYS)
    if config.bucket_step and batch_size is None:
        raise UserError("data.bucket_step: aspect buckets need all stages to have the same batch_size")
    examples = read_examples(
        config.source,
        split=config.split,
        image_column=config.image_column,
        caption_column=config.caption_column,
    )
    return ImageTextSource(
        examples,
        resolution=resolution,
        seed=seed,
        crop=config.crop,
        flip=config.flip,
        min_size=config.min_size,
        bucket_step=config.bucket_step,
        batch_size=batch_size or 1,
    )


def open_prompts(config: DataConfig, *, seed: int) -> Prompts:
    """Open the prompts that ``config.source`` names: of a text file one a line, of anything else the captions.

    Raises:
        UserError: naming the source or key at fault.
    """
    if config.source == EMOJI:
        return _open_emoji(config, 64, seed)
    _refuse(config, EMOJI_KEYS)
    return PromptSource(
        read_examples(
            config.source, split=config.split, image_column=None, caption_column=config.caption_column, images=False
        ),
        seed=seed,
    )


def _open_emoji(config: DataConfig, resolution: int, seed: int) -> EmojiSource:
    _refuse(config, TABLE_KEYS)
    splits: dict[str, Split] = {"train": "train", "test": "test", "all": "all"}
    if config.split not in splits:
        raise UserError(f"data.split={config.split!r}: the embedded images have {', '.join(splits)}")
    return EmojiSource(
        resolution=resolution,
        seed=seed,
        split=splits[config.split],
        white_fraction=config.white_fraction,
        groups=config.groups,
        look=config.look,
    )


def _refuse(config: DataConfig, keys: Iterable[str]) -> None:
    """UserError naming a key that was set and that the source does not read."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for key in keys:
        if getattr(config, key) != defaults[key]:
            raise UserError(f"data.{key} does not apply to data.source={config.source}")
