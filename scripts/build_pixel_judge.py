"""Train the judge that ships in hypersd_jax/assets/scorers/pixels, and write its card: some minutes on two cores.

    python scripts/build_pixel_judge.py

It is trained on all concepts, as the reporting scorer is, and once more without the test split for its card's figures.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from hypersd_jax.data import COLOURS, composite, load_emoji
from hypersd_jax.data.order import mix
from hypersd_jax.evaluation.pixel_judge import PARTS, PixelJudge, class_names, classes_of, init_judge, part_logits
from hypersd_jax.evaluation.scorer_checks import chosen_rate
from hypersd_jax.evaluation.scorer_training import caption_text
from hypersd_jax.weights.components import assets
from hypersd_jax.weights.tensors import replacing, save_tensors
from scripts.build_scorers import moved

SEED, EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 2, 24, 64, 2e-3, 0.02
BACKGROUNDS = tuple(COLOURS)


def main() -> None:
    """Train twice, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=assets() / "scorers" / "pixels")
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    arguments = parser.parse_args()
    emoji = load_emoji()
    begin = time.perf_counter()
    params = trained(np.arange(len(emoji)))
    seconds = time.perf_counter() - begin
    strict = trained(emoji.indices("train"))
    card = {
        "name": "pixels",
        "date": arguments.date,
        "trained_on": "all concepts in five styles",
        "training": {
            "seed": SEED,
            "epochs": EPOCHS,
            "batch_size": BATCH,
            "learning_rate": LEARNING_RATE,
            "weight_decay": WEIGHT_DECAY,
            "seconds": round(seconds),
        },
        "seen_concepts": measured(params),
        "unseen_concepts": {"how": "trained once more without them", **measured(strict)},
    }
    tensors = {key: np.asarray(value).astype(np.float16) for key, value in params.items()}
    save_tensors(arguments.output / "model.safetensors", tensors, metadata={"classes": json.dumps(class_names())})
    with replacing(arguments.output / "card.json") as temporary:
        temporary.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(card, indent=1))


def trained(rows: np.ndarray) -> dict[str, jax.Array]:
    """Train from nothing on these images, each epoch on a background, at a place and a size of its own."""
    emoji = load_emoji()
    params = init_judge(jax.random.key(SEED))
    steps = EPOCHS * (len(rows) // BATCH)
    rate = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, steps // 20, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=WEIGHT_DECAY))
    state, rng = optimizer.init(params), np.random.default_rng(SEED)

    def loss_of(params: Any, images: jax.Array, classes: jax.Array) -> jax.Array:
        losses = [
            optax.softmax_cross_entropy_with_integer_labels(logits, classes[:, index]).mean()
            for index, logits in enumerate(part_logits(params, images.astype(jnp.float32)))
        ]
        return sum(losses, jnp.zeros(()))

    @jax.jit
    def step(params: Any, state: Any, images: jax.Array, classes: jax.Array) -> Any:
        loss, gradient = jax.value_and_grad(loss_of)(params, images, classes)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    bar = tqdm(total=steps)
    for epoch in range(EPOCHS):
        order = rng.permutation(rows)
        for start in range(0, len(rows) - BATCH + 1, BATCH):
            chosen = order[start : start + BATCH]
            # Half on white, as prompts are.
            colours = np.where(rng.random(BATCH) < 0.5, 0, rng.integers(1, len(BACKGROUNDS), BATCH))
            images = [
                moved(emoji.images[row], BACKGROUNDS[colour], mix(SEED, row, epoch))
                for row, colour in zip(chosen, colours, strict=True)
            ]
            classes = classes_of(_captions(chosen, colours))
            params, state, loss = step(params, state, np.stack(images), classes)
            bar.update()
        bar.set_postfix(loss=f"{float(loss):.3f}")
    return params


def measured(params: Any) -> dict[str, float]:
    """Its accuracy on the test split's images as they are, and how often the true prompt is above a wrong one."""
    emoji, rng = load_emoji(), np.random.default_rng(0)
    rows = emoji.indices("test")
    colours = rng.integers(0, len(BACKGROUNDS), len(rows))
    images = np.stack(
        [composite(emoji.images[row], COLOURS[BACKGROUNDS[c]]) for row, c in zip(rows, colours, strict=True)]
    )
    classes = classes_of(_captions(rows, colours))
    parts = np.array_split(np.arange(len(rows)), max(1, len(rows) // 128))
    found_logits = [part_logits(params, images[part] * 1.0) for part in parts]
    logits = [np.concatenate(each) for each in zip(*found_logits, strict=True)]
    found: dict[str, float] = {"images": len(rows)}
    for index, part in enumerate(PARTS):
        found[f"{part}_accuracy"] = round(float(np.mean(logits[index].argmax(axis=1) == classes[:, index])), 4)
    floats = images.astype(np.float32) / 255.0
    judge = PixelJudge()
    own = np.asarray(judge(params, floats, classes))
    turned = np.asarray(judge(params, floats, np.roll(classes, len(rows) // 2, axis=0)))
    return {**found, "above_another_prompt": round(chosen_rate(own, turned), 4)}


def _captions(rows: np.ndarray, colours: np.ndarray) -> list[str]:
    records = load_emoji().records
    pairs = zip(rows, colours, strict=True)
    return [caption_text(records[row].label, records[row].style, BACKGROUNDS[colour]) for row, colour in pairs]


if __name__ == "__main__":
    main()
