"""Small sets of images with captions, in every form that they are read from."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from hypersd_jax.data import Batch

SIZE = (10, 20)  # height, width
BROKEN = b"\x89PNG\r\n\x1a\n and then nothing"


def encoded(number: int, size: tuple[int, int] = SIZE, form: str = "PNG") -> bytes:
    """An image whose colour tells its number."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((*size, 3), (20 * number, 0, 255), np.uint8)).save(buffer, form)
    return buffer.getvalue()


def caption(number: int) -> str:
    return f"picture {number}"


def numbers(batch: Batch) -> list[int]:
    """Which images a batch holds, after a check that each has its own caption."""
    colours = batch.images[:, 0, 0]
    found = [int(red) // 20 for red in colours[:, 0]]
    np.testing.assert_array_equal(colours, [(20 * number, 0, 255) for number in found])
    assert batch.captions == [caption(number) for number in found]
    return found


def with_metadata(folder: Path, count: Iterable[int], kind: str = "jsonl") -> Path:
    """Images, and a metadata.jsonl, .csv or .parquet."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"file_name": f"{number}.png", "text": caption(number)} for number in count]
    for number in count:
        (folder / f"{number}.png").write_bytes(encoded(number))
    path = folder / f"metadata.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        parquet(path, {name: [row[name] for row in rows] for name in ("file_name", "text")})
    return folder


def with_sidecars(folder: Path, count: Iterable[int]) -> Path:
    """Images, and a text file for each."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in count:
        (folder / f"{number}.png").write_bytes(encoded(number))
        (folder / f"{number}.txt").write_text(caption(number) + "\n", encoding="utf-8")
    return folder


def parquet(path: Path, columns: dict[str, list[object]]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def tar(path: Path, samples: Iterable[dict[str, bytes]]) -> Path:
    """A WebDataset shard: for each sample its parts by extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for index, sample in enumerate(samples):
            for extension, data in sample.items():
                info = tarfile.TarInfo(f"{path.stem}{index:04d}.{extension}")
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    return path
