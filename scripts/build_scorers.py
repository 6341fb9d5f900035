"""Train the two text-image scorers that ship in hypersd_jax/assets/scorers, and write their cards.

    npm pack @iconify-json/twemoji@1.2.5 && npm pack @iconify-json/emojione@1.2.3    # CC-BY-4.0; unpack each
    pip install --target SOMEWHERE resvg-py==0.5.0
    PYTHONPATH=SOMEWHERE python scripts/build_scorers.py --work FOLDER TWEMOJI_FOLDER EMOJIONE_FOLDER

The two packages are drawing styles that no training image has: they validate and do not ship. What the frozen network
sees in all images is kept in FOLDER/seen.npz (some minutes on two cores); training takes a minute or two.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import io
import json
import re
import time
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageFilter
from tqdm import tqdm

from hypersd_jax.data import COLOURS, composite, load_emoji, split_of
from hypersd_jax.data.order import fraction, mix
from hypersd_jax.evaluation.lite0 import load_lite0
from hypersd_jax.evaluation.scorer import SPECS, Scorer, ScorerName, tower_input
from hypersd_jax.evaluation.scorer_checks import auc, chosen_rate, retrieval
from hypersd_jax.evaluation.scorer_training import ScorerData, ScorerTraining, caption_text, train_scorer
from hypersd_jax.weights.components import assets
from hypersd_jax.weights.tensors import replacing, save_tensors

SIZE, MARGIN = 64, 0.04
VARIANTS = 4
BATCH = 64
TRAINING: dict[ScorerName, ScorerTraining] = {
    "report": ScorerTraining(seed=0, epochs=80, grouped=4),
    "reward": ScorerTraining(seed=1, epochs=120),
}
BACKGROUND, FLIP, SCALE, LEFT, TOP, BLUR, CLEAN = range(7)


def main() -> None:
    """Render, look, train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("held_out", type=Path, nargs="+", help="unpacked icon sets in styles that are not trained on")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=assets() / "scorers")
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    arguments = parser.parse_args()
    path = arguments.work / "seen.npz"
    if not path.exists():
        np.savez(path, **seen(arguments.held_out))
    with np.load(path) as file:
        found = {name: file[name] for name in file.files}
    for name, options in TRAINING.items():
        begin = time.perf_counter()
        # The reporting scorer must know the names that it is asked about; the reward stays away from test concepts.
        scorer = train_scorer(SPECS[name], data(found, name, every=name == "report"), options)
        seconds = time.perf_counter() - begin
        strict = train_scorer(SPECS[name], data(found, name, every=False), options) if name == "report" else scorer
        names = sorted(set(data(found, name, every=name == "report").names))
        card = {
            "name": name,
            "date": arguments.date,
            "trained_on": "all concepts in five styles" if name == "report" else "the training split in five styles",
            "spec": dataclasses.asdict(SPECS[name]),
            "training": dataclasses.asdict(options) | {"seconds": round(seconds)},
            "settings_chosen_on": "unseen_styles",
            "unseen_styles": {
                "styles": [folder.name for folder in arguments.held_out],
                **unseen_styles(scorer, found, names),
            },
            "unseen_concepts": {
                "how": "trained once more without them" if name == "report" else "as it is",
                **unseen_concepts(strict, found),
            },
        }
        folder = arguments.output / name
        tensors = {key: value.astype(np.float16) for key, value in scorer.params.items()}
        words = {"vocabulary": " ".join(scorer.vocabulary)} if scorer.vocabulary else None
        save_tensors(folder / "model.safetensors", tensors, metadata=words)
        with replacing(folder / "card.json") as temporary:
            temporary.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(card, indent=1))


def data(found: dict[str, np.ndarray], name: str, *, every: bool) -> ScorerData:
    """The training images, of every concept or of the training split alone."""
    records = [load_emoji().records[i] for i in found["train_record"][::VARIANTS]]
    kept = np.array([every or split_of(record) == "train" for record in records])
    seen_here = found[f"train_{SPECS[name].image_tower}"].reshape(len(records), VARIANTS, -1)[kept]
    backgrounds = np.array(list(COLOURS))[found["train_colour"]].reshape(-1, VARIANTS)[kept]
    chosen = [record for record, here in zip(records, kept, strict=True) if here]
    return ScorerData(
        seen=seen_here,
        names=[record.label for record in chosen],
        styles=[record.style for record in chosen],
        backgrounds=backgrounds,
    )


def unseen_styles(scorer: Scorer, found: dict[str, np.ndarray], names: list[str]) -> dict[str, float]:
    """Names among all names, match against mismatch, and the right background against another, without a style word."""
    rng = np.random.default_rng(0)
    known = np.isin(found["held_label"], names)
    labels, backgrounds = found["held_label"][known], np.array(list(COLOURS))[found["held_colour"][known]]
    images = scorer.images(found[f"held_{scorer.spec.image_tower}"][known])
    truth = np.array([names.index(label) for label in labels])
    texts = {background: scorer.text([caption_text(name, "", background) for name in names]) for background in COLOURS}
    ranks = np.zeros(2)
    for background, table in texts.items():
        here = backgrounds == background
        ranks += here.sum() * np.array(retrieval(images[here], table, truth[here]))

    def scores(chosen: np.ndarray, said: np.ndarray) -> np.ndarray:
        return np.array([mine @ texts[g][i] for mine, g, i in zip(images, said, chosen, strict=True)])

    own = scores(truth, backgrounds)
    moved_backgrounds = np.array([other(rng, list(COLOURS), background) for background in backgrounds])
    swapped = scores(truth, moved_backgrounds)
    return rounded(
        pictures=len(labels),
        names=len(names),
        r1=ranks[0] / len(labels),
        r5=ranks[1] / len(labels),
        auc=auc(own, scores((truth + rng.integers(1, len(names), len(truth))) % len(names), backgrounds)),
        colour_swap=chosen_rate(own, swapped),
        colour_swap_auc=auc(own, swapped),
    )


def unseen_concepts(scorer: Scorer, found: dict[str, np.ndarray]) -> dict[str, float]:
    """Images of the test split: match against mismatch, and the right style and background against another."""
    rng = np.random.default_rng(1)
    records = [load_emoji().records[i] for i in found["test_record"]]
    backgrounds = np.array(list(COLOURS))[found["test_colour"]]
    styles = sorted({record.style for record in records})
    images = scorer.images(found[f"test_{scorer.spec.image_tower}"])

    def scores(parts: list[tuple[str, str, str]]) -> np.ndarray:
        return np.sum(images * scorer.text([caption_text(*part) for part in parts]), axis=1)

    parts = [(record.label, record.style, str(g)) for record, g in zip(records, backgrounds, strict=True)]
    own = scores(parts)
    turned = scores([(parts[(i + len(parts) // 2) % len(parts)][0], *parts[i][1:]) for i in range(len(parts))])
    style = scores([(name, other(rng, styles, style), background) for name, style, background in parts])
    background = scores([(name, style, other(rng, list(COLOURS), background)) for name, style, background in parts])
    return rounded(
        pictures=len(parts),
        auc=auc(own, turned),
        style_swap=chosen_rate(own, style),
        style_swap_auc=auc(own, style),
        colour_swap=chosen_rate(own, background),
        colour_swap_auc=auc(own, background),
    )


def other(rng: np.random.Generator, among: list[str], this: str) -> str:
    """Another one of these."""
    return str(rng.choice([one for one in among if one != this]))


def rounded(**values: float) -> dict[str, float]:
    """To four digits after the point."""
    return {name: value if isinstance(value, int) else round(float(value), 4) for name, value in values.items()}


def seen(held_out: list[Path]) -> dict[str, np.ndarray]:
    """Compute the image towers' inputs, for training ("train_"), clean test images ("test_") and held-out styles."""
    emoji = load_emoji()
    backgrounds = list(COLOURS)
    drawn = [(label, image) for folder in held_out for label, image in render(folder)]
    found: dict[str, np.ndarray] = {}
    every = np.arange(len(emoji))
    rows = np.repeat(every, VARIANTS)
    variants = np.tile(np.arange(VARIANTS), len(every))
    # White first, then three other backgrounds, another three for each image.
    others = (mix(1, BACKGROUND, rows) % np.uint64(7)).astype(int) + 2 * variants
    colours = np.where(variants == 0, 0, 1 + others % 7)
    images = (
        moved(emoji.images[row], backgrounds[colour], mix(2, row, variant))
        for row, colour, variant in zip(rows, colours, variants, strict=True)
    )
    found |= {"train_record": rows, "train_colour": colours, **looked("train", images, len(rows))}

    test = np.array([i for i in every if split_of(emoji.records[i]) == "test"])
    colours = (mix(3, CLEAN, test) % np.uint64(8)).astype(int)
    images = (composite(emoji.images[i], COLOURS[backgrounds[c]]) for i, c in zip(test, colours, strict=True))
    found |= {"test_record": test, "test_colour": colours, **looked("test", images, len(test))}

    colours = (mix(4, CLEAN, np.arange(len(drawn))) % np.uint64(8)).astype(int)
    images = (composite(image, COLOURS[backgrounds[c]]) for (_, image), c in zip(drawn, colours, strict=True))
    labels = np.array([label for label, _ in drawn])
    return found | {"held_label": labels, "held_colour": colours, **looked("held", images, len(drawn))}


def looked(name: str, images, count: int) -> dict[str, np.ndarray]:
    """Compute both image towers' inputs of images (64, 64, 3) uint8."""
    trunk = jax.device_put(load_lite0())
    run = jax.jit(lambda trunk, images: {spec.image_tower: tower_input(spec, trunk, images) for spec in SPECS.values()})
    images = iter(images)
    parts = []
    for start in tqdm(range(0, count, BATCH), desc=name):
        batch = np.stack([next(images) for _ in range(min(BATCH, count - start))])
        filled = np.zeros((BATCH, *batch.shape[1:]), np.float32)
        filled[: len(batch)] = batch
        parts.append(
            {tower: np.asarray(value, np.float16)[: len(batch)] for tower, value in run(trunk, filled).items()}
        )
    return {f"{name}_{tower}": np.concatenate([part[tower] for part in parts]) for tower in parts[0]}


def moved(rgba: np.ndarray, colour: str, hashed: np.ndarray) -> np.ndarray:
    """An image on its background, mirrored, scaled, shifted and blurred a little by what ``hashed`` (1,) says."""

    def chance(purpose: int) -> float:
        return float(fraction(mix(hashed, purpose))[0])

    background = COLOURS[colour]
    image = Image.fromarray(composite(rgba, background))
    if chance(FLIP) < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = 0.95 + 0.25 * chance(SCALE)
    middle = SIZE / 2 * (1 - scale)
    left, top = (middle + 8 * (chance(purpose) - 0.5) for purpose in (LEFT, TOP))
    matrix = (scale, 0, left, 0, scale, top)
    affine = Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC
    image = image.transform((SIZE, SIZE), *affine, fillcolor=background)
    return np.asarray(image.filter(ImageFilter.GaussianBlur(max(0.0, 2.0 * chance(BLUR) - 1.0))))


def render(folder: Path) -> list[tuple[str, np.ndarray]]:
    """(label, RGBA (64, 64, 4)) of an icon set's images of the embedded concepts, found by the slug of the label."""
    import resvg_py

    icons = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
    labels = {record.label: slug(record.label) for record in load_emoji().records}
    found = []
    for label, name in tqdm(sorted(labels.items()), desc=folder.name):
        name = icons.get("aliases", {}).get(name, {}).get("parent", name)
        if name not in icons["icons"]:
            continue
        icon = icons["icons"][name]
        width, height = (icon.get(side, icons[side]) for side in ("width", "height"))
        side = (1 + 2 * MARGIN) * max(width, height)
        box = f"{(width - side) / 2} {(height - side) / 2} {side} {side}"
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}">'
        try:
            png = resvg_py.svg_to_bytes(f"{svg}{icon['body']}</svg>", width=2 * SIZE, height=2 * SIZE)
        except BaseException as error:  # resvg's panics are no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            continue
        image = Image.open(io.BytesIO(bytes(png))).convert("RGBA").convert("RGBa").reduce(2).convert("RGBA")
        found.append((label, np.asarray(image)))
    return found


def slug(label: str) -> str:
    """The icon sets' spelling of a name."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub("['\N{RIGHT SINGLE QUOTATION MARK}]", "", label.lower())).strip("-")


if __name__ == "__main__":
    main()
