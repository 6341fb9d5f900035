"""Pack the rendered emoji images into the WebP sheets that ship in hypersd_jax/assets/emoji.

    python scripts/build_emoji_sheets.py IMAGES.npz [OUTPUT_FOLDER]

IMAGES.npz holds `images` uint8 (N, 64, 64, 4), straight alpha, and one string each in `label`, `style`, `group`,
`subgroup`, `tags`, `license` and `hexcode`. THIRD_PARTY_NOTICES.md says which packages they were rendered from.

Colours are rounded to even values (an error of at most 1 in 255) and the sheets are lossless from there on: a lossy
sheet of the same size blurs the saturated edges. The style "firefox" is left out, its licence is not settled.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
from pathlib import Path

import numpy as np
from PIL import Image

SIZE, COLUMNS, ROWS = 64, 32, 32
FIELDS = ("label", "style", "group", "subgroup", "tags", "license", "hexcode")
LEFT_OUT = "firefox"
STYLE_WORDS = {"google noto": "noto"}


def main() -> None:
    """Read the archive, write sheet-NN.webp and index.json.gz."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("output", type=Path, nargs="?", default=Path("hypersd_jax/assets/emoji"))
    arguments = parser.parse_args()
    with np.load(arguments.images) as archive:
        images = archive["images"]
        table = {field: archive[field].astype(str) for field in FIELDS}
    kept = np.flatnonzero(table["style"] != LEFT_OUT)
    # Images of one style side by side compress best.
    kept = kept[np.lexsort((table["hexcode"][kept], table["style"][kept]))]
    images = reduced(images[kept])
    records = [{field: str(table[field][i]) for field in FIELDS} for i in kept]
    concepts = same_picture_concepts(images, [record["hexcode"] for record in records])
    for record in records:
        record["style"] = STYLE_WORDS.get(record["style"], record["style"])
        record["concept"] = concepts[record["hexcode"]]
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_sheets(images, arguments.output)
    write_index(records, arguments.output / "index.json.gz")


def reduced(images: np.ndarray) -> np.ndarray:
    """Even colour values, and none where the image is fully transparent; alpha as it is."""
    colours = np.minimum((images[..., :3].astype(np.int32) + 1) // 2 * 2, 255)
    colours = np.where(images[..., 3:] > 0, colours, 0)
    return np.concatenate([colours.astype(np.uint8), images[..., 3:]], axis=-1)


def same_picture_concepts(images: np.ndarray, hexcodes: list[str]) -> dict[str, str]:
    """Hexcode -> concept. Code points that share an image are one concept, so that a split cannot part them."""
    concept = {hexcode: hexcode for hexcode in hexcodes}
    first: dict[str, str] = {}
    for image, hexcode in zip(images, hexcodes, strict=True):
        other = first.setdefault(hashlib.sha256(image.tobytes()).hexdigest(), hexcode)
        old, new = concept[hexcode], concept[other]
        if old != new:
            concept = {key: min(old, new) if value in (old, new) else value for key, value in concept.items()}
    return concept


def write_sheets(images: np.ndarray, folder: Path) -> None:
    """Sheets of 32 x 32 images in reading order; the last is as tall as it needs to be."""
    for number, start in enumerate(range(0, len(images), COLUMNS * ROWS)):
        part = images[start : start + COLUMNS * ROWS]
        rows = -(-len(part) // COLUMNS)
        cells = np.zeros((rows * COLUMNS, SIZE, SIZE, 4), np.uint8)
        cells[: len(part)] = part
        sheet = cells.reshape(rows, COLUMNS, SIZE, SIZE, 4).swapaxes(1, 2).reshape(rows * SIZE, COLUMNS * SIZE, 4)
        Image.fromarray(sheet).save(
            folder / f"sheet-{number:02d}.webp", lossless=True, exact=True, quality=100, method=6
        )


def write_index(records: list[dict[str, str]], path: Path) -> None:
    """Records in image order, by column, without a time stamp."""
    columns = {field: [record[field] for record in records] for field in (*FIELDS, "concept")}
    text = json.dumps({"size": SIZE, "columns": COLUMNS, "records": columns}, ensure_ascii=False, separators=(",", ":"))
    path.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))


if __name__ == "__main__":
    main()
