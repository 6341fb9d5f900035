"""The sizes of all pictures of a set, looked up once and kept in the user's cache folder."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hypersd_jax.data.pictures import picture_size, read_picture
from hypersd_jax.data.reading import Rows

WORKERS = min(8, os.cpu_count() or 1)


def picture_sizes(rows: Rows, *, decode: bool = False) -> np.ndarray:
    """(height, width) of every picture, int32 (N, 2), and zeros for those that cannot be read.

    What was found is kept by the set's fingerprint. Only headers are read, unless ``decode``: then a picture counts
    as readable only if all of it is.
    """
    kept = cache_folder() / f"{rows.fingerprint}-{'decoded' if decode else 'headers'}.npy"
    try:
        found: np.ndarray = np.load(kept, allow_pickle=False)
        if found.shape == (len(rows), 2) and found.dtype == np.int32:
            return found
    except (OSError, ValueError):
        pass  # not there yet, or damaged: looked up anew
    sizes = np.zeros((len(rows), 2), np.int32)

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
    with ThreadPoolExecutor(WORKERS) as pool, tqdm(total=len(rows), desc=title, unit="picture", delay=1.0) as bar:
        for row, size in enumerate(pool.map(look, range(len(rows)))):
            sizes[row] = size
            bar.update()
    _keep(kept, sizes)
    return sizes


def cache_folder() -> Path:
    """Where surveys are kept."""
    return Path.home() / ".cache" / "hypersd_jax" / "pictures"


def _keep(path: Path, sizes: np.ndarray) -> None:
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(temporary, sizes)
        temporary.replace(path)
    except OSError:
        pass  # a home that cannot be written only means looking again next time
