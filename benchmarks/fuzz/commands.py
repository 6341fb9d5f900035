"""Mutated files at the shell: exit status 0 or 2, one line where it is 2, and nothing half-written."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.fuzz import bases
from benchmarks.fuzz.samples import Sample
from benchmarks.fuzz.verdicts import mutate

ROOT = Path(__file__).parents[2]
SECONDS = 300
SMALL = ("--steps", "1", "--height", "32", "--width", "32")


def run_commands(every: list[Sample], seed: int, count: int) -> Iterator[tuple[str, str, str]]:
    """(kind and mutation, "refused" | "done" | "wrong", what was printed) of `count` commands, kinds in turn."""
    kinds = [sample.kind for sample in every if sample.group]
    with tempfile.TemporaryDirectory() as name:
        models = {kind: bases.write(Path(name) / kind, bases.model_files(kind)) for kind in bases.MODELS}
        for number in range(count):
            mutated = mutate(every, seed, number, kinds[number % len(kinds)])
            with tempfile.TemporaryDirectory() as temporary:
                folder, out = Path(temporary) / "in", Path(temporary) / "out"
                out.mkdir()
                bases.write(folder, {**mutated.sample.files, **mutated.changed})
                source = str(folder / mutated.sample.target)
                if mutated.sample.group == "lora":
                    target = out / "lora.safetensors"
                    model = str(models[mutated.sample.base])
                    words = ["convert", "lora", source, str(target), "--to", "peft", "--base", model]
                else:
                    target = out / "image.png"
                    words = ["sample", "--model", source, "--prompt", "red apple", *SMALL, "--output", str(target)]
                outcome, printed = _run(words, target)
                printed = printed.replace(temporary, "TMP").replace(str(ROOT), "ROOT")
                yield f"{mutated.sample.kind} ({mutated.mutation})", outcome, printed


def _run(words: list[str], target: Path) -> tuple[str, str]:
    command = [sys.executable, "-m", "hypersd_jax", *words]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, errors="replace")
    except subprocess.TimeoutExpired:
        return "wrong", f"more than {SECONDS} s"
    lines = [line for line in done.stderr.splitlines() if not line.startswith("hypersd: warning:")]
    left = sorted(path.name for path in target.parent.iterdir())
    if done.returncode == 0 and left == [target.name]:
        return "done", ""
    if done.returncode == 2 and len(lines) == 1 and not left:
        return "refused", lines[0]
    return "wrong", f"exit status {done.returncode}, left {left}: {done.stderr[-2000:]}"
