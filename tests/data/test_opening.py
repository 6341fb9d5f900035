from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hypersd_jax.config import DataConfig
from hypersd_jax.data import EmojiSource, load_emoji, open_source
from hypersd_jax.errors import UserError
from tests.helpers.image_sets import with_metadata


def test_emoji_is_the_embedded_set() -> None:
    source = open_source(DataConfig(groups=("food & drink",)), resolution=64, seed=0)
    assert isinstance(source, EmojiSource)
    assert len(source) < 700


@pytest.mark.parametrize("split", ["train", "test", "all"])
def test_splits_of_the_embedded_set(split: str) -> None:
    source = open_source(DataConfig(split=split), resolution=64, seed=0)
    assert isinstance(source, EmojiSource)
    assert len(source) == len(load_emoji().indices(split))


def test_all_is_train_and_test() -> None:
    train, test, both = (load_emoji().indices(split) for split in ("train", "test", "all"))
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), both)
    np.testing.assert_array_equal(both, np.arange(len(load_emoji())))


@pytest.mark.parametrize(
    "keys",
    [
        {"image_column": "jpg"},
        {"caption_column": "text"},
        {"crop": "random"},
        {"flip": True},
        {"bucket_step": 64},
        {"min_size": 32},
    ],
)
def test_keys_that_the_embedded_set_does_not_read(keys: dict[str, object]) -> None:
    (key,) = keys
    with pytest.raises(UserError, match=rf"data\.{key} does not apply to data\.source=emoji"):
        open_source(DataConfig(**keys), resolution=64, seed=0)


def test_keys_that_only_the_embedded_set_reads(tmp_path: Path) -> None:
    folder = with_metadata(tmp_path, range(2))
    for key, value in (("groups", ("food & drink",)), ("white_fraction", 0.3)):
        with pytest.raises(UserError, match=rf"data\.{key} does not apply to data\.source={folder}"):
            open_source(DataConfig(source=str(folder), **{key: value}), resolution=8, seed=0)


def test_bad_values_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.source: .*nowhere is no folder"):
        open_source(DataConfig(source=str(tmp_path / "nowhere")), resolution=8, seed=0)
    with pytest.raises(UserError, match=r"data\.split='dev': the embedded images have train, test, all"):
        open_source(DataConfig(split="dev"), resolution=8, seed=0)
    for key, value in (("bucket_step", 12), ("min_size", 0), ("source", ""), ("split", "")):
        with pytest.raises(ValueError, match=f"^{key} must"):
            DataConfig(**{key: value})
