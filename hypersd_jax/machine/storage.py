"""Folders that programs and models are kept in: their size, whether they can be written, and the room that is left."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from hypersd_jax.paths import cache_folder, can_write

MOST_SECONDS = 2.0
"""How long a folder is measured; of a larger one the report says that it holds at least so much."""


def compiled_programs() -> dict[str, Any]:
    """Describe the folder that `compilation.use_compilation_cache` keeps programs in."""
    named = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if named and "://" in named:
        return {"folder": named, "exists": None, "writable": None, "bytes": None, "complete": False}
    return folder(Path(named) if named else cache_folder("jax"))


def hub_cache() -> dict[str, Any]:
    """Describe the folder that models of the Hugging Face hub are kept in."""
    from huggingface_hub import constants

    return folder(Path(constants.HF_HUB_CACHE))


def free_disk() -> dict[str, Any]:
    """Read the free bytes where a run writes: here, and in the temporary folder."""
    places = {"here": Path.cwd(), "temporary": Path(tempfile.gettempdir())}
    return {name: {"folder": str(path), "free": shutil.disk_usage(path).free} for name, path in places.items()}


def folder(path: Path | None) -> dict[str, Any]:
    """Describe a folder, which need not exist; None where nothing can be written.

    Returns:
        "folder", "exists", "writable" (or can be made), "bytes", and "complete": whether all of it was measured.
    """
    if path is None:
        return {"folder": None, "exists": False, "writable": False, "bytes": 0, "complete": True}
    size, complete = _size(path)
    return {
        "folder": str(path),
        "exists": path.is_dir(),
        "writable": can_write(path.absolute()),
        "bytes": size,
        "complete": complete,
    }


def _size(path: Path) -> tuple[int, bool]:
    """Sum the bytes of a folder's files, links left out, for a while: (bytes, whether that was all)."""
    total, end = 0, time.monotonic() + MOST_SECONDS
    for parent, _, names in os.walk(path):
        for name in names:
            file = Path(parent, name)
            try:
                total += 0 if file.is_symlink() else file.stat().st_size
            except OSError:
                continue  # gone meanwhile
        if time.monotonic() > end:
            return total, False
    return total, True
