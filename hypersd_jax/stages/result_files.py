"""Rows and pictures as files, each written at once or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hypersd_jax.weights.tensors import replacing


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of a table as JSON, which has no NaN: a standard error that is not known is null."""
    clean = [{key: _finite(value) for key, value in row.items()} for row in rows]
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(clean, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_picture(path: Path, picture: Image.Image) -> None:
    """A picture as PNG."""
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


def write_strips(path: Path, rows: Sequence[np.ndarray]) -> None:
    """Rows of equally many pictures (N, H, W, 3) in 0..1, side by side and under one another, as one PNG.

    What is not finite is black; who makes the pictures says so.
    """
    finite = [np.nan_to_num(row, nan=0.0, posinf=0.0, neginf=0.0) for row in rows]
    strips = [np.concatenate([np.round(picture * 255.0).astype(np.uint8) for picture in row], axis=1) for row in finite]
    write_picture(path, Image.fromarray(np.concatenate(strips)))


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
