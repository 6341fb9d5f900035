"""Tests that a change does not wait for: ``python benchmarks/slow_tests.py`` writes benchmarks/results/slow_tests.*.

They are those of tests/slow.txt. The table has each test's seconds and whether it passed; the exit status is pytest's.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import jax

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "slow_tests"
COMMAND = [sys.executable, "-m", "pytest", "-m", "slow", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]


def outcome(case: ElementTree.Element) -> str:
    """What became of a test."""
    failed = any(case.find(kind) is not None for kind in ("failure", "error"))
    return "failed" if failed else "skipped" if case.find("skipped") is not None else "passed"


def main() -> None:
    """Run them, write the table, and exit as pytest does."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        status = subprocess.run([*COMMAND, f"--junitxml={report}"], cwd=ROOT).returncode
        if not report.exists():
            sys.exit(status)
        cases = list(ElementTree.parse(report).iter("testcase"))
    rows = [
        {
            "test": f"{case.get('classname', '')}::{case.get('name', '')}",
            "seconds": round(float(case.get("time", 0)), 1),
            "outcome": outcome(case),
        }
        for case in sorted(cases, key=lambda case: -float(case.get("time", 0)))
    ]
    counts = {kind: sum(row["outcome"] == kind for row in rows) for kind in ("passed", "failed", "skipped")}
    made = f"{datetime.date.today()}, jax {jax.__version__}, {os.cpu_count()} CPU cores"
    RESULT.with_suffix(".json").write_text(json.dumps({"made": made, **counts, "tests": rows}, indent=1) + "\n")
    table = "".join(f"| {row['test']} | {row['seconds']:.1f} | {row['outcome']} |\n" for row in rows)
    head = (
        f"# Slow tests\n\n`python benchmarks/slow_tests.py`, {made}: {counts}.\n\n| test | seconds | |\n|---|---|---|\n"
    )
    RESULT.with_suffix(".md").write_text(head + table)
    sys.exit(status)


if __name__ == "__main__":
    main()
