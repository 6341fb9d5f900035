"""A tokenizer that cannot serve its text encoder is refused in one line, before any prompt is read."""

from __future__ import annotations

import dataclasses
import json

import pytest

from hypersd_jax.bases.prompting import require_embedded
from hypersd_jax.conditioning import load_tokenizer
from hypersd_jax.errors import UserError
from hypersd_jax.weights.components import assets
from hypersd_jax.weights.tokenizers import TokenizerFiles, tokenizer_files

FILES = tokenizer_files(assets() / "teacher" / "tokenizer")
TOKENS = 2274


def changed(**entries: object) -> TokenizerFiles:
    """The embedded model's, with other entries in its configuration."""
    config = {**json.loads(FILES.files["tokenizer_config.json"]), **entries}
    return dataclasses.replace(FILES, files={**FILES.files, "tokenizer_config.json": json.dumps(config).encode()})


@pytest.mark.parametrize(
    ("mark", "reason"), [("pad_token", "it has no pad_token"), ("bos_token", ".+"), ("eos_token", ".+")]
)
def test_without_a_mark(mark: str, reason: str) -> None:
    assert load_tokenizer(changed()).pad_token_id == TOKENS - 1
    with pytest.raises(UserError, match=rf"tokenizer: the tokenizer cannot be read \({reason}\)$"):
        load_tokenizer(changed(**{mark: None}))


def test_what_is_broken_is_told_in_a_line() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        files = dataclasses.replace(FILES, files={**FILES.files, name: b"[" * 10**4})
        with pytest.raises(UserError, match=r"tokenizer: the tokenizer cannot be read \(.{1,210}\)$"):
            load_tokenizer(files)


def test_ids_that_the_text_encoder_does_not_embed() -> None:
    tokenizer = load_tokenizer(FILES)
    require_embedded(tokenizer, TOKENS, "x")
    with pytest.raises(UserError, match=r"^x: the tokenizer's largest id is 2273, but its text encoder embeds 2273"):
        require_embedded(tokenizer, TOKENS - 1, "x")
