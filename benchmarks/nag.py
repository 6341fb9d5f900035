"""Do negative prompts work without guidance? ``python benchmarks/nag.py``; two minutes on two CPU cores.

Samples held-out prompts that name a coloured background, with the embedded model and its LoRA at 1 and 4 steps, without
guidance: as they are, and with that background as the negative prompt ("blue background") by normalised attention
guidance at several strengths. The same noise for all. Writes benchmarks/results/nag: results.json; a table of how many
images have the named background, how far their corners are from its colour, and how well they fit the prompt without
its background; and a grid.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tqdm import tqdm

from benchmarks.guidance import GROUPS, SHOWN, named_backgrounds, nearest_background
from hypersd_jax.compilation import use_compilation_cache
from hypersd_jax.data import COLOURS, EvalItem
from hypersd_jax.errors import UserError
from hypersd_jax.evaluation import (
    SPECS,
    Item,
    image_grid,
    load_scorer,
    make_model,
    mean_estimate,
    sample,
    seen_by,
    text_match,
)
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.sampling_command import shipped_lora
from hypersd_jax.weights.components import EMBEDDED

RESULTS = ROOT / "benchmarks" / "results" / "nag"
STEPS = (1, 4)
# (scale, tau, alpha); the first is off, the second what users of other programs begin with.
STRENGTHS = ((0.0, 2.5, 0.25), (5.0, 2.5, 0.25), (5.0, 2.5, 0.5), (11.0, 2.5, 0.5), (5.0, 2.5, 1.0))


def measure(pipe: Pipeline, steps: int, items: list[EvalItem], scorer: Any, bar: tqdm) -> list[dict[str, Any]]:
    """One row a strength, with its images; all but the first also hold the paired change from the first."""
    model = make_model("", pipe, steps=steps, guidance=0.0)
    listed = [Item(item.prompt, item.seed) for item in items]
    negatives = [f"{item.background} background" for item in items]
    subjects = [item.prompt.removesuffix(f", {item.background} background") for item in items]
    rows: list[dict[str, Any]] = []
    first: dict[str, np.ndarray] = {}
    for scale, tau, alpha in STRENGTHS:
        how = {"negatives": negatives, "nag_scale": scale, "nag_tau": tau, "nag_alpha": alpha} if scale else {}
        images = sample(model, listed, batch_size=32, **how)
        match = text_match(scorer, seen_by(SPECS["report"], images), subjects)
        assert match is not None, "the prompts are different ones"
        values = {
            "named": np.asarray(
                [float(near == i.background) for near, i in zip(nearest_background(images), items, strict=True)]
            ),
            "distance": distances(images, items),
            "match": match.gains,
            "clipped": np.mean((images == 0) | (images == 255), axis=(1, 2, 3)),
        }
        first = first or values
        row: dict[str, Any] = {"steps": steps, "nag_scale": scale, "nag_tau": tau, "nag_alpha": alpha}
        for name, each in values.items():
            for key, found in ((name, mean_estimate(each)), (f"{name}_change", mean_estimate(each - first[name]))):
                row |= {key: found.mean, f"{key}_se": found.standard_error}
        rows.append({**row, "images": images})
        bar.update()
    return rows


def distances(images: np.ndarray, items: list[EvalItem]) -> np.ndarray:
    """Root mean square distance (N,) of the corners' mean colour from that of the named background, in 0..255."""
    corners = np.stack([images[:, y, x] for y in (0, -1) for x in (0, -1)]).astype(np.float64).mean(axis=0)
    named = np.asarray([COLOURS[item.background] for item in items], np.float64)
    return np.sqrt(np.square(corners - named).mean(axis=-1))


def page(rows: list[dict[str, Any]], n: int) -> str:
    """The table."""
    lines = [
        "# Negative prompts without guidance",
        "",
        f"`python benchmarks/nag.py --n {n}`: {n} held-out prompts of {len(GROUPS)} groups that name a coloured "
        f"background, an image each; the shipped LoRA of the step count; guidance off; jax {jax.__version__}, "
        f"{jax.devices()[0].device_kind}. The negative prompt is the named background; noise is the same in all rows.",
        "",
        "| steps | nag_scale, tau, alpha | has the named background | corners' distance from its colour | change "
        "| fits the prompt without its background | change | clipped |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        on = row["nag_scale"] > 0

        def shown(key: str, digits: int = 1, row: dict[str, Any] = row) -> str:
            return f"{row[key]:.{digits}f} ± {row[f'{key}_se']:.{digits}f}"

        lines.append(
            f"| {row['steps']} | {'off' if not on else '{nag_scale:g}, {nag_tau:g}, {nag_alpha:g}'.format(**row)} "
            f"| {row['named']:.0%} | {shown('distance')} | {shown('distance_change') if on else ''} "
            f"| {shown('match')} | {shown('match_change') if on else ''} | {row['clipped']:.1%} |"
        )
    lines += [
        "",
        "± is one standard error over the images, of a change that of the paired differences. Colours are in 0..255. "
        "Clipped: the share of channel values that are 0 or 255.",
        "",
    ]
    return "\n".join([*lines, "![grid](grid.png)", ""])


def main(arguments: list[str] | None = None) -> None:
    """Generate, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=64, help="prompts")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.n < SHOWN:
        parser.error(f"--n must be at least {SHOWN}")
    use_compilation_cache()
    items = named_backgrounds(options.n)
    rows = []
    try:
        pipe, scorer = Pipeline.from_pretrained(EMBEDDED), load_scorer("report")
        with tqdm(total=len(STEPS) * len(STRENGTHS), unit="row") as bar:
            for steps in STEPS:
                pipe.load_lora(shipped_lora(steps), name="fast")
                rows += measure(pipe, steps, items, scorer, bar)
    except UserError as error:
        print(f"nag: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    columns = {
        f"{row['steps']} step{'s' if row['steps'] > 1 else ''}, "
        + ("off" if not row["nag_scale"] else "{nag_scale:g}, {nag_tau:g}, {nag_alpha:g}".format(**row)): row["images"]
        for row in rows
    }
    options.output.mkdir(parents=True, exist_ok=True)
    shown = {title: images[:SHOWN] for title, images in columns.items()}
    image_grid(shown, [item.prompt for item in items[:SHOWN]]).save(options.output / "grid.png")
    plain = [{key: value for key, value in row.items() if key != "images"} for row in rows]
    (options.output / "results.json").write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    text = page(rows, len(items))
    (options.output / "README.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
