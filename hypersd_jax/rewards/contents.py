"""A name for a reward's files: weights, configuration and tokenizer, by their contents."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from hypersd_jax.errors import UserError
from hypersd_jax.paths import expanded
from hypersd_jax.weights.diffusers.clip import OPEN_CLIP, OPEN_CLIP_CONFIG, TOKENIZER_FILES
from hypersd_jax.weights.tensors import PICKLE_SUFFIXES

BESIDE = ("config.json", OPEN_CLIP_CONFIG, "preprocessor_config.json", "vocab.txt", *TOKENIZER_FILES)
"""What belongs to a weights file in the same folder."""

CLIPS = ("model*.safetensors*", f"{OPEN_CLIP}.safetensors")
"""Patterns of the CLIP that an aesthetic head's file is read with."""


def contents_digest(path: str | os.PathLike[str]) -> str:
    """Hash a reward's files: the hexadecimal SHA-256 over names and contents of all that its loader may read.

    Args:
        path: a folder, whose own files count, less hidden ones and PyTorch's, which no reward reads; or a file, which
            counts under any name, with what belongs to it in its folder: configuration, tokenizer, a head's CLIP.

    Raises:
        UserError: naming a file that cannot be read.
    """
    path = expanded(Path(path))
    found = hashlib.sha256()
    for file in _files_of(path):
        name = "" if file == path else file.name
        found.update(f"{name} {_content(file)}\n".encode(errors="surrogateescape"))
    return found.hexdigest()


def _files_of(path: Path) -> Sequence[Path]:
    if not path.is_dir():
        beside = {path.parent / name for name in BESIDE} | {file for each in CLIPS for file in path.parent.glob(each)}
        return [path, *sorted(file for file in beside - {path} if file.is_file())]
    own = (file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    return sorted(file for file in own if file.suffix.lower() not in PICKLE_SUFFIXES)


def _content(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
