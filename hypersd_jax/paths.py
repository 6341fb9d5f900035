"""What the text of a path stands for, and where the user's caches are; imports nothing heavy."""

from __future__ import annotations

import os
import re
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

P = TypeVar("P", str, Path)

_ID = re.compile(
    r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[^/\s]+))?(?P<file>(?:/(?!\.{1,2}(?:/|$))[^/\s][^/]*)+)?"
)


def expanded(path: P) -> P:
    """Replace a leading ``~`` or ``~name`` by the home folder; a path that exists as it is spelled stays as it is."""
    if not str(path).startswith("~") or os.path.lexists(path):
        return path
    return type(path)(os.path.expanduser(path))


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
    """Whether a folder can be written, or made where it is missing."""
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
