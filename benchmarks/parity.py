"""The parity tests with what they measured: ``python benchmarks/parity.py [--output benchmarks/results/parity]``.

Runs tests/parity and keeps every comparison that a test makes: its largest relative error, by file and test. A
comparison of arrays that must be equal counts as 0. No test tolerates more than `TOLERATED`, so what passes with more
is a check that something makes a difference, a LoRA or a mask; those are counted apart. Written are a table by subject
and, as JSON, one row for each test.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import pytest

TOLERATED = 1e-3

SUBJECTS = {
    "Networks": (
        "unet",
        "vae",
        "vae_tiny",
        "clip_text",
        "clip_vision",
        "controlnet",
        "lite0",
        "tiling",
        "long_prompts",
    ),
    "Solvers": ("solvers", "solvers_levels", "solvers_parts"),
    "Files": ("folder_roundtrip", "single_file", "vae_file", "controlnet_file", "lora_files"),
    "Pipelines": ("pipeline", "pipeline_loras", "lora_images", "image_pipelines", "control_pipelines", "score_exports"),
    "Rewards": ("clip_score", "heads", "rewards", "convert_reward"),
}
PACKAGES = ("jax", "flax", "torch", "diffusers", "transformers", "peft", "numpy")


class Recorder:
    """A pytest plugin that listens to the tests' own comparisons."""

    def __init__(self) -> None:
        self.test = ""
        self.errors: dict[str, list[float]] = {}
        self.outcomes: dict[str, str] = {}

    def listen(self) -> None:
        """Wrap what the tests compare with; must come before they import it."""
        from tests.helpers import solver_runs, torch_weights

        for module, name in ((torch_weights, "relative_error"), (solver_runs, "error")):
            setattr(module, name, self._recorded(getattr(module, name)))
        for name in ("assert_allclose", "assert_array_equal"):
            setattr(np.testing, name, self._compared(getattr(np.testing, name)))

    def _recorded(self, measure: Callable[..., float]) -> Callable[..., float]:
        def wrapped(*args: Any, **kwargs: Any) -> float:
            found = measure(*args, **kwargs)
            self.errors.setdefault(self.test, []).append(float(found))
            return found

        return wrapped

    def _compared(self, check: Callable[..., None]) -> Callable[..., None]:
        def wrapped(actual: Any, desired: Any, *args: Any, **kwargs: Any) -> None:
            check(actual, desired, *args, **kwargs)
            a, b = np.asarray(actual), np.asarray(desired)
            if a.dtype.kind in "fiu" and b.dtype.kind in "fiu" and b.size:
                a, b = a.astype(np.float64), b.astype(np.float64)
                difference = float(np.linalg.norm(np.nan_to_num(a - b)) / max(float(np.linalg.norm(b)), 1e-30))
                self.errors.setdefault(self.test, []).append(difference)

        return wrapped

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.test = nodeid

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome


def rows(recorder: Recorder) -> list[dict[str, Any]]:
    found = []
    for test, outcome in sorted(recorder.outcomes.items()):
        errors = recorder.errors.get(test, [])
        compared = [error for error in errors if outcome != "passed" or error <= TOLERATED]
        found.append(
            {
                "test": test.removeprefix("tests/parity/"),
                "outcome": outcome,
                "comparisons": len(compared),
                "differences": len(errors) - len(compared),
                "largest": max(compared, default=0.0),
            }
        )
    return found


def table(found: list[dict[str, Any]]) -> str:
    lines = [
        "| subject | file | tests | comparisons | largest relative error | differences |",
        "|---|---|---|---|---|---|",
    ]
    files: dict[str, list[dict[str, Any]]] = {}
    for row in found:
        files.setdefault(row["test"].split("::")[0].removeprefix("test_").removesuffix(".py"), []).append(row)
    subjects = {file: subject for subject, names in SUBJECTS.items() for file in names}
    order = list(subjects)
    for file in sorted(files, key=lambda name: (order.index(name) if name in order else len(order), name)):
        tests = files[file]
        failed = sum(row["outcome"] == "failed" for row in tests)
        count = f"{len(tests)}" + (f", {failed} failed" if failed else "")
        comparisons = sum(row["comparisons"] for row in tests)
        apart = sum(row["differences"] for row in tests)
        worst = max(row["largest"] for row in tests)
        lines.append(f"| {subjects.get(file, 'Other')} | {file} | {count} | {comparisons} | {worst:.1e} | {apart} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "parity")
    parser.add_argument("tests", nargs="*", default=["tests/parity"])
    options = parser.parse_args()
    recorder = Recorder()
    recorder.listen()
    status = pytest.main(["-q", "--rootdir", str(ROOT), "-m", "slow or not slow", *options.tests], plugins=[recorder])
    found = rows(recorder)
    versions = {name: version(name) for name in PACKAGES}
    text = table(found)
    print(text)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    content = {"date": datetime.date.today().isoformat(), "versions": versions, "tests": found}
    options.output.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    head = f"# Parity with PyTorch, float32, on a CPU\n\n{datetime.date.today()}; " + ", ".join(
        f"{name} {number}" for name, number in versions.items()
    )
    note = (
        "Relative errors are L2 norms of the difference over that of the original's value, for the solvers largest"
        " difference over largest value; 0 where arrays are equal. Differences: checks that a LoRA, a mask or an image"
        " changes something, by more than any tolerance."
        " Which comparison of which test is in the JSON file of this name. `python benchmarks/parity.py` makes both."
    )
    options.output.with_suffix(".md").write_text(f"{head}\n\n{note}\n\n{text}\n", encoding="utf-8")
    sys.exit(int(status))


if __name__ == "__main__":
    main()
