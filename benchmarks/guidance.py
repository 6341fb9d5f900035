"""Do guidance and negative prompts still work on a LoRA? ``python benchmarks/guidance.py --lora FILE``.

Samples held-out prompts that name a coloured background with the embedded model: the teacher at 25 steps, the LoRA of
``--lora`` (recipe emoji/cfg-preserving), and the shipped 8-step LoRA, which has absorbed its teacher's
guidance, each at several guidance scales; and once more with that background as the negative prompt, "blue background".
Writes benchmarks/results/guidance: a table (text match; how many images have the background that was asked for; how
much of the range 0..255 is clipped) and a grid.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tqdm import tqdm

from hypersd_jax.compilation import use_compilation_cache
from hypersd_jax.data import COLOURS, EvalItem, evaluation_list
from hypersd_jax.errors import UserError
from hypersd_jax.evaluation import SPECS, Item, image_grid, load_scorer, make_model, sample, seen_by, text_match
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.weights.components import EMBEDDED, assets

RESULTS = ROOT / "benchmarks" / "results" / "guidance"
GROUPS = ("animals & nature", "food & drink", "smileys & emotion")
SCALES = (1.0, 3.0, 5.0, 8.0)
SHOWN, SHOWN_NEGATIVE = 8, 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """A name in the table, a LoRA or none, and its sampling steps."""

    name: str
    lora: Path | None
    steps: int


def named_backgrounds(n: int) -> list[EvalItem]:
    """The first ``n`` held-out items whose background is not white, and so is named in the prompt."""
    return [item for item in evaluation_list(4 * n, groups=GROUPS) if item.background != "white"][:n]


def background_share(images: np.ndarray, items: list[EvalItem]) -> float:
    """The share of images (N, H, W, 3) uint8 whose four corners' mean is nearest to the background asked for."""
    found = nearest_background(images)
    return float(np.mean([name == item.background for name, item in zip(found, items, strict=True)]))


def nearest_background(images: np.ndarray) -> list[str]:
    """The background that the four corners' mean of each image (N, H, W, 3) uint8 is nearest to."""
    corners = np.stack([images[:, y, x] for y in (0, -1) for x in (0, -1)]).astype(np.float64).mean(axis=0)
    table = np.asarray(list(COLOURS.values()), np.float64)
    return [list(COLOURS)[index] for index in np.argmin(np.square(corners[:, None] - table).sum(axis=-1), axis=1)]


def measure(
    pipe: Pipeline, contender: Contender, items: list[EvalItem], scorer: Any, bar: tqdm
) -> list[dict[str, Any]]:
    """One row a guidance scale, without and, where guidance is on, with the negative prompt."""
    rows = []
    if contender.lora is not None:
        pipe.load_lora(contender.lora, name="student")
    for scale in SCALES:
        for negative in (False, True)[: 1 if scale == 1.0 else 2]:
            images = sampled(pipe, contender.steps, scale, items, negative)
            match = text_match(scorer, seen_by(SPECS["report"], images), [item.prompt for item in items])
            assert match is not None, "the prompts are different ones"
            numbers = {
                "clip_gain": match.gain.mean,
                "clip_gain_se": match.gain.standard_error,
                "ground": background_share(images, items),
                "clipped": float(np.mean((images == 0) | (images == 255))),
            }
            rows.append({"model": contender.name, "guidance": scale, "negative": negative, **numbers, "images": images})
            bar.update()
    pipe.unload_lora()
    return rows


def sampled(pipe: Pipeline, steps: int, scale: float, items: list[EvalItem], negative: bool) -> np.ndarray:
    """Images uint8 (N, H, W, 3); the same latents whatever the model and the scale."""
    model = make_model("", pipe, steps=steps, sampler="ddim", guidance=scale)
    listed = [Item(item.prompt, item.seed) for item in items]
    negatives = [f"{item.background} background" for item in items] if negative else None
    return sample(model, listed, batch_size=32, negatives=negatives)


def page(rows: list[dict[str, Any]], n: int) -> str:
    """The table."""
    lines = [
        "# Guidance and negative prompts on few-step LoRAs",
        "",
        f"`python benchmarks/guidance.py --n {n} --lora FILE`; held-out prompts that name a coloured background; "
        f"jax {jax.__version__}, "
        f'{jax.devices()[0].device_kind}. Negative: the named background, as in "blue background".',
        "",
        "| model | guidance | text-match gain | background as asked | the same, as the negative prompt | clipped |",
        "|---|---|---|---|---|---|",
    ]
    against = {(row["model"], row["guidance"]): row["ground"] for row in rows if row["negative"]}
    for row in (row for row in rows if not row["negative"]):
        found = against.get((row["model"], row["guidance"]))
        lines.append(
            f"| {row['model']} | {row['guidance']:g} | {row['clip_gain']:.1f} ± {row['clip_gain_se']:.1f} "
            f"| {row['ground']:.0%} | {'' if found is None else f'{found:.0%}'} | {row['clipped']:.1%} |"
        )
    lines += ["", "Clipped: the share of channel values that are 0 or 255, which too much guidance drives up.", ""]
    return "\n".join([*lines, "![grid](grid.png)", ""])


def main(arguments: list[str] | None = None) -> None:
    """Generate, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora", type=Path, required=True, help="a LoRA that was trained with an unguided teacher")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--n", type=int, default=64, help="prompts")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.n < SHOWN or options.steps < 1:
        parser.error(f"--n must be at least {SHOWN} and --steps at least 1")
    if not options.lora.is_file():  # before the teacher is sampled, which takes minutes
        parser.error(f"--lora {options.lora}: no such file")
    use_compilation_cache()
    items = named_backgrounds(options.n)
    contenders = [
        Contender(name="teacher, 25 steps", lora=None, steps=25),
        Contender(name=f"unguided teacher's student, {options.steps} steps", lora=options.lora, steps=options.steps),
        Contender(name="guided teacher's student, 8 steps", lora=assets() / "loras" / "tscd-8.safetensors", steps=8),
    ]
    try:
        pipe = Pipeline.from_pretrained(EMBEDDED)
        scorer = load_scorer("report")
        with tqdm(total=len(contenders) * (2 * len(SCALES) - 1), unit="row") as bar:
            rows = [row for contender in contenders for row in measure(pipe, contender, items, scorer, bar)]
    except UserError as error:
        print(f"guidance: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    columns = {
        f"{row['model']}, guidance {row['guidance']:g}" + (", negative" if row["negative"] else ""): row["images"]
        for row in rows
        if not row["negative"] or row["guidance"] == SHOWN_NEGATIVE
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
