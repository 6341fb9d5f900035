"""A folder of pictures with captions, read through `datasets`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hypersd_jax.data.order import shuffled
from hypersd_jax.data.source import Batch
from hypersd_jax.errors import UserError

CAPTION_COLUMN = "text"
PREVIEWS = 8


class FolderSource:
    """Pictures and a ``metadata.jsonl`` or ``metadata.csv`` with columns ``file_name`` and ``text``.

    Each picture is scaled so that its shorter side is ``resolution`` and cropped in the centre. Position p of the
    stream is place p mod N of the epoch p div N, each epoch in an order of its own.
    """

    def __init__(self, folder: Path, *, resolution: int, seed: int) -> None:
        self._rows = _load(folder)
        self._folder = folder
        self._resolution = resolution
        self._seed = seed

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def preview_prompts(self) -> list[str]:
        """The first captions of the folder."""
        return [str(caption) for caption in self._rows[: min(PREVIEWS, len(self))][CAPTION_COLUMN]]

    def batch(self, positions: np.ndarray) -> Batch:
        """The pairs at these positions of the stream; a picture that cannot be read is an error that names it."""
        images, captions = [], []
        for index in shuffled(positions, len(self), self._seed):
            try:
                row = self._rows[int(index)]
                picture = row["image"].convert("RGB")
            except OSError as error:
                raise UserError(f"{self._folder}: picture {int(index)} cannot be read ({error})") from None
            images.append(_square(picture, self._resolution))
            captions.append(str(row[CAPTION_COLUMN]))
        return Batch(np.stack(images), captions)


def _load(folder: Path) -> Any:
    import datasets  # slow to import; only folders of the user's own need it

    if not folder.is_dir():
        raise UserError(f"data.source: {folder} is neither a folder nor 'emoji'")
    datasets.utils.logging.disable_progress_bar()
    try:
        rows = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    except Exception as error:  # the library raises many kinds on bad folders
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"data.source: {folder} cannot be read as pictures with captions ({reason})") from None
    if CAPTION_COLUMN not in rows.column_names:
        raise UserError(f"data.source: {folder} has no captions: metadata.jsonl needs {CAPTION_COLUMN!r} in each line")
    return rows


def _square(picture: Image.Image, size: int) -> np.ndarray:
    """(size, size, 3) float32 in -1..1."""
    scale = size / min(picture.size)
    width, height = (max(size, round(side * scale)) for side in picture.size)
    resized = picture.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - size) // 2, (height - size) // 2
    cropped = resized.crop((left, top, left + size, top + size))
    return np.asarray(cropped, np.float32) / 127.5 - 1.0
