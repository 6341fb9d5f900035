"""Rewards at full size here against PyTorch, in float32: ``python benchmarks/reward_parity.py``.

For each reward PyTorch writes random weights of the published architecture under their real names, and scores two
photographs; then this package reads the file and scores the same floats, one process after the other. Scores, and the
gradient of a weighted sum of both to the pixels. Exit status 1 where one differs by more than its limit. A CLIP
ViT-H/14 takes 12 GiB of memory and 4 GB of disk, which are given back.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.sides import rewards

LIMITS = {"score": 1e-4, "score: d image": 1e-3}
"""Of |a - b|max / |b|max, b being PyTorch's."""

PACKAGES = ("jax", "flax", "torch", "transformers", "numpy", "pillow")
TITLES = {
    "aesthetic": "aesthetic v2, CLIP ViT-L/14, linear head",
    "pickscore": "PickScore, CLIP ViT-H/14, transformers' layout",
    "hpsv2": "HPSv2, CLIP ViT-H/14, OpenCLIP's layout",
    "imagereward": "ImageReward, BLIP ViT-L/16 and BERT",
}


def run_side(side: str, name: str, model: Path, folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """One side in a process of its own, which has ended on return."""
    command = [sys.executable, "-m", f"benchmarks.sides.rewards_{side}", name, str(model), str(folder)]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"})
    with np.load(folder / f"{side}.npz") as arrays:
        found = dict(arrays)
    return found, json.loads((folder / f"{side}.json").read_text(encoding="utf-8"))


def compare(name: str, disk: Path | None) -> dict[str, Any]:
    """The row of one reward."""
    with tempfile.TemporaryDirectory(dir=disk) as temporary:
        model, folder = Path(temporary) / "model", Path(temporary)
        theirs, about_theirs = run_side("theirs", name, model, folder)
        ours, about_ours = run_side("ours", name, model, folder)
    errors = {key: float(np.abs(ours[key] - theirs[key]).max() / np.abs(theirs[key]).max()) for key in LIMITS}
    return {
        "reward": name,
        "scores": theirs["score"].tolist(),
        "errors": errors,
        "gradient": float(np.abs(theirs["score: d image"]).max()),
        "8 bits": {"pixels": float(ours["8 bits: pixels"]), "scores": ours["8 bits: scores"].tolist()},
        "sides": {"ours": about_ours, "theirs": about_theirs},
        "passed": all(errors[key] <= limit for key, limit in LIMITS.items())
        and float(np.ptp(theirs["score"])) > 0
        and float(np.abs(theirs["score: d image"]).max()) > 0,
    }


def document(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    about = result["about"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    lines = [
        "# Rewards at full size against PyTorch, float32",
        "",
        f"`{about['command']}`, {about['date']}; {versions}; Python {about['python']}, {about['cores']} cores.",
        "",
        f"Random weights of the published architectures. Two photographs of {rewards.WIDTH} x {rewards.HEIGHT} px, from"
        " the same floats in 0..1, preprocessing included. Error: |here - PyTorch|max / |PyTorch|max. Limits:"
        f" {LIMITS['score']:g} for scores, {LIMITS['score: d image']:g} for gradients to the pixels."
        f" {'All within the limits.' if result['passed'] else 'NOT all within the limits.'}",
        "",
        "| reward | scores | error | error of the gradient | 8 bits: pixels | 8 bits: scores |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        scores, changes = (
            ", ".join(f"{value:.4g}" for value in found) for found in (row["scores"], row["8 bits"]["scores"])
        )
        errors = " | ".join(f"{row['errors'][key]:.1e}" for key in LIMITS)
        mark = "" if row["passed"] else " **fails**"
        lines.append(
            f"| {TITLES[row['reward']]}{mark} | {scores} | {errors} | {row['8 bits']['pixels']:.3f} | {changes} |"
        )
    lines += [
        "",
        "8 bits: by how much pixels in 0..1 and scores change where Pillow resizes the photograph in 8 bits, as the"
        " originals do, and not in float32. Random weights say nothing about the scores of trained ones.",
        "",
        "| reward | seconds here | in PyTorch | peak memory here, GiB | in PyTorch |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        ours, theirs = row["sides"]["ours"], row["sides"]["theirs"]
        seconds = " | ".join(f"{sum(side['seconds'].values()):.0f}" for side in (ours, theirs))
        lines.append(f"| {row['reward']} | {seconds} | {ours['peak_gib']:.1f} | {theirs['peak_gib']:.1f} |")
    lines += ["", "Seconds take in writing, loading and compiling, on a machine that may have other work."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rewards", nargs="*", metavar="NAME", help=f"of {', '.join(rewards.NAMES)} (default: all)")
    parser.add_argument("--disk", type=Path, help="a folder for the weights, 4 GB (default: the temporary one)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/rewards/parity", help=".json, .md")
    options = parser.parse_args()
    names = options.rewards or list(rewards.NAMES)
    if unknown := set(names) - set(rewards.NAMES):
        parser.error(f"{sorted(unknown)[0]} is none of {', '.join(rewards.NAMES)}")

    stored = options.output.with_suffix(".json")
    known = json.loads(stored.read_text(encoding="utf-8"))["rows"] if options.rewards and stored.is_file() else []
    rows = {row["reward"]: row for row in known}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        rows[name] = compare(name, options.disk)
        found = [rows[name] for name in rewards.NAMES if name in rows]
        result = {
            "passed": all(row["passed"] for row in found),
            "limits": LIMITS,
            "about": {
                "command": "python benchmarks/reward_parity.py",
                "date": datetime.date.today().isoformat(),
                "versions": {package: version(package) for package in PACKAGES},
                "python": platform.python_version(),
                "cores": os.cpu_count(),
            },
            "rows": found,
        }
        stored.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        options.output.with_suffix(".md").write_text(document(result), encoding="utf-8")
    print(document(result))
    sys.exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    main()
