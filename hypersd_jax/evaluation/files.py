"""Rows and images as files, each written at once or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hypersd_jax.evaluation.grid import strip
from hypersd_jax.evaluation.report import Report, write_report
from hypersd_jax.evaluation.tables import plain_table
from hypersd_jax.weights.tensors import replacing

# What stands for a sign where a terminal cannot show it.
PLAIN = {" ± ": " +- ", "\N{EN DASH}": "-", "\N{HORIZONTAL ELLIPSIS}": "."}


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of a table as JSON, which has no NaN: a standard error that is not known is null."""
    clean = [{key: _finite(value) for key, value in row.items()} for row in rows]
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(clean, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_results(folder: Path, report: Report) -> None:
    """Write results.json, grid.png (of several grids the first), and report.html, which shows all."""
    write_rows(folder / "results.json", report.rows)
    for grid in [*report.grids.values()][:1]:
        write_image(folder / "grid.png", grid)
    write_report(report, folder / "report.html")


def write_image(path: Path, image: Image.Image, info: PngInfo | None = None) -> None:
    """An image as PNG."""
    with replacing(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def write_strips(path: Path, rows: Sequence[np.ndarray], prompts: Sequence[str] = ()) -> None:
    """Rows of N images (N, H, W, 3) in 0..1, side by side under their N prompts, as one PNG.

    What is not finite is black; who makes the images says so.
    """
    write_image(path, *strip([np.nan_to_num(row, nan=0.0, posinf=0.0, neginf=0.0) for row in rows], prompts))


def printed_table(file: Path, keys: Sequence[str] | None, encoding: str | None) -> str:
    """The rows of a results.json as a table for a terminal of this encoding; ``keys`` as in `plain_table`."""
    text = plain_table(json.loads(file.read_text(encoding="utf-8")), keys=keys)
    known = encoding or "ascii"
    for sign, plain in PLAIN.items():
        try:
            sign.encode(known)
        except UnicodeEncodeError:
            text = text.replace(sign, plain)
    return text.encode(known, errors="replace").decode(known)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
