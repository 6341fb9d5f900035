"""Stable Diffusion at full size here against PyTorch, in float32: ``python benchmarks/full_parity.py --family sd15``.

Random weights that diffusers wrote under their real names (`benchmarks/random_model.py`) go through both, one process
after the other: text encoders, autoencoder, UNet bare and with a rank-4 LoRA of PEFT's, and whole pipelines, on 32 x 32
latents; values, and gradients for the inputs and the LoRA. Exit status 1 where one of them differs by more than its
limit. SDXL takes 16 GiB of memory and 14 GB of disk.
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
LIMITS = {"value": 1e-4, "gradient": 1e-3}
"""Of |a - b|max / |b|max, b being PyTorch's."""

PACKAGES = ("jax", "flax", "torch", "diffusers", "transformers", "peft", "numpy")


def run_side(side: str, family: str, model: Path, folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """One side in a process of its own, which has ended on return."""
    command = [sys.executable, "-m", f"benchmarks.sides.parity_{side}", family, str(model), str(folder)]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"})
    with np.load(folder / f"{side}.npz") as arrays:
        found = dict(arrays)
    return found, json.loads((folder / f"{side}.json").read_text(encoding="utf-8"))


def compare(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """One row for each array; ids must be equal, and an array without spread proves nothing, so it fails."""
    if ours.keys() != theirs.keys():
        sys.exit(f"only one side has {', '.join(sorted(ours.keys() ^ theirs.keys()))}")
    rows = []
    for name, wanted in theirs.items():
        if ours[name].shape != wanted.shape:
            sys.exit(f"{name}: shape {ours[name].shape} here, {wanted.shape} there")
        a, b = ours[name].astype(np.float64), wanted.astype(np.float64)
        kind = "gradient" if ": d " in name else "value"
        limit = 0.0 if name.endswith(".ids") else LIMITS[kind]
        error = float(np.abs(a - b).max() / np.abs(b).max())
        row = {
            "quantity": name,
            "kind": kind,
            "shape": list(b.shape),
            "std": float(b.std()),
            "error": error,
            "cosine": float((a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b))),
            "limit": limit,
            "passed": bool(error <= limit and b.std() > 0),
        }
        rows.append(row)
    return rows


def adapter_effect(theirs: dict[str, np.ndarray]) -> float:
    """How much the LoRA changes the UNet's output, in the measure of the errors."""
    bare = theirs["unet"]
    return float(np.abs(theirs["unet+lora"] - bare).max() / np.abs(bare).max())


def document(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    about = result["about"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    lines = [
        f"# Parity at full size: {about['family']}, float32, 32 x 32 latents",
        "",
        f"`{about['command']}`, {about['date']}; {versions}; Python {about['python']}, {about['cores']} cores.",
        "",
        "Random weights written by diffusers, PyTorch's own initialisation. Error: |here - PyTorch|max / |PyTorch|max."
        f" Limits: {LIMITS['value']:g} for values, {LIMITS['gradient']:g} for gradients. Images in -1..1."
        f" The LoRA changes the UNet's output by {result['adapter effect']:.2g} in this measure.",
        "",
        f"Largest error: values {result['worst']['value']:.1e}, gradients {result['worst']['gradient']:.1e}."
        f" {'All within the limits.' if result['passed'] else 'NOT all within the limits.'}",
        "",
        "| quantity | shape | std | error | 1 - cosine |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        shape = " x ".join(map(str, row["shape"]))
        error = f"{row['error']:.1e}{'' if row['passed'] else ' **fails**'}"
        angle = max(0.0, 1 - row["cosine"])  # rounding makes it negative for equal arrays
        lines.append(f"| {row['quantity']} | {shape} | {row['std']:.3g} | {error} | {angle:.0e} |")
    lines += [
        "",
        "Seconds, which take in loading and compiling and compare no speeds (`benchmarks/sampling.py` does), and peak"
        " resident memory, in which PyTorch's weights are the mapped file:",
        "",
        "| side | " + " | ".join(result["sides"]["ours"]["seconds"]) + " | peak memory, GiB |",
        "|---" * (len(result["sides"]["ours"]["seconds"]) + 2) + "|",
    ]
    for side, title in (("ours", "here"), ("theirs", "PyTorch")):
        seconds = " | ".join(f"{value:.0f}" for value in result["sides"][side]["seconds"].values())
        lines.append(f"| {title} | {seconds} | {result['sides'][side]['peak_gib']:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("sd15", "sdxl"), default="sd15")
    parser.add_argument("--models", type=Path, default=Path("outputs/benchmark-models"), help="where they are kept")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/full_parity"), help="_FAMILY.json and .md are added"
    )
    options = parser.parse_args()

    model = (options.models / f"{options.family}-float32").resolve()
    writer = [sys.executable, "-m", "benchmarks.random_model", options.family, str(model)]
    subprocess.run(writer, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    with tempfile.TemporaryDirectory() as name:
        theirs, about_theirs = run_side("theirs", options.family, model, Path(name))
        ours, about_ours = run_side("ours", options.family, model, Path(name))
    rows = compare(ours, theirs)
    result = {
        "passed": all(row["passed"] for row in rows),
        "worst": {kind: max(row["error"] for row in rows if row["kind"] == kind) for kind in LIMITS},
        "adapter effect": adapter_effect(theirs),
        "limits": LIMITS,
        "about": {
            "family": options.family,
            "command": f"python benchmarks/full_parity.py --family {options.family}",
            "date": datetime.date.today().isoformat(),
            "versions": {package: version(package) for package in PACKAGES},
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "machine": platform.machine(),
        },
        "sides": {"ours": about_ours, "theirs": about_theirs},
        "rows": rows,
    }
    text = document(result)
    print(text)
    stem = options.output.with_name(f"{options.output.name}_{options.family}")
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    sys.exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    main()
