"""Take a finished run's results into benchmarks/results, with its table as Markdown.

python train.py && python scripts/take_results.py outputs/emoji default
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from datetime import date
from pathlib import Path
from typing import Any

import jax
import yaml

HEAD = (
    "| model | steps | guidance | calls | distance | KID | FID | KID to training images | text match gain "
    "| diversity | margin in distance | s/image |"
)
NOTE = """Distance: root mean squared pixel difference (0..1) to the teacher's 25-step image from the same latents.
KID and FID: EfficientNet-Lite0 features, against the teacher's 25-step images; the row from other latents is their
floor. KID to training images: against as many real ones. Text match gain: how much better the images fit their
own prompts than one another's, by the reporting scorer (docs/evaluation.md), 100 times a cosine. Diversity: between
four seeds of a prompt. Calls: UNet calls an image. Margin: how much nearer than the nearest teacher at as many calls,
with its standard error."""


def main(folder: Path, name: str) -> None:
    """Copy results.json and grid.png of a run to benchmarks/results/NAME, and write README.md with them."""
    target = Path("benchmarks/results") / name
    target.mkdir(parents=True, exist_ok=True)
    for file in ("results.json", "grid.png"):
        shutil.copyfile(folder / file, target / file)
    rows = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    stages = ", ".join(f"{s['name']} {s['updates']} x {s['batch_size']}" for s in config["stages"] if not s["skip"])
    table = "\n".join([HEAD, "|" + "---|" * 12, *(line(row) for row in rows)])
    text = f"""# {name}

Training steps x images: {stages}. {rows[0]["n"]} (prompt, seed, background) of held-out concepts.
{date.today()}, jax {jax.__version__}, {os.cpu_count()} CPU cores ({processor()}).

{table}

{NOTE}
"""
    (target / "README.md").write_text(text, encoding="utf-8")
    print(target)


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    kid = f"{row['kid']:.3f} ± {row['kid_se']:.3f}" if "kid" in row else ""
    margin = f"{row['margin']:+.4f} ± {row['margin_se']:.4f} over {row['baseline']}" if "margin" in row else ""
    gain = f"{row['clip_gain']:.1f} ± {row['clip_gain_se']:.1f}" if "clip_gain" in row else ""
    seconds = f"{row['seconds_per_image']:.3f}" if "seconds_per_image" in row else ""
    cells = (row["model"], row["steps"], f"{row['guidance']:g}", row["calls"], f"{row['distance']:.4f}", kid)
    real, spread = f"{row['kid_train']:.3f} ± {row['kid_train_se']:.3f}", f"{row['diversity']:.1f}"
    cells = (*cells, f"{row['fid_teacher']:.0f}", real, gain, spread, margin, seconds)
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def processor() -> str:
    """The processor's name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    return next((text.partition(":")[2].strip() for text in lines if text.startswith("model name")), "unknown")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
