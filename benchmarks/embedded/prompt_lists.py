"""Write the fixed prompts of embedded models: ``python benchmarks/embedded/prompt_lists.py``.

prompts_40.txt     what a reader who does not know the prompts is asked to name: 40 concepts, each style on each
                   background once
prompts_sweep.txt  what recipes are chosen by: held-out prompts that no table uses
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hypersd_jax.data import COLOURS, caption, evaluation_list, load_emoji
from hypersd_jax.data.emoji_source import BACKGROUNDS, sample_backgrounds
from hypersd_jax.data.order import mix, shuffled

FOLDER = Path(__file__).parent
NAMED, SWEEP = FOLDER / "prompts_40.txt", FOLDER / "prompts_sweep.txt"
STYLES = ("noto", "blob", "fluent flat", "fluent gradient", "fluent 3d")
CONCEPTS = (
    "octopus",
    "butterfly",
    "pizza",
    "bicycle",
    "guitar",
    "umbrella",
    "red apple",
    "lion",
    "hamburger",
    "cat face",
    "elephant",
    "penguin",
    "crab",
    "snail",
    "rose",
    "sunflower",
    "cactus",
    "mushroom",
    "banana",
    "strawberry",
    "carrot",
    "soft ice cream",
    "birthday cake",
    "airplane",
    "rocket",
    "sailboat",
    "fire engine",
    "castle",
    "snowman",
    "soccer ball",
    "trophy",
    "crown",
    "key",
    "scissors",
    "hammer",
    "camera",
    "light bulb",
    "ghost",
    "robot",
    "smiling face with sunglasses",
)
TABLES = 1_000
"""Prompts of the fixed list that tables may use; the sweep's are others."""
SWEEP_PROMPTS, SWEEP_SEED = 256, 1


def named_prompts() -> list[str]:
    """List the 40 prompts; each of five styles meets each of eight backgrounds once."""
    records = {(record.label, record.style): record for record in load_emoji().records}
    return [
        caption(records[label, STYLES[i % len(STYLES)]], BACKGROUNDS[i // len(STYLES)])
        for i, label in enumerate(CONCEPTS)
    ]


def sweep_prompts(taken: Sequence[str]) -> list[str]:
    """List held-out prompts, half of them on white, without those that are ``taken``."""
    emoji = load_emoji()
    held_out = emoji.indices("test")
    positions = np.arange(len(held_out) * len(COLOURS))
    items = held_out[shuffled(positions, len(held_out), int(mix(SWEEP_SEED, 0)[0]))]
    backgrounds = sample_backgrounds(positions, SWEEP_SEED, white_fraction=0.5)
    found = dict.fromkeys(
        caption(emoji.records[item], background) for item, background in zip(items, backgrounds, strict=True)
    )
    return [prompt for prompt in found if prompt not in set(taken)][:SWEEP_PROMPTS]


def main() -> None:
    """Write both lists."""
    named = named_prompts()
    taken = [*named, *(item.prompt for item in evaluation_list(TABLES))]
    for path, prompts in ((NAMED, named), (SWEEP, sweep_prompts(taken))):
        path.write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
