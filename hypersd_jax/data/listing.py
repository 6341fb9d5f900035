"""Listing the files of a local path, a pattern or a URL."""

from __future__ import annotations

import dataclasses
import glob
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from hypersd_jax.errors import UserError, short

_SCHEME = re.compile(r"\w[\w+.-]*://")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MAGIC = re.compile(r"[*?\[{]")
WEB = ("http://", "https://")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listing:
    """The files of a source.

    Attributes:
        source: as it was given.
        folder: where it lies; of a pattern, what stands before its first wildcard.
        files: full paths or URLs, sorted.
        by_name: whether the source names its files: one file, or a pattern, not a folder.
        left_out: names of what was found and cannot be used, by reason.
    """

    source: str
    folder: str
    files: tuple[str, ...]
    by_name: bool
    left_out: Mapping[str, tuple[str, ...]]

    @property
    def is_one_file(self) -> bool:
        """Whether the source is a file's own name."""
        return self.files == (self.source,) or (self.by_name and not _MAGIC.search(self.source))


def is_url(source: str) -> bool:
    """Tell whether fsspec is to resolve it: ``https://...``, ``gs://...``, ``memory://...``."""
    return _SCHEME.match(source) is not None


def list_files(source: str) -> Listing:
    """List the files of a source; what is hidden, such as `.cache/`, is left out, and links are followed.

    Args:
        source: a folder (all files below it), a file, or a pattern with ``*``, ``?``, ``[ab]``, ``{000..007}`` or
            ``{a,b}``; local, or a URL of any file system that fsspec knows. On the web only files and braces. What
            exists locally is taken by its name, whatever characters that has, and so is the part of a pattern that
            exists.

    Raises:
        UserError: naming ``data.source``, which does not exist, holds nothing, or cannot be reached.
    """
    if source.startswith("file://"):
        source = source.removeprefix("file://")
    try:
        folder, found, by_name = _remote(source) if is_url(source) else _local(source)
    except Exception as error:  # every file system has its own kinds
        raise UserError(f"data.source: {source} cannot be reached ({reason(error)})") from None
    if not found:
        what = (
            "is an empty folder"
            if os.path.isdir(source)
            else "is no folder, file, pattern or URL with files, nor 'emoji'"
        )
        raise UserError(f"data.source: {source} {what}")
    kept = tuple(sorted(file for file in found if _is_unicode(file)))
    odd = tuple(ascii(file_name(file)) for file in found if not _is_unicode(file))
    return Listing(
        source=source,
        folder=folder,
        files=kept,
        by_name=by_name,
        left_out={"whose name is not UTF-8": odd} if odd else {},
    )


def _is_unicode(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _local(source: str) -> tuple[str, list[str], bool]:
    """Folder, files, and whether they were named, of a local path or pattern."""
    if os.path.isdir(source):
        folder = source.rstrip("/") or "/"
        return folder, list(_below(folder, ())), False
    if os.path.exists(source):
        return os.path.dirname(source) or ".", [source], True
    literal, pattern = _existing_part(source)
    matches = {
        os.path.join(literal, name)
        for each in expand_braces(pattern)
        for name in glob.glob(each, root_dir=literal or None, recursive=True)
    }
    found = [file for match in matches for file in (_below(match, ()) if os.path.isdir(match) else [match])]
    return literal.rstrip("/") or ("/" if literal else "."), found, True


def _existing_part(pattern: str) -> tuple[str, str]:
    """The folders of a pattern that exist under their very names, and the rest."""
    parts = pattern.split("/")
    for count in range(len(parts) - 1, 0, -1):
        folder = "/".join(parts[:count]) + "/"
        if os.path.isdir(folder):
            return folder, "/".join(parts[count:])
    return "", pattern


def _below(folder: str, above: tuple[str, ...]) -> Iterator[str]:
    """All files below a folder that are not hidden; a link to a folder above is not followed."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _below(os.path.join(folder, entry.name), (*above, real))
            else:
                yield os.path.join(folder, entry.name)


def _remote(source: str) -> tuple[str, list[str], bool]:
    """Folder, files, and whether they were named, of a URL. Web servers list nothing: an address is a file."""
    if source.startswith(WEB):
        return source.partition("?")[0].rpartition("/")[0], expand_braces(source), True
    system, root = _resolved(re.split(r"(?<=/)[^/]*[*?{\[]", source)[0])
    is_folder = bool(system.isdir(root))
    folder = _spelled(system, root if is_folder else root.rpartition("/")[0]).rstrip("/")
    found = [file for each in expand_braces(source) for file in _find(each)]
    return folder, found, not is_folder or _MAGIC.search(source) is not None


def _find(pattern: str) -> list[str]:
    system, root = _resolved(pattern)
    if glob.has_magic(pattern):
        found = system.glob(root)
    elif system.isdir(root):
        inside = len(root.rstrip("/"))
        found = [name for name in system.find(root) if "/." not in name[inside:]]
    else:
        found = [root] if system.exists(root) else []
    return [_spelled(system, name) for name in found]


def _resolved(source: str) -> tuple[Any, str]:
    import fsspec  # type: ignore[import-untyped]  # slow to import, like datasets, with which it comes

    system, root = fsspec.url_to_fs(source)
    return system, str(root)


def _spelled(system: Any, name: str) -> str:
    return str(system.unstrip_protocol(name))


def file_name(file: str) -> str:
    """Return the last part of a path or URL."""
    return (file.partition("?")[0] if file.startswith(WEB) else file).rpartition("/")[2]


def open_file(path: str) -> IO[bytes]:
    """Open a local path or a URL for reading; raises OSError, or what its file system raises."""
    if not is_url(path):
        return Path(path).open("rb")
    import fsspec

    opened: IO[bytes] = fsspec.open(path, "rb").open()
    return opened


def stamp(path: str) -> str:
    """Size and time of a local file or of a URL, which change when it does; raises as `open_file`."""
    if not is_url(path):
        status = Path(path).stat()
        return f"{status.st_size} {status.st_mtime_ns}"
    system, root = _resolved(path)
    info = system.info(root)
    times = (str(info[key]) for key in ("ETag", "etag", "mtime", "updated", "LastModified", "created") if key in info)
    return f"{info.get('size')} {next(times, '')}"


def expand_braces(pattern: str) -> list[str]:
    """``part-{000..002}.tar`` and ``{a,b}.tar`` as a shell expands them."""
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
        expanded
        for choice in choices
        for expanded in expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])
    ]


def reason(error: BaseException) -> str:
    """The first line of another library's error."""
    return short(next(iter(str(error).strip().splitlines()), type(error).__name__))
