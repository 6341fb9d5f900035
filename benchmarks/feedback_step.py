"""Time and memory of a feedback update: ``python benchmarks/feedback_step.py [--pixels 512]``, beside PyTorch's.

Stable Diffusion 1.5's full architecture with random weights, batch 1: one step of the student from the noise, the
decoder with its activations computed again, the aesthetic reward (ViT-L/14, random weights), and the second LoRA's
update. Both sides have the same weights, noise and LoRAs, and alternate; losses and gradient norms are compared.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.sampling import Side
from benchmarks.sides import feedback
from benchmarks.training_step import PACKAGES, compare, take_turns, write_model

RESULT = ROOT / "benchmarks" / "results" / "feedback" / "step"


def write_reward(folder: Path) -> Path:
    """Write a CLIP ViT-L/14 and a head with random weights, unless the folder is there."""
    if folder.exists():
        return folder
    import torch
    import transformers
    from safetensors.torch import save_file

    from benchmarks.sides.rewards_torch import aesthetic_head

    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={"num_hidden_layers": 1, "hidden_act": "quick_gelu"},  # which the reward does not read
        vision_config={**feedback.L14, "patch_size": 14, "image_size": 224, "hidden_act": "quick_gelu"},
        projection_dim=768,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    save_file(aesthetic_head("linear", 768).state_dict(), folder / "aesthetic_head.safetensors")
    return folder


def main() -> None:
    """Run both sides in turn and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3, help="timed updates, after one that warms up")
    parser.add_argument("--models", type=Path, default=ROOT / "outputs/benchmark-models", help="where they are kept")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    model, reward = write_model("sd15", options.models), write_reward((options.models / "aesthetic").resolve())
    updates = options.repeats + 1
    with tempfile.TemporaryDirectory() as folder:
        ours = Side(
            "feedback_ours", sys.executable, [str(model), str(reward), str(options.pixels), str(updates), folder]
        )
        theirs = Side("feedback_theirs", sys.executable, [str(model), str(reward), folder])
        found = take_turns([ours, theirs], updates)
    sides = [
        {
            **side.load,
            "seconds": median(answer["seconds"] for answer in answers[1:]),
            "peak GiB": max(answer["peak GiB"] for answer in answers),
            "updates": answers,
        }
        for side, answers in zip((ours, theirs), found, strict=True)
    ]
    result = {"ours": sides[0], "pytorch": sides[1], "compared": compare(*sides)}
    write(options, result)


def write(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Write the table and the figures behind it."""
    ours, theirs, compared = result["ours"], result["pytorch"], result["compared"]
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    differences = ", ".join(f"{name} {value:.1e}" for name, value in compared["largest difference"].items())
    lines = [
        f"# A feedback update: SD 1.5, {options.pixels} px, batch 1, {ours['dtype']} on {ours['device']}, "
        f"{os.cpu_count()} cores",
        "",
        f"`python benchmarks/feedback_step.py --pixels {options.pixels}`, {datetime.date.today()}; {versions}; medians "
        f"of {options.repeats}.",
        "",
        "| | this package | PyTorch | ratio |",
        "|---|---|---|---|",
        *(
            f"| {name} | {ours[name]:.2f} | {theirs[name]:.2f} | {compared['ratio'][name]:.2f} |"
            for name in ("seconds", "peak GiB")
        ),
        "",
        f"Largest relative difference over {len(ours['updates'])} updates: {differences}. Compiling took "
        f"{ours['compile seconds']:.0f} s; XLA's temporary memory is {ours['XLA temporary GiB']:.2f} GiB.",
    ]
    text = "\n".join(lines) + "\n"
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".md").write_text(text, encoding="utf-8")
    options.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
