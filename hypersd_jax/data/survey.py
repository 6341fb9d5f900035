"""The sizes of all pictures of a set, looked up once and kept in the user's cache folder."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hypersd_jax import paths
from hypersd_jax.data.pictures import picture_size, read_picture
from hypersd_jax.data.reading import Rows

WORKERS = min(8, os.cpu_count() or 1)


def picture_sizes(rows: Rows, *, decode: bool = False) -> np.ndarray:
    """(height, width) of every picture, int32 (N, 2), and zeros for those that cannot be read.

    What was found is kept by the set's fingerprint, and only what could not be read is tried again. Only headers are
    read, unless ``decode``: then a picture counts as readable only if all of it is.
    """
    kept = cache_folder() / f"{rows.fingerprint}-{'decoded' if decode else 'headers'}.npy"
    sizes = _kept(kept, len(rows))
    missing = np.flatnonzero(sizes[:, 0] == 0)

    def look(row: int) -> tuple[int, int]:
        try:
            with rows.open_image(row) as file:
                if not decode:
                    return picture_size(file)
                picture = read_picture(file)
                return picture.height, picture.width
        except Exception:  # Pillow and the file systems raise many kinds
            return 0, 0

    title = "checking pictures" if decode else "reading picture sizes"
    with ThreadPoolExecutor(WORKERS) as pool, tqdm(total=len(missing), desc=title, unit="picture", delay=1.0) as bar:
        for row, size in zip(missing, pool.map(look, missing.tolist()), strict=True):
            sizes[row] = size
            bar.update()
    if sizes[missing].any():
        _keep(kept, sizes)
    return sizes


def cache_folder() -> Path:
    """Where surveys are kept; below a file, where nothing can be, if the user has no folder that can be written."""
    return paths.cache_folder("pictures") or Path(os.devnull)


def _kept(path: Path, count: int) -> np.ndarray:
    """What an earlier survey found; zeros where there was none, or a damaged one."""
    try:
        found: np.ndarray = np.load(path, allow_pickle=False)
    except (OSError, ValueError):
        found = np.empty(0)
    return found if found.shape == (count, 2) and found.dtype == np.int32 else np.zeros((count, 2), np.int32)


def _keep(path: Path, sizes: np.ndarray) -> None:
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(temporary, sizes)
        temporary.replace(path)
    except OSError:
        pass  # a home that cannot be written only means looking again next time
