"""The sizes of all images of a dataset, looked up once and kept in the user's cache folder."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hypersd_jax import paths
from hypersd_jax.data.examples import Examples
from hypersd_jax.files import image_size, read_image

WORKERS = min(8, os.cpu_count() or 1)


def image_sizes_of(examples: Examples, *, decode: bool = False) -> np.ndarray:
    """Find (height, width) of every image, int64 (N, 2), and zeros for those that cannot be read.

    What was found is kept, with the size and time of each file: those that have changed, and those that could not be
    read, are looked up anew. Only headers are read, unless ``decode``: then an image counts as readable only if all of
    it is.
    """
    kept = cache_folder() / f"{examples.version[:32]}-{'decoded' if decode else 'headers'}.npy"
    sizes = _kept(kept, examples.stamps)
    missing = np.flatnonzero(sizes[:, 0] == 0)

    def look(row: int) -> tuple[int, int]:
        try:
            with examples.open_image(row) as file:
                if not decode:
                    return image_size(file)
                image = read_image(file)
                return image.height, image.width
        except Exception:  # Pillow and the file systems raise many kinds
            return 0, 0

    title = "checking images" if decode else "reading image sizes"
    with ThreadPoolExecutor(WORKERS) as pool, tqdm(total=len(missing), desc=title, unit="image", delay=1.0) as bar:
        for row, size in zip(missing, pool.map(look, missing.tolist()), strict=True):
            sizes[row] = size
            bar.update()
    if sizes[missing].any():
        _keep(kept, np.concatenate([sizes, examples.stamps[:, None]], axis=1))
    return sizes


def cache_folder() -> Path:
    """Return the folder where sizes are kept; one that cannot exist if the user has none that can be written."""
    return paths.cache_folder("image-sizes") or Path(os.devnull)


def _kept(path: Path, stamps: np.ndarray) -> np.ndarray:
    """The sizes that were kept of files that have not changed; zeros for all others."""
    try:
        found: np.ndarray = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        found = np.empty(0)
    if found.shape != (len(stamps), 3) or found.dtype != np.int64:
        return np.zeros((len(stamps), 2), np.int64)
    return np.where(found[:, 2:] == stamps[:, None], found[:, :2], 0)


def _keep(path: Path, sizes: np.ndarray) -> None:
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(temporary, sizes)
        temporary.replace(path)
    except OSError:
        pass  # a home that cannot be written only means another look next time
