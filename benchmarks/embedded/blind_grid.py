"""Sample the 40 fixed prompts without a word of them: ``python benchmarks/embedded/blind_grid.py MODEL GRID.png``.

A reader who does not know the prompts names what is in cells A1 to H5; a row is a background, a column a style.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.embedded.prompt_lists import NAMED, STYLES
from hypersd_jax.evaluation import Item, image_grid, make_model, sample
from hypersd_jax.pipeline import Pipeline

ROWS = "ABCDEFGH"


def main() -> None:
    """Sample and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--lora", type=Path)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt; the others' follow")
    options = parser.parse_args()
    pipe = Pipeline.from_pretrained(options.model)
    if options.lora is not None:
        pipe.load_lora(options.lora)
    prompts = NAMED.read_text(encoding="utf-8").splitlines()
    items = [Item(prompt, options.seed + number) for number, prompt in enumerate(prompts)]
    model = make_model("blind", pipe, steps=options.steps, sampler="ddim", guidance=options.guidance)
    images = sample(model, items, batch_size=20)
    columns = np.moveaxis(images.reshape(len(ROWS), len(STYLES), *images.shape[1:]), 1, 0)
    image_grid({str(number + 1): column for number, column in enumerate(columns)}, list(ROWS)).save(options.output)
    print(options.output)


if __name__ == "__main__":
    main()
