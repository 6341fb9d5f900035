"""ImageReward's folder: completeness, its tokenizer, and every refusal in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import hypersd_jax as hs
from hypersd_jax.errors import UserError
from hypersd_jax.models.blip import blip
from tests.helpers.tiny_image_reward import TEXT, VISION, tiny_image_reward


def test_a_folder_and_its_file(tmp_path: Path) -> None:
    """Sizes come from the shapes; what the reward has no use for is passed over."""
    passengers = {
        "blip.vision_proj.weight": np.zeros((4, 64), np.float32),
        "blip.text_proj.bias": np.zeros(4, np.float32),
        "blip.text_encoder.embeddings.position_ids": np.arange(40)[None],
    }
    tiny_image_reward(tmp_path, **passengers)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        reward = hs.rewards.load("imagereward", path)
        assert reward.params.keys() == {*blip(VISION, TEXT).shapes, "head.0.kernel", "head.0.bias"}
    ids = reward.tokenize(["Red apple", "red " * 50])
    assert ids.shape == (2, 35)
    assert ids[0].tolist() == [101, 104, 105, 106, 102] + 30 * [0]
    assert ids[1].tolist() == [101, *33 * [104], 102]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blip__visual_encoder__cls_token": None}, r"1 missing \(blip\.visual_encoder\.cls_token\)$"),
        ({"blip__itm_head__weight": np.zeros(2, np.float32)}, r"1 unexpected \(blip\.itm_head\.weight\)$"),
        ({"mlp__layers__3__weight": np.zeros(2, np.float32)}, r"1 unexpected \(mlp\.layers\.3\.weight\)$"),
        ({"mlp__layers__4__bias": None}, r"1 missing \(mlp\.layers\.4\.bias\)$"),
        (
            {"mlp__layers__0__weight": np.ones((5, 7), np.float32)},
            r"0\.weight reads 7 numbers instead of 128$",
        ),
        (
            {"blip__visual_encoder__pos_embed": None},
            r"no ImageReward \(no blip\.visual_encoder\.pos_embed of 3 axes",
        ),
        (
            {"blip__text_encoder__embeddings__word_embeddings__weight": np.ones((110, 100), np.float32)},
            r"an encoder 100 wide cannot be split into heads 64 wide$",
        ),
        (
            {"blip__text_encoder__embeddings__word_embeddings__weight": np.ones((90, 128), np.float32)},
            r"the tokenizer has 107 tokens, but the text encoder 90$",
        ),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, changes: dict[str, np.ndarray | None], message: str) -> None:
    with pytest.raises(UserError, match=message):
        hs.rewards.load("imagereward", tiny_image_reward(tmp_path, **changes))


def test_without_a_tokenizer(tmp_path: Path) -> None:
    tiny_image_reward(tmp_path)
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(UserError, match=r"no tokenizer files \(vocab\.txt of bert-base-uncased\)$"):
        hs.rewards.load("imagereward", tmp_path)
