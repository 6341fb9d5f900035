"""Prompts longer than a text encoder reads at once: several windows of it, or what is cut off, and the warning of it.

CLIP has room for S = 77 tokens, two of which mark begin and end. A longer prompt is cut into pieces of S - 2 tokens,
each of which is marked and padded like a prompt of its own, so no piece sees what stands in another.

Room is counted in tokens, never in characters: byte-level BPE gives a rare character up to four of them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from hypersd_jax.errors import shown


class LongPromptWarning(UserWarning):
    """A part of a prompt is not read."""


class Cut(NamedTuple):
    """A prompt of which the encoder reads ``room`` tokens, and the rest of its text, which it does not."""

    prompt: str
    ignored: str
    room: int


OnCut = Callable[[Sequence[Cut]], None]
"""A function that handles the cut prompts of a call, each of which is there once."""


def bare_tokens(tokenizer: Any, prompt: str) -> list[int]:
    """All token ids of a prompt, without begin and end."""
    found: list[int] = tokenizer(prompt, truncation=False, add_special_tokens=False, verbose=False)["input_ids"]
    return found


def window_count(tokenizer: Any, prompts: Sequence[str], length: int) -> int:
    """Count the windows of `length` tokens that the longest of the prompts fills, at least 1."""
    return max((math.ceil(len(bare_tokens(tokenizer, p)) / (length - 2)) for p in prompts), default=1) or 1


def in_windows(tokenizer: Any, prompts: Sequence[str], length: int, windows: int) -> np.ndarray:
    """Token ids (B, windows, length) int32; what does not fit is left out, and what is left over are empty windows."""
    ids = np.full((len(prompts), windows, length), tokenizer.pad_token_id, np.int32)
    ids[:, :, 0] = tokenizer.bos_token_id
    for windows_of, prompt in zip(ids, prompts, strict=True):
        tokens = bare_tokens(tokenizer, prompt)
        for i, window in enumerate(windows_of):
            piece = tokens[i * (length - 2) : (i + 1) * (length - 2)]
            window[1 : len(piece) + 1] = piece
            window[len(piece) + 1] = tokenizer.eos_token_id
    return ids


def find_cut(tokenizer: Any, prompt: str, room: int) -> Cut | None:
    """Find what is left out of a prompt of which `room` tokens are read; None where that is all of it.

    Of a character whose tokens are read in part, the whole character counts as left out.
    """
    tokens = tokenizer(prompt, truncation=False, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    if len(tokens["input_ids"]) <= room:
        return None
    return Cut(prompt, prompt[tokens["offset_mapping"][room][0] :], room)


def warn_of_cuts(cuts: Sequence[Cut], what: str = "prompt", stacklevel: int = 3) -> None:
    """Warn of cut prompts, in one line however many there are; ``stacklevel`` is that of `warnings.warn`."""
    for cut in cuts[:1]:
        if len(cuts) == 1:
            text = f"the {what} is longer than {cut.room} tokens; ignored: {shown(cut.ignored)}"
        else:
            text = f"{len(cuts)} {what}s are longer than {cut.room} tokens; ignored, {example(cut)}"
        warnings.warn(text, LongPromptWarning, stacklevel=stacklevel)


def example(cut: Cut) -> str:
    """Show a cut prompt as an example: its beginning, and what is not read."""
    return f"for example of {shown(cut.prompt[:40])}: {shown(cut.ignored)}"


@contextmanager
def already_warned() -> Iterator[None]:
    """Silence `LongPromptWarning`, where all prompts of a run have been checked before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LongPromptWarning)
        yield


class CutCounter:
    """A count of the captions of a run that are cut, each once; an `OnCut` for any thread."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._first: Cut | None = None

    def __call__(self, cuts: Sequence[Cut]) -> None:
        """Count the cut prompts that are new."""
        self._seen.update(hash(cut.prompt) for cut in cuts)
        self._first = self._first or next(iter(cuts), None)

    def report(self) -> str | None:
        """Summarise what was cut in one line; None where nothing was."""
        if self._first is None:
            return None
        count, room = len(self._seen), self._first.room
        are = "caption is" if count == 1 else "captions are"
        return (
            f"{count} {are} longer than the {room} tokens that the text encoder reads; ignored, {example(self._first)}"
        )
