"""Images with their prompts beside or above them: a table of models, and strips of samples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from hypersd_jax.evaluation.lettering import drawable, fitted_lines, font_for, line_height
from hypersd_jax.evaluation.metrics import unit_range

PAPER, INK, FAINT = (255, 255, 255), (32, 34, 40), (120, 124, 134)
GAP, TEXT_WIDTH, TEXT_SIZE = 8, 170, 14
LEAST_CELL, MOST_CELL = 128, 256
GRID_ROWS = 12
"""Of the grids that are written: the beginning of a list."""

# Lines of a prompt above an image of a strip, and the key of a strip's layout in its file.
STRIP_LINES, STRIP = 4, "strip"


class Sample(NamedTuple):
    """An image with its prompt."""

    prompt: str
    image: Image.Image


def image_grid(columns: Mapping[str, np.ndarray], prompts: Sequence[str]) -> Image.Image:
    """Draw ``{column title: images (N, H, W, 3), uint8 or 0..1}`` beside their N prompts.

    Images smaller than 128 px are shown at a whole multiple of their size, larger ones than 256 px at 256 px. A prompt
    that is too long for its row is cut off.

    Raises:
        ValueError: when there is no column, or one has not one image per prompt or another size than the first.
    """
    if not columns or not prompts:
        raise ValueError("a grid needs a column and a prompt")
    shape = np.shape(next(iter(columns.values())))
    for title, images in columns.items():
        if len(images) != len(prompts) or np.shape(images) != shape:
            raise ValueError(f"column {title!r}: {np.shape(images)} does not hold {len(prompts)} images of one size")
    width, height = _cell(shape[2], shape[1])
    titles = {title: _lines(title, TEXT_SIZE, width, len(title)) for title in columns}
    line = line_height(font_for("", TEXT_SIZE))
    header = max(len(lines) for lines in titles.values()) * line + GAP

    size = (TEXT_WIDTH + len(columns) * (width + GAP) + 2 * GAP, header + len(prompts) * (height + GAP) + GAP)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, prompt in enumerate(prompts):
        lines = _lines(prompt, TEXT_SIZE, TEXT_WIDTH - GAP, max(1, height // line))
        top = GAP + header + row * (height + GAP) + max(0, (height - len(lines) * line) // 2)
        _write(draw, (GAP, top), lines, prompt, TEXT_SIZE, INK)
    for column, (title, images) in enumerate(columns.items()):
        left = TEXT_WIDTH + GAP + column * (width + GAP)
        _write(draw, (left, header - len(titles[title]) * line), titles[title], title, TEXT_SIZE, FAINT)
        for row, image in enumerate(images):
            shown = Image.fromarray(_pixels(image)).resize((width, height), Image.Resampling.BICUBIC)
            sheet.paste(shown, (left, GAP + header + row * (height + GAP)))
    return sheet


def strip(rows: Sequence[np.ndarray], prompts: Sequence[str]) -> tuple[Image.Image, PngInfo]:
    """Draw rows of N images (N, H, W, 3) in 0..1, each column under its prompt, where there are prompts.

    Images smaller than 128 px are shown at a whole multiple of their size, pixel for pixel.

    Returns:
        (the sheet, what its PNG says of itself, so that `read_strip` finds the images again).
    """
    count, height, width = len(rows[0]), *np.shape(rows[0])[1:3]
    scale = max(1, -(-LEAST_CELL // max(height, width)))
    size = max(TEXT_SIZE, width * scale // 32)
    lines = [_lines(prompt, size, width * scale - GAP, STRIP_LINES) for prompt in prompts]
    top = max(map(len, lines)) * line_height(font_for("", size)) + GAP if lines else 0
    sheet = Image.new("RGB", (count * width * scale, top + len(rows) * height * scale), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, (prompt, broken) in enumerate(zip(prompts, lines, strict=True)):
        _write(draw, (column * width * scale + GAP // 2, GAP // 2), broken, prompt, size, INK)
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            pixels = _pixels(image).repeat(scale, axis=0).repeat(scale, axis=1)
            sheet.paste(Image.fromarray(pixels), (column * width * scale, top + row * height * scale))
    info = PngInfo()
    layout = {"top": top, "size": [width, height], "scale": scale, "rows": len(rows), "prompts": list(prompts)}
    info.add_text(STRIP, json.dumps(layout))
    return sheet, info


def read_strip(path: Path) -> list[Sample]:
    """The images of a strip, of the first row, with their prompts; the whole sheet where it has no prompts."""
    with Image.open(path) as file:
        sheet = file.convert("RGB")
        layout: dict[str, Any] = json.loads(getattr(file, "text", {}).get(STRIP, "{}"))
    if not layout.get("prompts"):
        return [Sample("", sheet)]
    (width, height), scale, top = layout["size"], layout["scale"], layout["top"]
    found = []
    for column, prompt in enumerate(layout["prompts"]):
        box = (column * width * scale, top, (column + 1) * width * scale, top + height * scale)
        found.append(Sample(prompt, sheet.crop(box).resize((width, height), Image.Resampling.NEAREST)))
    return found


def _cell(width: int, height: int) -> tuple[int, int]:
    """The size that an image is shown at."""
    largest = max(width, height)
    scale = -(-LEAST_CELL // largest) if largest < LEAST_CELL else min(1.0, MOST_CELL / largest)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _pixels(image: np.ndarray) -> np.ndarray:
    return np.round(np.clip(unit_range(image), 0.0, 1.0) * 255.0).astype(np.uint8)


def _lines(text: str, size: int, width: int, most: int) -> list[str]:
    return fitted_lines(drawable(text), font_for(text, size), width, max(1, most))


def _write(
    draw: ImageDraw.ImageDraw, position: tuple[int, int], lines: Sequence[str], text: str, size: int, ink: Any
) -> None:
    font, line = font_for(text, size), line_height(font_for("", size))
    for number, words in enumerate(lines):
        draw.text((position[0], position[1] + number * line), words, ink, font)
