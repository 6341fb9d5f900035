"""The meaning of a path's text, and the folders of the user's caches; imports nothing heavy."""

from __future__ import annotations

import math
import os
import re
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from hypersd_jax.errors import UserError

P = TypeVar("P", str, Path)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
"""Endings of the image files that are written."""

_ID = re.compile(
    r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[^/\s]+))?(?P<file>(?:/(?!\.{1,2}(?:/|$))[^/\s][^/]*)+)?"
)


def expanded(path: P) -> P:
    """Replace a leading ``~`` or ``~name`` by the home folder; a path that exists as it is spelled stays as it is.

    Raises:
        UserError: there is no home folder to put in its place.
    """
    if not str(path).startswith("~") or os.path.lexists(path):
        return path
    found = os.path.expanduser(path)
    if str(found).split("/")[0] == "~":
        raise UserError(f"{path}: the home folder is not known; set HOME, or write the whole path")
    return type(path)(found)


@dataclass(frozen=True, kw_only=True)
class HubId:
    """A repository, a revision of it (None: its main branch), and a file in it or None."""

    repo: str
    revision: str | None
    file: str | None

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return self.repo + at + (f"/{self.file}" if self.file else "")


def parse_id(source: str | os.PathLike[str]) -> HubId | None:
    """Read an id; None for what can only be a path."""
    match = _ID.fullmatch(str(source))
    if match is None:
        return None
    return HubId(repo=match["repo"], revision=match["revision"], file=match["file"][1:] if match["file"] else None)


def require_id(source: str | os.PathLike[str]) -> HubId:
    """Read an id; UserError for what can only be a path, which there is none of then."""
    found = parse_id(source)
    if found is None:
        raise UserError(f"{source}: no such file or folder")
    return found


def require_model_folder(folder: Path) -> None:
    """UserError unless a folder holds a model in diffusers' layout."""
    if not (folder / "model_index.json").is_file():
        empty = "" if any(folder.iterdir()) else "an empty folder, "
        raise UserError(f"{folder}: {empty}not a diffusers model folder (model_index.json is missing)")


def parse_lora(text: str) -> tuple[Path, float]:
    """The file and scale of ``FILE[@SCALE]``; a file whose own name has an @, and a hub id's revision, stay as is.

    Raises:
        UserError: the scale is not a finite number.
    """
    name, at, scale = text.rpartition("@")
    whole = expanded(Path(text))
    if not at or os.path.exists(whole):
        return whole, 1.0
    try:
        number = float(scale)
    except ValueError:
        number = math.nan
    if math.isfinite(number) and "_" not in scale:
        return expanded(Path(name)), number
    found = parse_id(text)
    if "@" not in name and found is not None and found.revision and not found.repo.endswith(".safetensors"):
        return whole, 1.0
    raise UserError(f"--lora {text}: the scale {scale!r} is not a number")


def numbered_paths(path: Path, count: int, *, bare: bool = True) -> list[Path]:
    """Names for that many new files, none of which exists: ``STEM-000``, ... on from the highest number there.

    Args:
        path: folder, stem and suffix of the names. Files of the same stem and another suffix count too.
        count: how many.
        bare: whether one file alone is ``path`` itself, where that is free.
    """
    if bare and count == 1 and not os.path.lexists(path):
        return [path]
    pattern = re.compile(re.escape(path.stem) + r"-([0-9]{3,})\.\w+")
    names = os.listdir(path.parent) if path.parent.is_dir() else []
    taken = [int(match[1]) for match in map(pattern.fullmatch, names) if match]
    start = max(taken, default=-1) + 1
    return [path.with_name(f"{path.stem}-{start + index:03d}{path.suffix}") for index in range(count)]


def home() -> Path | None:
    """The home folder; None where nothing names one (no HOME, and a user id without an entry)."""
    found = os.path.expanduser("~")
    return None if found == "~" else Path(found)


def cache_folder(name: str) -> Path | None:
    """Choose the folder of a cache: of XDG_CACHE_HOME, of ``~/.cache``, or of the temporary folder.

    The first that can be written counts, so that a container without a home folder, or with one that is not the
    user's, keeps its caches too. The one in the temporary folder is this user's alone.

    Args:
        name: what is kept there, such as ``jax``.

    Returns:
        ``.../hypersd_jax/NAME``, which need not exist yet; None where nothing can be written.
    """
    for folder in _user_caches():
        if can_write(folder / "hypersd_jax" / name):
            return folder / "hypersd_jax" / name
    return _private(name) if hasattr(os, "getuid") else None


def can_write(folder: Path) -> bool:
    """Tell whether a folder can be written, or made where it is missing."""
    while not os.path.lexists(folder):
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _user_caches() -> list[Path]:
    """XDG_CACHE_HOME, which counts only where it is absolute, and ``~/.cache``."""
    named, own = os.environ.get("XDG_CACHE_HOME", ""), home()
    folders = [Path(named)] if os.path.isabs(named) else []
    return folders if own is None else [*folders, own / ".cache"]


def _private(name: str) -> Path | None:
    """A folder that nobody else may read or write: what is compiled is run when it is found again."""
    folder = Path(tempfile.gettempdir()) / f"hypersd_jax-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    return folder / name if mine else None
