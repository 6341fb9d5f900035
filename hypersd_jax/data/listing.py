"""Which files a local path, a pattern or a URL stands for."""

from __future__ import annotations

import glob
import re
from pathlib import Path
from typing import IO, Any

from hypersd_jax.errors import UserError, short

_SCHEME = re.compile(r"\w[\w+.-]*://")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
WEB = ("http://", "https://")
# What the file names of a set's parts are told apart by, such as `train-00000-of-00008.parquet`.
SPLIT_WORDS = ("train", "test", "validation", "valid", "val", "dev", "eval")


def is_url(source: str) -> bool:
    """Whether fsspec is to resolve it: ``https://...``, ``gs://...``, ``memory://...``."""
    return _SCHEME.match(source) is not None


def list_files(source: str) -> tuple[str, list[str]]:
    """The folder that a source lies in and the files it stands for, sorted.

    Args:
        source: a folder (all files below it), a file, or a pattern with ``*``, ``?``, ``{000..007}`` or ``{a,b}``;
            local or a URL of any file system that fsspec knows. On the web only files and braces.

    Returns:
        the folder (of a pattern: what stands before it), and full paths or URLs.

    Raises:
        UserError: naming ``data.source``, which does not exist, holds nothing, or cannot be reached.
    """
    try:
        found = [file for each in expand_braces(source) for file in _find(each)]
        folder = _folder(source)
    except Exception as error:  # every file system has its own kinds
        raise UserError(f"data.source: {source} cannot be reached ({reason(error)})") from None
    if not found:
        raise UserError(f"data.source: {source} is no folder, file, pattern or URL with files, nor 'emoji'")
    return folder, found


def _find(pattern: str) -> list[str]:
    """Sorted paths; what is hidden, such as `.cache/`, is left out. Web servers list nothing: an address is a file."""
    if pattern.startswith(WEB):
        return [pattern]
    system, root = _resolved(pattern)
    if glob.has_magic(pattern):
        found = system.glob(root)
    elif system.isdir(root):
        inside = len(root.rstrip("/"))
        found = [name for name in system.find(root) if "/." not in name[inside:]]
    else:
        found = [root] if system.exists(root) else []
    return sorted(_spelled(system, name) for name in found)


def _folder(source: str) -> str:
    if source.startswith(WEB):
        return source.partition("?")[0].rpartition("/")[0]
    system, root = _resolved(re.split(r"(?<=/)[^/]*[*?{\[]|^[^/]*[*?{\[]", source)[0] or ".")
    return _spelled(system, root if system.isdir(root) else root.rpartition("/")[0]).rstrip("/")


def _resolved(source: str) -> tuple[Any, str]:
    import fsspec  # type: ignore[import-untyped]  # slow to import, like datasets, with which it comes

    system, root = fsspec.url_to_fs(source)
    return system, str(root)


def _spelled(system: Any, name: str) -> str:
    """A local path as it is, anything else as a URL."""
    return name if "file" in system.protocol else str(system.unstrip_protocol(name))


def file_name(file: str) -> str:
    """The last part of a path or URL."""
    return (file.partition("?")[0] if file.startswith(WEB) else file).rpartition("/")[2]


def open_file(path: str) -> IO[bytes]:
    """Open a local path or a URL for reading; raises OSError, or what its file system raises."""
    if not is_url(path):
        return Path(path).open("rb")
    import fsspec

    opened: IO[bytes] = fsspec.open(path, "rb").open()
    return opened


def expand_braces(pattern: str) -> list[str]:
    """``part-{000..002}.tar`` and ``{a,b}.tar`` as a shell expands them; datasets itself knows no braces."""
    match = _BRACES.search(pattern)
    if not match:
        return [pattern]
    inside = match.group(1)
    bounds = _RANGE.fullmatch(inside)
    if bounds:
        first, last = bounds.groups()
        choices = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    else:
        choices = inside.split(",")
    return [
        whole
        for choice in choices
        for whole in expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])
    ]


def of_split(files: list[str], split: str, source: str) -> list[str]:
    """The shards of a split: those whose file or folder name has its word; for ``train`` else all without any.

    Raises:
        UserError: there are none.
    """

    def words(file: str) -> set[str]:
        inside = file[len(source) :] if file.startswith(source) else file_name(file)
        return set(re.split(r"[/_.-]", inside))

    named = [file for file in files if split in words(file)]
    if not named and split == "train":
        named = [file for file in files if not words(file) & set(SPLIT_WORDS)]
    if not named:
        raise UserError(f"data.split: {source} has no files of a split {split!r}")
    return named


def reason(error: BaseException) -> str:
    """The first line of another library's error."""
    return short(next(iter(str(error).strip().splitlines()), type(error).__name__))
