"""Run the tests of `tests/gpu`, and write a row as each of them ends."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.rows import Rows

ROOT = Path(__file__).parents[2]
VARIABLE = "HYPERSD_GPU_TESTS"
"""Tells `tests/conftest.py` on what the tests of `tests/gpu` run: ``gpu``, or ``cpu`` in its place."""


def run_tests(rows: Rows, *, tiny: bool) -> None:
    """Run them, on a CPU where ``tiny``; the process ends with pytest's status."""
    os.environ[VARIABLE] = "cpu" if tiny else "gpu"
    import pytest

    folder = ROOT / "tests" / "gpu"
    status = pytest.main(["-q", "-m", "gpu", "-p", "no:cacheprovider", str(folder)], plugins=[_Recorder(rows)])
    sys.exit(int(status))


class _Recorder:
    """A pytest plugin that reports the outcome of each test."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Write a test's outcome, also where its preparation has skipped or failed it."""
        if report.when != "call" and report.outcome == "passed":
            return
        reason = ""
        if report.outcome != "passed":
            skipped = report.longrepr[2] if isinstance(report.longrepr, tuple) else None
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = str(skipped or (crash.message if crash else report.longrepr))[:500]
        self._rows.add(
            "test",
            test=report.nodeid.partition("::")[2],
            outcome=report.outcome,
            seconds=report.duration,
            reason=reason,
        )
