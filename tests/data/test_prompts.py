from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hypersd_jax.config import DataConfig
from hypersd_jax.data import EmojiSource, PromptSource, open_prompts, open_source
from hypersd_jax.errors import UserError
from tests.helpers.image_sets import parquet, with_metadata

PROMPTS = ["a cat", "a red apple, 35 mm", "été"]


def written(path: Path, form: str) -> Path:
    file = path / f"prompts.{form}"
    if form == "txt":
        file.write_text("a cat\n\n  a red apple, 35 mm \nété\n", encoding="utf-8")
    elif form == "csv":
        file.write_text('prompt\na cat\n"a red apple, 35 mm"\nété\n', encoding="utf-8")
    elif form == "jsonl":
        file.write_text("\n".join(f'{{"text": "{prompt}"}}' for prompt in PROMPTS), encoding="utf-8")
    else:
        parquet(file, {"caption": PROMPTS})
    return file


@pytest.mark.parametrize("form", ["txt", "csv", "jsonl", "parquet"])
def test_prompts_alone(form: str, tmp_path: Path) -> None:
    source = open_prompts(DataConfig(source=str(written(tmp_path, form))), seed=0)
    assert isinstance(source, PromptSource)
    assert len(source) == 3
    assert source.preview_prompts == PROMPTS
    whole = source.prompts(np.arange(9))
    assert all(sorted(whole[epoch : epoch + 3]) == sorted(PROMPTS) for epoch in (0, 3, 6))
    again = open_prompts(DataConfig(source=str(tmp_path / f"prompts.{form}")), seed=0)
    assert again.prompts(np.asarray([8, 1, 4])) == [whole[8], whole[1], whole[4]]


def test_captions_of_pairs_serve_too(tmp_path: Path) -> None:
    folder = with_metadata(tmp_path, range(4))
    for image in folder.glob("*.png"):
        image.unlink()
    source = open_prompts(DataConfig(source=str(folder)), seed=0)
    assert sorted(source.prompts(np.arange(4))) == [f"picture {number}" for number in range(4)]


def test_captions_of_the_embedded_images() -> None:
    config = DataConfig(split="all", white_fraction=1.0)
    positions = np.arange(16)
    found = open_prompts(config, seed=3).prompts(positions)
    assert found == EmojiSource(seed=3, split="all", white_fraction=1.0).batch(positions).captions


def test_what_is_no_set_of_prompts(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(UserError, match=r"empty\.txt: none of its 2 rows holds a prompt"):
        open_prompts(DataConfig(source=str(tmp_path / "empty.txt")), seed=0)
    with pytest.raises(UserError, match=r"prompts\.txt has no images"):
        open_source(DataConfig(source=str(written(tmp_path, "txt"))), resolution=8, seed=0)
    with pytest.raises(UserError, match=r"data\.groups does not apply"):
        open_prompts(DataConfig(source="x.txt", groups=("activities",)), seed=0)
