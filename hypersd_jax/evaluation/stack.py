"""``hypersd stack``: style LoRAs on a few-step LoRA, over step counts and scales, in numbers and images."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hypersd_jax.conditioning import warn_of_cuts
from hypersd_jax.config import EMBEDDED_GUIDANCE
from hypersd_jax.errors import UserError
from hypersd_jax.evaluation import sources
from hypersd_jax.evaluation.evaluator import Row, estimate_values, known_scorer
from hypersd_jax.evaluation.files import write_image, write_rows
from hypersd_jax.evaluation.generator import MANY_STEPS, make_model, sample
from hypersd_jax.evaluation.grid import image_grid
from hypersd_jax.evaluation.provenance import made_line, typed_command
from hypersd_jax.evaluation.samples import Samples, with_features
from hypersd_jax.evaluation.stacking import best, retention
from hypersd_jax.evaluation.tables import steps_text
from hypersd_jax.paths import parse_lora
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.png_text import name_of
from hypersd_jax.sampling_command import shipped_lora
from hypersd_jax.weights.components import EMBEDDED
from hypersd_jax.weights.tensors import replacing

FAST = "few-step LoRA"
SHOWN = 8


def run_stack(options: argparse.Namespace) -> list[Row]:
    """Do what the options of ``hypersd stack`` say; returns the rows of results.json.

    Raises:
        UserError: one line naming the option or file at fault.
    """
    embedded = options.prompts_file is None
    items = sources.embedded_items(options.n, None) if embedded else sources.file_items(options.prompts_file, options.n)
    prompts = [item.prompt for item in items]
    if len(set(prompts)) < 4:
        raise UserError("--prompts-file: four different prompts or more are needed, to measure a style's direction")
    pipe = Pipeline.from_pretrained(options.model, dtype=options.dtype)
    warn_of_cuts(pipe.base.prompts.cuts(prompts))
    scorer = known_scorer(items)
    styles = [parse_lora(text) for text in options.style]
    guidance = options.guidance
    if guidance is None and options.model == EMBEDDED:
        guidance = EMBEDDED_GUIDANCE
    count = len(options.fast_scales) * len(options.steps) * (1 + len(options.scales)) + 2
    with tqdm(total=count, unit="set", desc="sampling") as bar:

        def sampled(**how: Any) -> Samples:
            found = with_features(items, sample(make_model("", pipe, **how), items, batch_size=options.batch_size))
            bar.update()
            return found

        many = {"steps": MANY_STEPS, "sampler": "ddim", "guidance": guidance}
        base = sampled(**many)
        _load_styles(pipe, styles, 1.0)
        styled = sampled(**many)
        rows, images = [], {f"base, {MANY_STEPS} steps": base.images, "with the style": styled.images}
        for steps in options.steps:
            found, shown = _at(pipe, options, styles, steps, sampled, base, styled, scorer)
            rows += found
            images |= shown
    summary = page(options, rows, len(items))
    write_rows(options.output / "results.json", rows)
    with replacing(options.output / "README.md") as temporary:
        temporary.write_text(summary, encoding="utf-8")
    columns = {title: found[:SHOWN] for title, found in images.items()}
    write_image(options.output / "grid.png", image_grid(columns, prompts[:SHOWN]))
    return rows


def _at(
    pipe: Pipeline,
    options: argparse.Namespace,
    styles: list[tuple[Path, float]],
    steps: int,
    sampled: Callable[..., Samples],
    base: Samples,
    styled: Samples,
    scorer: Any,
) -> tuple[list[Row], dict[str, np.ndarray]]:
    """The rows of one step count, and the images of the few-step LoRA alone and of the best scales."""
    rows: list[Row] = []
    images: list[np.ndarray] = []
    alone: dict[float, np.ndarray] = {}
    for fast_scale in options.fast_scales:
        pipe.unload_lora()
        _load_fast(pipe, options.fast, steps, fast_scale)
        fast = sampled(steps=steps)
        alone[fast_scale] = fast.images
        for scale in options.scales:
            _load_styles(pipe, styles, scale)
            both = sampled(steps=steps)
            kept = retention(base, styled, fast, both, scorer)
            row: Row = {"steps": steps, "fast_scale": fast_scale, "style_scale": scale, "least": kept.least}
            for name, value in (("style", kept.style), ("match", kept.match), ("nearness", kept.nearness)):
                row |= {} if value is None else estimate_values(name, value)
            rows.append(row)
            images.append(both.images)
    chosen = best(rows)
    for row in rows:
        row["best"] = row is chosen
    at = steps_text(steps)
    title = f"{at}, best: {chosen['fast_scale']:g} + {chosen['style_scale']:g}"
    return rows, {f"{at}, few-step LoRA": alone[chosen["fast_scale"]], title: images[rows.index(chosen)]}


def _load_fast(pipe: Pipeline, fast: str, steps: int, scale: float) -> None:
    file, own = (shipped_lora(steps), 1.0) if fast == EMBEDDED else parse_lora(fast)
    pipe.load_lora(file, own * scale, name=FAST)


def _load_styles(pipe: Pipeline, styles: list[tuple[Path, float]], scale: float) -> None:
    """Load the styles at a scale, in place of those of another; by number, for a file may be given twice."""
    for number, (file, own) in enumerate(styles):
        pipe.load_lora(file, own * scale, name=f"style {number}")


def page(options: argparse.Namespace, rows: list[Row], n: int) -> str:
    """Compose README.md: the table of retentions, the best of each step count in bold."""
    fast = "the embedded model's LoRA of each step count" if options.fast == EMBEDDED else name_of(options.fast)
    styles = " + ".join(name_of(parse_lora(text)[0]) for text in options.style)
    matched = "match" in rows[0]
    head = ["steps", "scale of the few-step LoRA", "of the style", "style kept"]
    head += ["text match kept"] if matched else []
    head += ["nearness kept"]
    lines = [
        f"# {styles} on {fast}",
        "",
        f"`{typed_command(options.arguments)}`. {made_line()} Model {name_of(options.model)}; {n} prompts, an image "
        "each, from the same noise throughout.",
        "",
        f"| {' | '.join(head)} |",
        "|" + "---|" * len(head),
    ]
    keys = ["style", *(["match"] if matched else []), "nearness"]
    for row in rows:
        cells = [str(row["steps"]), f"{row['fast_scale']:g}", f"{row['style_scale']:g}"]
        cells += [f"{row[key]:.0%} ± {row[key + '_se']:.0%}" for key in keys]
        lines.append("| " + " | ".join(f"**{cell}**" if row["best"] else cell for cell in cells) + " |")
    lines += [
        "",
        f"Against the base at {MANY_STEPS} guided steps, without and with the style at scale 1, and the few-step LoRA "
        "alone; ± is one standard error. Bold: the scales whose smaller share is largest. What is measured: "
        "docs/training.md.",
        "",
    ]
    return "\n".join([*lines, "![grid](grid.png)", ""])


def best_lines(rows: list[Row]) -> list[str]:
    """Say in a line for each step count which scales are best, and what they keep."""
    lines = []
    for steps, group in itertools.groupby(rows, key=lambda row: row["steps"]):
        row = next(each for each in group if each["best"])
        quality = "match" if "match" in row else "nearness"
        lines.append(
            f"{steps_text(steps)}: few-step LoRA at {row['fast_scale']:g}, style at {row['style_scale']:g}: "
            f"{row['style']:.0%} of the style, {row[quality]:.0%} of the {quality}"
        )
    return lines
