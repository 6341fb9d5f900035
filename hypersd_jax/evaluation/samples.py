"""Images of a list with what the networks of the metrics see in them; in chunks on disk, where they are to be kept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from hypersd_jax.errors import UserError
from hypersd_jax.evaluation.generator import Item, Model, timed_sample, warm_up
from hypersd_jax.evaluation.lite0 import features
from hypersd_jax.evaluation.scorer import seen_with
from hypersd_jax.weights.tensors import replacing

# What a stopped run loses at most; whatever --batch-size is, since images do not depend on it.
CHUNK = 64
FORMAT = 1
RUN_FILE = "run.json"
# Images that the networks of the metrics see at a time.
SEEN_AT_A_TIME = 32
ARRAYS = ("images", "features", "seen")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
    """Images of a list.

    Attributes:
        items: prompts and seeds.
        images: uint8 (N, H, W, 3).
        features: (N, 1280).
        seen: what the reporting scorer sees in them, (N, E).
        further: features (M, 1280) of the first M prompts from each further seed.
        seconds: that an image took, where it is known.
        chunks: the files that hold all this, where it is kept.
    """

    items: tuple[Item, ...]
    images: np.ndarray
    features: np.ndarray
    seen: np.ndarray
    further: tuple[np.ndarray, ...] = ()
    seconds: float | None = None
    chunks: tuple[Path, ...] = ()


def image_features(images: np.ndarray) -> np.ndarray:
    """Features (N, 1280) of uint8 images (N, H, W, 3)."""
    return features(images, batch_size=SEEN_AT_A_TIME)


def with_features(items: Sequence[Item], images: np.ndarray) -> Samples:
    """Images that were not generated here, or not kept, with their features."""
    seen = _networks(images)
    return Samples(items=tuple(items), images=images, features=seen["features"], seen=seen["seen"])


def generate(
    model: Model,
    items: Sequence[Item],
    further: Sequence[Sequence[Item]] = (),
    *,
    batch_size: int,
    cache: Path | None = None,
    progress: bool = False,
) -> Samples:
    """Generate a list and its beginning from further seeds, with features.

    Args:
        model: as it samples now.
        items: the list.
        further: the same first prompts from each further seed, see `further_items`.
        batch_size: images at a time.
        cache: chunks that this folder holds are read, the others generated and kept there; None: nothing is kept.
        progress: show a bar.

    Raises:
        UserError: images are not finite; a kept chunk is damaged; the cache cannot be written.
    """
    found = _generate(model, items, batch_size, cache, model.name if progress else None)
    if not further:
        return found
    every = [item for each in further for item in each]
    title = f"{model.name}, further seeds" if progress else None
    again = _generate(model, every, batch_size, cache, title, warm=True)
    return dataclasses.replace(found, further=tuple(np.split(again.features, len(further))))


def _generate(
    model: Model, items: Sequence[Item], batch_size: int, cache: Path | None, title: str | None, *, warm: bool = False
) -> Samples:
    chunks, paths = [], []
    size = len(items) if cache is None else CHUNK
    silent = title is None or jax.process_index() != 0
    with tqdm(total=len(items), unit="image", desc=title, disable=silent) as bar:
        for start in range(0, len(items), size):
            part = items[start : start + size]
            path = None if cache is None else cache / f"{_chunk_name(model, part)}.npz"
            if path is None or not path.exists():
                if not warm:
                    warm_up(model, part, batch_size)
                    warm = True
                images, seconds = timed_sample(model, part, batch_size=batch_size)
                chunk = {"images": images, **_networks(images), "seconds": np.asarray(seconds, np.float64)}
                if path is not None:
                    _save_chunk(path, chunk)
            else:
                chunk = _load_chunk(path)
            chunks.append(chunk)
            paths += [] if path is None else [path]
            bar.update(len(part))
    return _joined(items, chunks, paths)


def _networks(images: np.ndarray) -> dict[str, np.ndarray]:
    found = image_features(images)
    return {"features": found, "seen": seen_with(found, images, batch_size=SEEN_AT_A_TIME)}


def _joined(items: Sequence[Item], chunks: Sequence[Mapping[str, np.ndarray]], paths: Sequence[Path]) -> Samples:
    """Several chunks as one; the seconds are their median."""
    images, seen_features, seen = (np.concatenate([chunk[name] for chunk in chunks]) for name in ARRAYS)
    seconds = float(np.median([chunk["seconds"] for chunk in chunks]))
    return Samples(
        items=tuple(items), images=images, features=seen_features, seen=seen, seconds=seconds, chunks=tuple(paths)
    )


def _load_chunk(path: Path) -> dict[str, np.ndarray]:
    """One kept chunk; UserError where the file is damaged."""
    try:
        # A file that is no archive would be left open by `np.load`, which opens it by name.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            chunk = {name: file[name] for name in (*ARRAYS, "seconds")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: kept images are damaged ({error}); delete the file") from None
    if chunk["images"].ndim != 4 or len({len(chunk[name]) for name in ARRAYS}) != 1:
        raise UserError(f"{path}: kept images are damaged (their numbers differ); delete the file")
    return chunk


def _save_chunk(path: Path, chunk: Mapping[str, np.ndarray]) -> None:
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **chunk)


def _chunk_name(model: Model, items: Sequence[Item]) -> str:
    settings = dataclasses.asdict(model.settings)
    listed = [list(item) for item in items]
    text = json.dumps([FORMAT, model.identity, settings, model.preset, model.pipe.native_size, listed])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def save_run(folder: Path, samples: Samples) -> None:
    """Write which images a run generated and where they are kept, for a later evaluation to compare with."""
    inside = folder.resolve()
    paths = [path.resolve() for path in samples.chunks]
    listed = [str(path.relative_to(inside)) if path.is_relative_to(inside) else str(path) for path in paths]
    content = {"items": [list(item) for item in samples.items], "chunks": listed}
    with replacing(folder / RUN_FILE) as temporary:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")


def load_run(folder: Path, size: tuple[int, int]) -> Samples:
    """The list and images of an earlier evaluation, whose images must be of this ``size`` (H, W).

    Raises:
        UserError: naming the file that is missing or damaged, or the folder with another size.
    """
    path = folder / RUN_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        items = tuple(Item(str(prompt), int(seed)) for prompt, seed in content["items"])
        paths = [folder / str(name) for name in content["chunks"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as an earlier evaluation ({error})") from None
    found = _joined(items, [_load_chunk(chunk) for chunk in paths], paths) if paths else None
    if found is None or len(found.images) != len(items):
        raise UserError(f"{path}: its images are not those of its list; run that evaluation again")
    height, width = found.images.shape[1:3]
    if (height, width) != size:
        raise UserError(f"--reference {folder}: its images are {width} x {height} pixels, these {size[1]} x {size[0]}")
    return found
