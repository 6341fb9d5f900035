from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hypersd_jax.config import DataConfig
from hypersd_jax.data import EmojiSource, FolderSource, open_source
from hypersd_jax.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = []
    for i in range(3):
        picture = np.full((10, 20, 3), (60 * i, 0, 255), np.uint8)
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"picture {i}"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def test_emoji_is_the_embedded_set() -> None:
    source = open_source(DataConfig(groups=("food & drink",)), resolution=64, seed=0)
    assert isinstance(source, EmojiSource)
    assert len(source) < 700


def test_a_folder_is_read_with_its_captions(folder: Path) -> None:
    source = open_source(DataConfig(source=str(folder)), resolution=8, seed=0)
    assert isinstance(source, FolderSource)
    batch = source.batch(np.arange(6))
    assert batch.images.shape == (6, 8, 8, 3)
    assert sorted(batch.captions[:3]) == sorted(batch.captions[3:]) == ["picture 0", "picture 1", "picture 2"]
    for image, text in zip(batch.images, batch.captions, strict=True):
        np.testing.assert_allclose(image[4, 4], np.array([60 * int(text[-1]), 0, 255]) / 127.5 - 1, atol=1e-6)
    assert source.preview_prompts == ["picture 0", "picture 1", "picture 2"]


def test_bad_folders_are_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        open_source(DataConfig(source=str(tmp_path / "nowhere")), resolution=8, seed=0)
    with pytest.raises(UserError, match=r"data\.groups"):
        open_source(DataConfig(source=str(folder), groups=("food & drink",)), resolution=8, seed=0)
