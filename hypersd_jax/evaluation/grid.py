"""A labelled table of pictures: one row a prompt, one column a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hypersd_jax.evaluation.metrics import unit_range

PAPER, INK, FAINT = (255, 255, 255), (32, 34, 40), (120, 124, 134)
GAP, TEXT_WIDTH, TEXT_SIZE = 8, 170, 14
LEAST_CELL = 128


def picture_grid(columns: Mapping[str, np.ndarray], prompts: Sequence[str]) -> Image.Image:
    """Draw ``{column title: images (N, H, W, 3), uint8 or 0..1}`` beside their N prompts.

    Pictures smaller than 128 px are drawn at a whole multiple of their size.

    Raises:
        ValueError: when there is no column, or one has not one picture per prompt or another size than the first.
    """
    if not columns or not prompts:
        raise ValueError("a grid needs a column and a prompt")
    shape = np.shape(next(iter(columns.values())))
    for title, images in columns.items():
        if len(images) != len(prompts) or np.shape(images) != shape:
            raise ValueError(f"column {title!r}: {np.shape(images)} does not hold {len(prompts)} pictures of one size")
    height, width = shape[1:3]
    scale = max(1, -(-LEAST_CELL // max(height, width)))
    height, width = height * scale, width * scale
    font = ImageFont.load_default(size=TEXT_SIZE)
    titles = {title: _wrapped(title, font, width) for title in columns}
    line = _line_height(font)
    header = max(len(lines) for lines in titles.values()) * line + GAP

    size = (TEXT_WIDTH + len(columns) * (width + GAP) + 2 * GAP, header + len(prompts) * (height + GAP) + GAP)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, prompt in enumerate(prompts):
        lines = _wrapped(prompt, font, TEXT_WIDTH - GAP)[: max(1, height // line)]
        top = GAP + header + row * (height + GAP) + max(0, (height - len(lines) * line) // 2)
        draw.multiline_text((GAP, top), "\n".join(lines), INK, font, spacing=line - TEXT_SIZE)
    for column, (title, images) in enumerate(columns.items()):
        left = TEXT_WIDTH + GAP + column * (width + GAP)
        bottom = header - len(titles[title]) * line
        draw.multiline_text((left, bottom), "\n".join(titles[title]), FAINT, font, spacing=line - TEXT_SIZE)
        for row, image in enumerate(images):
            sheet.paste(_picture(image, (width, height)), (left, GAP + header + row * (height + GAP)))
    return sheet


def _picture(image: np.ndarray, size: tuple[int, int]) -> Image.Image:
    pixels = np.round(np.clip(unit_range(image), 0.0, 1.0) * 255.0).astype(np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def _line_height(font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    _, top, _, bottom = font.getbbox("Agjp")
    return round(1.35 * (bottom - top))


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Break at spaces where a line would be wider than ``width`` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
