"""Every loader under mutated files: ``python benchmarks/fuzz_loaders.py``; writes benchmarks/results/fuzz_loaders.*.

A small sound file of each kind gets one thing or two wrong, by a seed, and is loaded in this process. Right is a
`UserError`, which the command line turns into exit status 2, or, where the change did no harm, a load whose arrays have
the shapes of the network and finite values. Wrong is any other exception, more than 5 s, and memory beyond twice the
files and 64 MB. A sample also goes through the command line itself. ``--start N --files 1`` repeats file N of a seed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tqdm import tqdm

from benchmarks.fuzz import bases
from benchmarks.fuzz.commands import run_commands
from benchmarks.fuzz.report import report
from benchmarks.fuzz.samples import Sample, samples
from benchmarks.fuzz.verdicts import Mutated, Verdict, guard_memory, mutate, placed, tidy, verdict_of

RESULT = ROOT / "benchmarks" / "results" / "fuzz_loaders"
PACKAGES = ("jax", "flax", "numpy", "safetensors", "transformers", "tokenizers")
MEMORY = "/dev/shm"
"""A folder in memory, where there is one: most of the time would go into the disk."""

KEPT = 3
"""Inputs that are kept of each thing that goes wrong."""


class Tally:
    """Counts by kind, and what went wrong."""

    def __init__(self, keep: Path) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self.wrong: Counter[str] = Counter()
        self.first: dict[str, dict[str, Any]] = {}
        self.keep = keep

    def add(self, mutated: Mutated, verdict: Verdict) -> None:
        fresh = {"files": 0, "refused": 0, "loaded": 0, "wrong": 0, "slowest_ms": 0.0, "largest_mb": 0.0}
        row = self.rows.setdefault(mutated.sample.kind, fresh)
        row["files"] += 1
        row[verdict.outcome] += 1
        row["slowest_ms"] = round(max(row["slowest_ms"], 1e3 * verdict.seconds), 1)
        row["largest_mb"] = round(max(row["largest_mb"], verdict.memory / 2**20), 1)
        if verdict.outcome == "wrong":
            self.wrong[verdict.reason] += 1
            self.first.setdefault(verdict.reason, {"file": mutated.number, "mutation": mutated.mutation})
            if self.wrong[verdict.reason] <= KEPT:
                self._keep(mutated, verdict)

    def _keep(self, mutated: Mutated, verdict: Verdict) -> None:
        folder = bases.write(self.keep / str(mutated.number), {**mutated.sample.files, **mutated.changed})
        about = f"{mutated.sample.kind}\n{mutated.mutation}\n{verdict.reason}\n{verdict.trace}"
        (folder / "wrong.txt").write_text(about, encoding="utf-8", errors="backslashreplace")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000, metavar="N")
    parser.add_argument("--start", type=int, default=0, metavar="N", help="number of the first file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", type=int, default=60, metavar="N", help="how many go through the command line")
    parser.add_argument(
        "--keep", type=Path, default=ROOT / "outputs" / "fuzz_wrong", help="folder for inputs that go wrong"
    )
    parser.add_argument("--results", type=Path, default=RESULT, help="table and JSON to write, without suffix")
    options = parser.parse_args()
    tally = Tally(options.keep)
    with bases.built_once(), tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as name:
        every = samples()
        folders = {sample.kind: bases.write(Path(name) / str(i), sample.files) for i, sample in enumerate(every)}
        _warm_up(every, folders)
        guard_memory()
        began = time.perf_counter()
        bar = tqdm(range(options.start, options.start + options.files), unit="file", smoothing=0.05, mininterval=1)
        for number in bar:
            mutated = mutate(every, options.seed, number)
            with placed(mutated, folders[mutated.sample.kind]) as path:
                tally.add(mutated, verdict_of(mutated, path))
            if number % 2000 == 0:
                tidy()
                bar.set_postfix(wrong=tally.wrong.total())
        seconds = time.perf_counter() - began
        commands = list(
            tqdm(run_commands(every, options.seed, options.commands), total=options.commands, unit="command")
        )
    content = {
        "command": "python benchmarks/fuzz_loaders.py"
        f" --files {options.files} --start {options.start} --seed {options.seed} --commands {options.commands}",
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "seed": options.seed,
        "files": options.files,
        "files_per_second": round(options.files / seconds),
        "kinds": dict(sorted(tally.rows.items())),
        "wrong": {reason: {"count": count, **tally.first[reason]} for reason, count in tally.wrong.most_common()},
        "commands": [{"what": what, "outcome": outcome, "printed": printed} for what, outcome, printed in commands],
    }
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    text = report(content)
    options.results.with_suffix(".md").write_text(text, encoding="utf-8", errors="backslashreplace")
    print(text)
    sys.exit(1 if tally.wrong or any(outcome == "wrong" for _, outcome, _ in commands) else 0)


def _warm_up(every: list[Sample], folders: dict[str, Path]) -> None:
    """Load what is sound, so that imports and compilation are charged to no file; an error here is ours."""
    for sample in every:
        sample.load(folders[sample.kind] / sample.target)


if __name__ == "__main__":
    main()
