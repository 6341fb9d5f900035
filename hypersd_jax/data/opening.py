"""From a configuration to a source of pairs."""

from __future__ import annotations

from pathlib import Path

from hypersd_jax.config import DataConfig
from hypersd_jax.data.folder import FolderSource
from hypersd_jax.data.samples import EmojiSource
from hypersd_jax.data.source import Source
from hypersd_jax.errors import UserError

EMOJI = "emoji"


def open_source(config: DataConfig, *, resolution: int, seed: int) -> Source:
    """The training pairs that ``config.source`` names: ``emoji`` (its train split) or a folder.

    Raises:
        UserError: naming the folder or key at fault.
    """
    if config.source == EMOJI:
        return EmojiSource(resolution=resolution, seed=seed, white_fraction=config.white_fraction, groups=config.groups)
    if config.groups is not None:
        raise UserError(f"data.groups chooses among the embedded pictures; {config.source} has no groups")
    return FolderSource(Path(config.source), resolution=resolution, seed=seed)
