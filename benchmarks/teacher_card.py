"""Measure a model for the embedded images on every background: ``python benchmarks/teacher_card.py MODEL NAME``.

Writes benchmarks/results/teachers/NAME: README.md (the autoencoder's fidelity to held-out concepts on each background),
grid.png (an image a concept and background, 25 steps), reconstructions.png, and curve-STAGE.svg for each stage of the
run that trained the model, where ``--run`` names it. Text match, FID and KID next to their floors:
``hypersd evaluate --model MODEL``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from PIL import Image

from hypersd_jax.compilation import use_compilation_cache
from hypersd_jax.data import COLOURS, caption, load_emoji
from hypersd_jax.data.emoji_source import on_background
from hypersd_jax.distill import psnr
from hypersd_jax.evaluation import image_grid, read_metrics
from hypersd_jax.evaluation.curves import stage_curves
from hypersd_jax.evaluation.svg import as_file
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.stages.autoencoder import reconstructed

RESULTS = ROOT / "benchmarks" / "results" / "teachers"
CONCEPTS = ("red apple", "lion", "hamburger", "cat face", "octopus", "grinning face", "guitar", "airplane", "rose")
GUIDANCE, STEPS = 4.0, 25


def main() -> None:
    """Measure, sample and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("name")
    parser.add_argument("--run", type=Path, help="the output folder of the run that trained it")
    arguments = parser.parse_args()
    use_compilation_cache()
    pipe = Pipeline.from_pretrained(arguments.model)
    folder = RESULTS / arguments.name
    folder.mkdir(parents=True, exist_ok=True)
    rows = [fidelity(pipe, background, folder) for background in COLOURS]
    sample_grid(pipe).save(folder / "grid.png")
    curves = {} if arguments.run is None else stage_curves(read_metrics(arguments.run / "metrics.jsonl"), "loss")
    for stage, figure in curves.items():
        (folder / f"curve-{stage}.svg").write_text(as_file(figure), encoding="utf-8")
    (folder / "card.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(text(arguments.name, pipe, rows, list(curves)), encoding="utf-8")
    print(folder)


def fidelity(pipe: Pipeline, background: str, folder: Path) -> dict[str, Any]:
    """PSNR of held-out images on one background, and how far the background's own colour is off, in 1/255."""
    emoji = load_emoji()
    chosen = emoji.indices("test")[::2]
    embedded = np.stack([on_background(emoji.images[i], background, pipe.native_size[0]) for i in chosen])
    pairs = [reconstructed(pipe.base, embedded[start : start + 32]) for start in range(0, len(embedded) // 32 * 32, 32)]
    before, after = (np.concatenate(side) for side in zip(*pairs, strict=True))
    corners = np.abs(after[:, :2, :2] - before[:, :2, :2]).mean() * 255.0
    if background in ("white", "blue", "black"):
        strip = [np.concatenate(list(np.round(side[:16] * 255.0).astype(np.uint8)), axis=1) for side in (before, after)]
        Image.fromarray(np.concatenate(strip)).save(folder / f"reconstructions-{background}.png")
    quality = np.asarray(psnr(after * 2.0 - 1.0, before * 2.0 - 1.0))
    error = quality.std(ddof=1) / np.sqrt(len(quality))
    return {
        "background": background,
        "n": len(quality),
        "psnr": float(quality.mean()),
        "psnr_se": float(error),
        "corner": float(corners),
    }


def sample_grid(pipe: Pipeline) -> Image.Image:
    """A row a concept, in one of the styles each, and a column a background, all from the same latents."""
    records = {}
    for record in load_emoji().records:
        records.setdefault(record.label, []).append(record)
    shown = [records[label][i % len(records[label])] for i, label in enumerate(CONCEPTS) if label in records]
    prompts = [caption(record, background) for background in COLOURS for record in shown]
    images = pipe(
        prompts, steps=STEPS, sampler="ddim", guidance=GUIDANCE, seed=0, output="np", batch_size=16, stepwise=True
    )
    sampled = np.round(images * 255.0).astype(np.uint8).reshape(len(COLOURS), len(shown), *images.shape[1:])
    columns = {background: sampled[i] for i, background in enumerate(COLOURS)}
    return image_grid(columns, [f"{record.label}, {record.style}" for record in shown])


def text(name: str, pipe: Pipeline, rows: list[dict[str, Any]], stages: Sequence[str]) -> str:
    """The card."""
    sizes = {part: sum(value.size for value in params.values()) for part, params in pipe.base.params.items()}
    parts = ", ".join(f"{part} {count / 1e6:.1f} M" for part, count in sizes.items())
    side = pipe.native_size[0] // pipe.base.downscale
    table = "\n".join(
        f"| {row['background']} | {row['psnr']:.2f} ± {row['psnr_se']:.2f} | {row['corner']:.1f} |" for row in rows
    )
    figures = "".join(f"\n![training loss of {stage}](curve-{stage}.svg)\n" for stage in stages)
    return f"""# {name}

{parts}; latents {side} x {side} x {pipe.base.latent_channels}; the UNet predicts {pipe.schedule.prediction_type}.
jax {jax.__version__}.

The autoencoder on held-out concepts, by its posterior's mean ({rows[0]["n"]} images a background): PSNR in dB, and by
how much the background's colour in the corner is off, in 1/255.

| background | PSNR | corner |
|---|---|---|
{table}

Samples, {STEPS} steps of ddim, guidance {GUIDANCE:g}, the same latents everywhere:

![grid](grid.png)
{figures}"""


if __name__ == "__main__":
    main()
