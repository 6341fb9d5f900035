"""Memory and time of every stage's training step: ``python benchmarks/training_step.py [--shape sd15] [--cases tscd]``.

A UNet of the shape's full architecture with random weights, batch 1: float32 on a CPU, bfloat16 on an accelerator. Each
stage runs in a process of its own. TSCD's step is also written with diffusers and PEFT on PyTorch
(`sides/training_theirs.py`), which alternates with it on the same weights, draws and LoRA: their losses and gradient
norms are compared, and their seconds and memory.

Seconds are of one update, the compilation left out. Peak memory is what the process held at most during the updates,
swap included, above what it held before the model; XLA's plan is of the compiled step. UNet calls are those that the
step counts itself, a sample and an update, next to the fewest that the method needs at the steps that were drawn
(`sides/training.py` derives them); fewer are possible where t_end = t_prev, which spares the target. Of a stage that
would not fit in memory and swap there is only what was compiled from shapes.

``--compile`` compiles every stage's step, whatever the cache of compiled programs holds, and runs none: CPU seconds of
all threads, and how many kernels XLA generates code for, each next to TSCD's.
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
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.sampling import Side
from benchmarks.sides.training import (
    CASES,
    COMPARED,
    COMPILE_ONLY,
    FAKE_UPDATES,
    GIB,
    SHAPES,
    UPDATE,
    find_case,
    status_bytes,
)

RESULTS = ROOT / "benchmarks" / "results" / "training_step"
PACKAGES = ("jax", "flax", "optax", "torch", "diffusers", "peft")
MEGABYTE = 1e6


def write_model(shape: str, models: Path) -> Path:
    """The model's folder; a family's is kept for later runs, and other benchmarks. The embedded model is there."""
    if shape == "embedded":
        return ROOT / "hypersd_jax" / "assets" / "teacher"
    if shape == "tiny":
        from tests.helpers.tiny_model import tiny_model

        return tiny_model(models / "tiny")
    folder = (models / f"{shape}-float32").resolve()
    writer = [sys.executable, "-m", "benchmarks.random_model", shape, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(writer, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    return folder


def run_case(name: str, model: Path, options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Measure one stage, and for TSCD the same on PyTorch."""
    latent = str(options.latent or SHAPES[options.shape].latent)
    remat, updates = "remat" if options.remat else "-", options.repeats + 1
    count = COMPILE_ONLY if options.compile else str(updates)
    settings = [options.shape, name, str(options.fake_updates), latent, remat, count]
    ours = Side("training_ours", sys.executable, [str(model), *settings, folder])
    theirs = [str(model), options.shape, remat, folder]
    if not ours.load["fits"]:
        ours.close()
        return ours.load
    if name != COMPARED:
        return summary(ours.load, take_turns([ours], updates)[0])
    if options.alone:
        found = take_turns([ours], updates)
        sides = [ours, Side("training_theirs", sys.executable, theirs)]
        found += take_turns(sides[1:], updates)
    else:
        sides = [ours, Side("training_theirs", sys.executable, theirs)]
        found = take_turns(sides, updates)
    own, other = (summary(side.load, answers) for side, answers in zip(sides, found, strict=True))
    return {**own, "pytorch": other, "compared": compare(own, other)}


def take_turns(sides: Sequence[Side], updates: int) -> list[list[dict[str, float]]]:
    """Every side's answers to as many updates, alternating; the sides have ended on return."""
    found: dict[str, list[dict[str, float]]] = {side.name: [] for side in sides}
    for number in range(updates):
        for side in sides[:: 1 if number % 2 else -1]:
            found[side.name].append(side.do(UPDATE))
    for side in sides:
        side.close()
    return list(found.values())


def summary(about: dict[str, Any], answers: list[dict[str, float]]) -> dict[str, Any]:
    """Summarise a side; the first update warms up and is not timed."""
    return {
        **about,
        "seconds": median(answer["seconds"] for answer in answers[1:]),
        "peak GiB": max(answer["peak GiB"] for answer in answers),
        "updates": answers,
    }


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Ratios, time and memory here over PyTorch's, and the largest relative differences over all updates."""
    if (ours["platform"], ours["dtype"]) != (theirs["platform"], theirs["dtype"]):
        sys.exit(f"{ours['platform']} in {ours['dtype']} here, {theirs['platform']} in {theirs['dtype']} there")
    pairs = list(zip(ours["updates"], theirs["updates"], strict=True))
    return {
        "ratio": {name: ours[name] / theirs[name] for name in ("seconds", "peak GiB")},
        "largest difference": {
            name: max(abs(a[name] - b[name]) / abs(b[name]) for a, b in pairs) for name in ("loss", "grad_norm")
        },
    }


def table(cases: dict[str, Any], fake_updates: int) -> str:
    """One row a stage, how the fewest calls come about, and the comparison."""
    lines = [
        "| stage | s an update | peak, GiB | XLA's plan, GiB | trainable, MB | optimizer, MB | frozen, MB"
        " | UNet calls | fewest | compile, s |",
        "|" + "---|" * 10,
    ]
    for name, case in cases.items():
        sizes = [f"{case['bytes'][part] / MEGABYTE:,.1f}" for part in ("trainable", "optimizer", "frozen")]
        plan = f"{sum(case['XLA GiB'].values()):.2f}"
        compiling = "before" if case["compiled before"] else f"{case['compile seconds']:.1f}"
        seconds, peak, calls = "not run", "", ["", ""]
        if case["fits"]:
            seconds, peak = f"{case['seconds']:.3g}", f"{case['peak GiB']:.2f}"
            calls = [f"{mean(update[part] for update in case['updates']):.2f}" for part in ("calls", "minimum")]
        lines.append(f"| {' | '.join([name, seconds, peak, plan, *sizes, *calls, compiling])} |")
    lines += ["", "The fewest calls, earlier steps at their mean:", ""]
    lines += [f"- {name}: {find_case(name, fake_updates).derivation()}" for name in cases]
    if COMPARED in cases and cases[COMPARED]["fits"]:
        lines += ["", *compared_table(cases[COMPARED])]
    return "\n".join(lines)


def compile_table(cases: dict[str, Any]) -> str:
    """One row a stage, ratios to TSCD's where that was compiled too."""
    lines = [
        "| stage | trace and lower, CPU s | compile, CPU s | of TSCD's | both | wall, s | kernels | of TSCD's |",
        "|" + "---|" * 8,
    ]
    parts = {
        "compile": lambda case: case["compile CPU seconds"],
        "both": lambda case: case["lowering CPU seconds"] + case["compile CPU seconds"],
        "kernels": lambda case: case["kernels"],
    }
    for name, case in cases.items():
        ratios = {
            part: f"{measure(case) / measure(cases[COMPARED]):.2f}" if COMPARED in cases else ""
            for part, measure in parts.items()
        }
        row = [
            f"{case['lowering CPU seconds']:.1f}",
            f"{case['compile CPU seconds']:.1f}",
            ratios["compile"],
            ratios["both"],
            f"{case['compile seconds']:.1f}",
            f"{case['kernels']:,}",
            ratios["kernels"],
        ]
        lines.append(f"| {' | '.join([name, *row])} |")
    return "\n".join(lines)


def compared_table(case: dict[str, Any]) -> list[str]:
    """TSCD's step here and on PyTorch."""
    theirs, compared = case["pytorch"], case["compared"]
    lines = ["| TSCD step | here | diffusers + PEFT | ratio |", "|---|---|---|---|"]
    for name, label in (("seconds", "s an update"), ("peak GiB", "peak memory, GiB")):
        lines.append(f"| {label} | {case[name]:.3g} | {theirs[name]:.3g} | {compared['ratio'][name]:.2f} |")
    differences = ", ".join(f"{name} {value:.1e}" for name, value in compared["largest difference"].items())
    return [*lines, "", f"Largest relative difference over {len(case['updates'])} updates: {differences}."]


def settings(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "shape": options.shape,
        "latent": options.latent or SHAPES[options.shape].latent,
        "remat": options.remat,
        "fake_updates": options.fake_updates,
        "repeats": options.repeats,
        "alone": options.alone,
        "compile": options.compile,
        "cores": os.cpu_count(),
        "swap GiB": swap(),
        "machine": platform.machine(),
        "date": datetime.date.today().isoformat(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def swap() -> float:
    """Swap of the machine, GiB; a step that needs it waits for the disk."""
    there = Path("/proc/meminfo").exists()
    return round(status_bytes("/proc/meminfo", "SwapTotal") / GIB, 1) if there else 0.0


def write(result: dict[str, Any], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    about, some = result["settings"], next(iter(result["cases"].values()))
    remat = "recomputed" if about["remat"] else "kept"
    cores = f"{about['cores']} cores" + (f" and {about['swap GiB']:g} GiB of swap" if about["swap GiB"] else "")
    title = (
        f"# Training steps: {about['shape']}, latents {about['latent']} x {about['latent']}, batch 1, {some['dtype']} "
        f"on {some['device']}, {cores}, activations {remat}"
    )
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    if about["compile"]:
        updates = f"{about['fake_updates']} updates of the fake model to one of the student"
        rows = compile_table(result["cases"])
        text = f"{title}, compiled alone\n\n{versions}; {about['date']}; {updates}\n\n{rows}\n"
    else:
        rows = table(result["cases"], about["fake_updates"])
        text = f"{title}\n\n{versions}; {about['date']}; medians of {about['repeats']}\n\n{rows}\n"
    output.with_suffix(".md").write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="sd15")
    parser.add_argument("--latent", type=int, help="side of the latents; default: the shape's own")
    parser.add_argument("--repeats", type=int, default=3, help="timed updates, after one that warms up")
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=list(CASES), metavar="STAGE")
    parser.add_argument(
        "--fake-updates", type=int, default=FAKE_UPDATES, help="of DMD's fake model to one of the student"
    )
    parser.add_argument("--remat", action="store_true", help="recompute activations, on both sides")
    parser.add_argument("--alone", action="store_true", help="one side at a time, where both do not fit in memory")
    parser.add_argument("--compile", action="store_true", help="compile alone")
    parser.add_argument("--models", type=Path, default=ROOT / "outputs/benchmark-models", help="where they are kept")
    parser.add_argument("--output", type=Path, help="a JSON file; a Markdown table is written with it")
    options = parser.parse_args(arguments)
    if options.repeats < 1 or options.fake_updates < 1:
        parser.error("--repeats and --fake-updates must be at least 1")

    kind = ("-remat" if options.remat else "") + ("-compile" if options.compile else "")
    output = options.output or RESULTS / f"{options.shape}{kind}.json"
    result: dict[str, Any] = {"settings": settings(options), "cases": {}}
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(options.shape, Path(folder) if options.shape == "tiny" else options.models)
        for name in options.cases:
            result["cases"][name] = run_case(name, model, options, folder)
            write(result, output)  # after each, since a later one may not fit in memory
            print(f"{name}: done", file=sys.stderr)
    print(compile_table(result["cases"]) if options.compile else table(result["cases"], options.fake_updates))


if __name__ == "__main__":
    main()
