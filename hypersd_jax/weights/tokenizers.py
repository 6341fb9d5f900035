"""Tokenizers as files: a model's, and CLIP's own for models that are stored without one."""

from __future__ import annotations

import functools
import gzip
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from hypersd_jax.errors import UserError

START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_TOKENS = 49408
"""The size of CLIP's vocabulary: 256 bytes, each also as the end of a word, 48894 merges and two marks."""


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """The files of one tokenizer, as `transformers` reads them from a folder.

    Attributes:
        origin: where they come from, for messages.
        files: content by file name; empty where there is none.
    """

    origin: str
    files: Mapping[str, bytes]

    def write(self, folder: Path) -> None:
        """Write them into a folder, which is made."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)

    @contextmanager
    def in_folder(self) -> Iterator[Path]:
        """A temporary folder that holds them."""
        with tempfile.TemporaryDirectory() as folder:
            self.write(Path(folder))
            yield Path(folder)


def tokenizer_files(folder: Path) -> TokenizerFiles:
    """The files of a tokenizer's folder; none where there is no such folder."""
    try:
        found = [path for path in sorted(folder.glob("*")) if path.is_file() and not path.name.startswith(".")]
        files = {path.name: path.read_bytes() for path in found}
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror or error})") from error
    return TokenizerFiles(origin=str(folder), files=files)


def clip_tokenizer(pad: str, length: int = 77) -> TokenizerFiles:
    """CLIP's tokenizer.

    Args:
        pad: what fills a prompt up: OpenAI's encoder (SD 1.x, SDXL's first) was used with the end mark, OpenCLIP's
            (SD 2.x, SDXL's second) with token 0, which reads "!".
        length: tokens that the text encoder has positions for.
    """
    vocabulary, merges = _clip_vocabulary()
    marks: dict[str, Any] = {"bos_token": START, "eos_token": END, "pad_token": pad, "unk_token": END}
    config = {
        **marks,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": length,
        "tokenizer_class": "CLIPTokenizer",
    }
    files = {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False).encode(),
        "merges.txt": f"#version: 0.2\n{merges}".encode(),
        "special_tokens_map.json": _json(marks),
        "tokenizer_config.json": _json(config),
    }
    return TokenizerFiles(origin="CLIP's tokenizer", files=files)


def is_clip_tokenizer(tokenizer: TokenizerFiles, pad: str, length: int) -> bool:
    """Tell whether `clip_tokenizer` of these arguments gives the same ids."""
    try:
        if "vocab.json" in tokenizer.files:
            vocabulary = json.loads(tokenizer.files["vocab.json"])
        else:
            vocabulary = json.loads(tokenizer.files["tokenizer.json"])["model"]["vocab"]
        config = json.loads(tokenizer.files["tokenizer_config.json"])
        filler = config.get("pad_token", END)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return False
    filler = filler.get("content") if isinstance(filler, dict) else filler
    return (vocabulary, filler, config.get("model_max_length", length)) == (_clip_vocabulary()[0], pad, length)


@functools.cache
def _clip_vocabulary() -> tuple[dict[str, int], str]:
    """(ids by token, the merges as lines): the merges alone decide the vocabulary."""
    packed = (resources.files("hypersd_jax") / "assets" / "clip" / "merges.txt.gz").read_bytes()
    merges = gzip.decompress(packed).decode("utf-8")
    letters = _byte_letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += ["".join(line.split()) for line in merges.split("\n") if line]
    return {token: index for index, token in enumerate([*tokens, START, END])}, merges


def _byte_letters() -> list[str]:
    """One printable letter for each byte, printable bytes first: GPT-2's order, which CLIP's ids follow."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
