"""ImageReward's folder: completeness, its tokenizer, and every refusal in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import hypersd_jax as hs
from hypersd_jax.errors import UserError
from hypersd_jax.models.bert import BertConfig
from hypersd_jax.models.blip import blip
from hypersd_jax.models.blip_vision import BlipVisionConfig
from hypersd_jax.weights.keys import to_torch, torch_key
from hypersd_jax.weights.tensors import save_tensors

VISION = BlipVisionConfig(width=64, inner=8, layers=1, heads=1, image_size=8, patch_size=4)
TEXT = BertConfig(vocabulary=110, positions=40, width=128, inner=8, layers=2, heads=2, context_width=64)
WIDTHS = (128, 5, 4, 3, 2, 1)


def tensors() -> dict[str, np.ndarray]:
    """Random weights as the published file names them."""
    found = {f"blip.{torch_key(path)}": to_torch(path, np.asarray(x)) for path, x in blip(VISION, TEXT).init(0).items()}
    for index, before, after in zip((0, 2, 4, 6, 7), WIDTHS, WIDTHS[1:], strict=False):
        found[f"mlp.layers.{index}.weight"] = np.ones((after, before), np.float32)
        found[f"mlp.layers.{index}.bias"] = np.ones(after, np.float32)
    return found


def write(folder: Path, **changes: np.ndarray | None) -> Path:
    changed = {**tensors(), **{key.replace("__", "."): value for key, value in changes.items()}}
    save_tensors(folder / "model.safetensors", {key: value for key, value in changed.items() if value is not None})
    words = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "app", "##le"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return folder


def test_a_folder_and_its_file(tmp_path: Path) -> None:
    """Sizes come from the shapes; what the reward has no use for is passed over."""
    passengers = {
        "blip.vision_proj.weight": np.zeros((4, 64), np.float32),
        "blip.text_proj.bias": np.zeros(4, np.float32),
        "blip.text_encoder.embeddings.position_ids": np.arange(40)[None],
    }
    write(tmp_path, **passengers)
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
        hs.rewards.load("imagereward", write(tmp_path, **changes))


def test_without_a_tokenizer(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(UserError, match=r"no tokenizer files \(vocab\.txt of bert-base-uncased\)$"):
        hs.rewards.load("imagereward", tmp_path)
