"""CLIP's tokenizer out of its merges, against ids that are known."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from hypersd_jax.weights.components import assets
from hypersd_jax.weights.tokenizers import CLIP_TOKENS, clip_tokenizer, is_clip_tokenizer, tokenizer_files

PROMPT = "a photo of an astronaut riding a horse on mars"
IDS = [49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496, 49407]


@pytest.mark.parametrize(("pad", "filler"), [("<|endoftext|>", 49407), ("!", 0)])
def test_known_ids(pad: str, filler: int) -> None:
    with clip_tokenizer(pad).in_folder() as folder:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    assert not folder.exists()
    assert len(tokenizer) == CLIP_TOKENS
    assert tokenizer.model_max_length == 77
    assert tokenizer(PROMPT)["input_ids"] == IDS
    assert tokenizer(PROMPT, padding="max_length")["input_ids"] == IDS + [filler] * (77 - len(IDS))
    assert tokenizer(f"  {PROMPT.upper()} ")["input_ids"] == IDS
    assert tokenizer.decode(IDS, skip_special_tokens=True).strip() == PROMPT


def test_written_again_by_transformers_it_is_still_clips(tmp_path: Path) -> None:
    """A release that writes tokenizer.json alone, and one that writes vocab.json."""
    clip_tokenizer("!").write(tmp_path / "ours")
    CLIPTokenizer.from_pretrained(str(tmp_path / "ours"), local_files_only=True).save_pretrained(tmp_path / "theirs")
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        found = tokenizer_files(folder)
        assert is_clip_tokenizer(found, "!", 77), sorted(found.files)
        assert not is_clip_tokenizer(found, "<|endoftext|>", 77)
        assert not is_clip_tokenizer(found, "!", 24)
    assert not is_clip_tokenizer(tokenizer_files(assets() / "teacher" / "tokenizer"), "<|endoftext|>", 24)
    assert tokenizer_files(tmp_path / "nothing").files == {}
    assert not is_clip_tokenizer(tokenizer_files(tmp_path / "nothing"), "!", 77)
