"""Extract the merges of CLIP's tokenizer that ship in hypersd_jax/assets/clip.

    pip download --no-deps open_clip_torch==3.3.0
    python scripts/build_clip_merges.py open_clip_torch-3.3.0-py3-none-any.whl

CLIP reads the first 48,894 of the file's merges; with the 256 bytes, in and at the end of a word, and the two marks
they make its 49,408 tokens.
"""

from __future__ import annotations

import argparse
import gzip
import zipfile
from pathlib import Path

MERGES = 49408 - 2 * 256 - 2


def main() -> None:
    """Read the wheel, write merges.txt.gz."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("output", type=Path, nargs="?", default=Path("hypersd_jax/assets/clip/merges.txt.gz"))
    arguments = parser.parse_args()
    with zipfile.ZipFile(arguments.wheel) as wheel:
        packed = wheel.read("open_clip/bpe_simple_vocab_16e6.txt.gz")
    lines = gzip.decompress(packed).decode("utf-8").split("\n")
    text = "".join(f"{line}\n" for line in lines[1 : MERGES + 1])  # the first line is a heading
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_bytes(gzip.compress(text.encode("utf-8"), 9, mtime=0))


if __name__ == "__main__":
    main()
