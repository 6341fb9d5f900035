"""The files of a source that belong to a split."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hypersd_jax.data.listing import Listing, file_name
from hypersd_jax.errors import UserError

# What the file and folder names of a set's parts are told apart by, such as `train-00000-of-00008.parquet`.
TRAIN = "train"
OTHERS = ("test", "validation", "valid", "val", "dev", "eval")


def _words(text: str) -> set[str]:
    return set(re.split(r"[/_.\s-]", text.lower()))


def _inside(file: str, folder: str) -> str:
    """The part of a path below the source's folder, which alone may name a split."""
    return file[len(folder) :] if file.startswith(folder) else file_name(file)


def shards_of(listing: Listing, files: Sequence[str], split: str) -> list[str]:
    """The shards of a split: those with its word in their file or folder name; for ``train`` else all without any.

    What the source itself names is used: a file, or a pattern in which a split's word stands.

    Raises:
        UserError: there are none; says what to set.
    """
    if split == TRAIN and listing.by_name:
        beyond = _inside(listing.source, listing.folder)
        if listing.is_one_file or _words(beyond) & {TRAIN, *OTHERS}:
            return list(files)
    named = [file for file in files if split in _words(_inside(file, listing.folder))]
    if not named and split == TRAIN:
        named = [file for file in files if not _words(_inside(file, listing.folder)) & set(OTHERS)]
    if not named:
        found = sorted(set().union(*(_words(_inside(file, listing.folder)) for file in files)) & {TRAIN, *OTHERS})
        remedy = f"set data.split to one of {', '.join(found)}, or name the file" if found else "leave data.split out"
        raise UserError(f"data.split: {listing.source} has no files of a split {split!r}; {remedy}")
    return named


def images_of(listing: Listing, split: str) -> tuple[list[str], dict[str, list[str]]]:
    """The files of a split of a folder of images: those in its sub-folder; for ``train`` else all in no other split's.

    Returns:
        the files, and what is left out, by reason.

    Raises:
        UserError: there are none; says what to set.
    """
    files, folder = list(listing.files), listing.folder

    def other(file: str, words: Sequence[str] = OTHERS) -> str | None:
        parts = _inside(file, folder).lower().split("/")[:-1]
        return next((part for part in parts if part in words), None)

    inside = [file for file in files if file.startswith(f"{folder}/{split}/")]
    if inside:
        outside = [file for file in files if other(file, (split, TRAIN, *OTHERS)) is None]
        return inside, {f"outside the folder {split}": outside}
    if split != TRAIN:
        raise UserError(f"data.split: {listing.source} has no folder {split!r}")
    apart: dict[str, list[str]] = {}
    for file in files:
        if (word := other(file)) is not None:
            apart.setdefault(f"in a folder called {word}", []).append(file)
    kept_files = [file for file in files if other(file) is None]
    if not kept_files:
        words = " or ".join(sorted(reason.rpartition(" ")[2] for reason in apart))
        raise UserError(f"data.split: all of {listing.source} is in folders of other splits; set data.split to {words}")
    return kept_files, apart
