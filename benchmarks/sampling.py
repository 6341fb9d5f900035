"""Sampling here against diffusers on PyTorch, interleaved in one run: ``python benchmarks/sampling.py --family sd15``.

Both load the same folder of random weights under its real names, each in a process of its own (``--ours-python`` names
another interpreter for this package's side), and alternate: text encoding, text and one UNet call, decoding, a whole
one-step image. Printed are medians and ratios, time here over PyTorch's; so are loading, the first image with
an empty compile cache, the first image of a second process, and peak memory after full images.
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
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
PARTS = ("image", "text", "text+unet", "decode")


class Side:
    """A process that answers what each piece of work took."""

    def __init__(self, name: str, python: str, arguments: list[str]) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [python, "-m", f"benchmarks.sides.{name}", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self.load = self._answer()

    def do(self, part: str) -> dict[str, float]:
        assert self.process.stdin is not None
        print(part, file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ended with status {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(options: argparse.Namespace, model: Path, cache: str) -> dict[str, Any]:
    arguments = [str(model), options.dtype, str(options.size), cache]
    ours = Side("ours", options.ours_python, arguments)
    result: dict[str, Any] = {"load": {"ours": ours.load["seconds"]}}
    result["first image"] = {"ours": ours.do("image")["seconds"]}
    if options.alone:
        ours.close()  # both would not fit in memory
        sides = [Side("theirs", sys.executable, arguments)]
    else:
        sides = [ours, Side("theirs", sys.executable, arguments)]
    theirs = sides[-1]
    result["load"]["theirs"] = theirs.load["seconds"]
    result["first image"]["theirs"] = theirs.do("image")["seconds"]

    times: dict[str, dict[str, list[float]]] = {part: {"ours": [], "theirs": []} for part in PARTS}

    def rounds(present: list[Side]) -> None:
        for number in range(options.rounds + 1):
            for part in PARTS:
                for side in present[:: 1 if number % 2 else -1]:
                    found = side.do(part)
                    if number:  # the first round compiles and warms
                        times[part][side.name].append(found["seconds"])
                    elif part == "image":
                        result.setdefault("peak GiB", {})[side.name] = found["peak_gib"]

    rounds(sides)
    for side in sides:
        side.close()
    again = Side("ours", options.ours_python, arguments)
    result["second process"] = {"load": again.load["seconds"], "first image": again.do("image")["seconds"]}
    if options.alone:
        rounds([again])
    again.close()
    result["seconds"] = {part: {side: median(found) for side, found in both.items()} for part, both in times.items()}
    for side in ("ours", "theirs"):
        result["seconds"].setdefault("unet", {})[side] = (
            result["seconds"]["text+unet"][side] - result["seconds"]["text"][side]
        )
    result["all seconds"] = times
    return result


def table(result: dict[str, Any]) -> str:
    lines = ["| part | here, s | PyTorch, s | ratio |", "|---|---|---|---|"]
    rows = {part: result["seconds"][part] for part in ("text", "unet", "decode", "image")}
    rows |= {"load": result["load"], "first image": result["first image"]}
    for name, both in rows.items():
        lines.append(f"| {name} | {both['ours']:.2f} | {both['theirs']:.2f} | {both['ours'] / both['theirs']:.2f} |")
    peak = result["peak GiB"]
    lines.append(
        f"| peak memory, GiB | {peak['ours']:.2f} | {peak['theirs']:.2f} | {peak['ours'] / peak['theirs']:.2f} |"
    )
    second, warm = result["second process"], result["seconds"]["image"]["ours"]
    lines.append("")
    lines.append(
        f"Second process: loading {second['load']:.1f} s, then the first image in {second['first image']:.1f} s,"
        f" {second['first image'] / warm:.2f} times a warm one."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("sd15", "sdxl"), default="sd15")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--size", type=int, default=512, help="height and width in pixels")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", type=Path, default=Path("outputs/benchmark-models"), help="where they are kept")
    parser.add_argument("--ours-python", default=sys.executable)
    parser.add_argument("--alone", action="store_true", help="one side at a time, where both do not fit in memory")
    parser.add_argument("--output", type=Path, help="a JSON file; a Markdown table is written with it")
    options = parser.parse_args()

    model = (options.models / f"{options.family}-{options.dtype}").resolve()
    writer = [sys.executable, "-m", "benchmarks.random_model", options.family, str(model), "--dtype", options.dtype]
    subprocess.run(writer, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    with tempfile.TemporaryDirectory() as cache:
        result = measure(options, model, cache)
    probe = "import jax, platform; print(jax.__version__, 'on Python', platform.python_version())"
    ours = subprocess.run([options.ours_python, "-c", probe], check=True, capture_output=True, text=True).stdout.strip()
    result["versions"] = {"jax": ours, "torch": version("torch"), "diffusers": version("diffusers")}
    result["settings"] = {
        "family": options.family,
        "dtype": options.dtype,
        "size": options.size,
        "rounds": options.rounds,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "date": datetime.date.today().isoformat(),
    }
    text = table(result)
    print(text)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        title = f"# {options.family}, {options.size} px, batch 1, {options.dtype}, {os.cpu_count()} cores"
        versions = f"jax {ours}; torch {version('torch')}, diffusers {version('diffusers')}; {datetime.date.today()}"
        options.output.with_suffix(".md").write_text(f"{title}\n\n{versions}\n\n{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
