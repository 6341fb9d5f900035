"""Sample the README's strip: the embedded teacher, and the unified LoRA that ships, from the same latents.

python scripts/build_strip.py docs/images/strip.png
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import hypersd_jax as hs
from hypersd_jax.config import EMBEDDED_GUIDANCE
from hypersd_jax.pipeline import to_pil
from hypersd_jax.weights.components import assets

TEACHER_STEPS, STUDENT_STEPS = 25, (1, 2, 4, 8)
PROMPTS = (
    "lion, noto style, blue background",
    "red apple, fluent flat style",
    "panda, fluent flat style, green background",
    "frog, fluent gradient style",
    "strawberry, fluent flat style, pink background",
    "smiling face with sunglasses, noto style",
    "watermelon, noto style, yellow background",
    "avocado, fluent flat style",
    "star-struck, fluent flat style, purple background",
    "cat face, blob style",
)
PAPER, INK, FAINT = (255, 255, 255), (32, 34, 40), (110, 114, 124)
GAP, LABEL_WIDTH, LARGE, SMALL = 4, 84, 14, 11


def sampled(seed: int) -> dict[str, np.ndarray]:
    """Images (N, H, W, 3) in 0..1 of the N prompts, by their row's label."""
    pipe = hs.Pipeline.from_pretrained("embedded")
    teacher = {"steps": TEACHER_STEPS, "sampler": "ddim", "guidance": EMBEDDED_GUIDANCE}
    rows = {f"teacher\n{TEACHER_STEPS} steps": pipe(list(PROMPTS), seed=seed, output="np", **teacher)}
    pipe.load_lora(assets() / "loras" / "unified.safetensors")
    for steps in STUDENT_STEPS:
        rows[f"LoRA\n{steps} step{'s' if steps > 1 else ''}"] = pipe(list(PROMPTS), seed=seed, output="np", steps=steps)
    return rows


def drawn_strip(rows: Mapping[str, np.ndarray]) -> Image.Image:
    """Rows of images, pixel for pixel, behind their two-line labels."""
    count, height, width = next(iter(rows.values())).shape[:3]
    sheet = Image.new("RGB", (LABEL_WIDTH + count * (width + GAP) - GAP, len(rows) * (height + GAP) - GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, (label, images) in enumerate(rows.items()):
        top = row * (height + GAP)
        name, steps = label.split("\n")
        draw.text((2 * GAP, top + height // 2 - SMALL), steps, INK, ImageFont.load_default(LARGE), anchor="lm")
        draw.text((2 * GAP, top + height // 2 + SMALL), name, FAINT, ImageFont.load_default(SMALL), anchor="lm")
        for column, image in enumerate(to_pil(images)):
            sheet.paste(image, (LABEL_WIDTH + column * (width + GAP), top))
    return sheet


def main() -> None:
    """Write the strip to the file that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    drawn_strip(sampled(options.seed)).save(options.output, optimize=True)


if __name__ == "__main__":
    main()
