"""Prompts longer than a text encoder reads at once, as several windows of it.

CLIP has room for S = 77 tokens, two of which mark begin and end. A longer prompt is cut into pieces of S - 2 tokens,
each of which is marked and padded like a prompt of its own, so no piece sees what stands in another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def bare_tokens(tokenizer: Any, prompt: str) -> list[int]:
    """All token ids of a prompt, without begin and end."""
    found: list[int] = tokenizer(prompt, truncation=False, add_special_tokens=False, verbose=False)["input_ids"]
    return found


def window_count(tokenizer: Any, prompts: Sequence[str], length: int) -> int:
    """How many windows of `length` tokens the longest of the prompts fills, at least 1."""
    # a token is at least one character, so short prompts need no look
    counts = [math.ceil(len(bare_tokens(tokenizer, p)) / (length - 2)) for p in prompts if len(p) > length - 2]
    return max(counts, default=1)


def in_windows(tokenizer: Any, prompts: Sequence[str], length: int, windows: int) -> np.ndarray:
    """Token ids (B, windows, length) int32; what does not fit is left out, and what is left over are empty windows."""
    ids = np.full((len(prompts), windows, length), tokenizer.pad_token_id, np.int32)
    ids[:, :, 0] = tokenizer.bos_token_id
    for row, prompt in zip(ids, prompts, strict=True):
        tokens = bare_tokens(tokenizer, prompt)
        for i, window in enumerate(row):
            piece = tokens[i * (length - 2) : (i + 1) * (length - 2)]
            window[1 : len(piece) + 1] = piece
            window[len(piece) + 1] = tokenizer.eos_token_id
    return ids
