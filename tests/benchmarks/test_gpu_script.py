"""`benchmarks/gpu.sh` at tiny shapes on the CPU: every part runs, and leaves its rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.rows import Row, read_rows
from benchmarks.gpu.work import BATCHES, SIDES, STEPS

ROOT = Path(__file__).parents[2]


def script(out: Path, parts: str = "") -> list[Row]:
    variables = {"OUT": str(out), "GPU_TINY": "1", "GPU_SECONDS": "1500", "GPU_PARTS": parts, "PYTHON": sys.executable}
    done = subprocess.run(["bash", "benchmarks/gpu.sh"], cwd=ROOT, env={**os.environ, **variables}, timeout=1600)
    assert done.returncode == 0, (out / "log.txt").read_text()[-3000:]
    return read_rows(out)


def test_some_parts(tmp_path: Path) -> None:
    rows = script(tmp_path, "environment attention")
    assert [row["status"] for row in rows if row["kind"] == "part"] == ["done", "done"]
    assert [row["good"] for row in rows if row["kind"] == "attention"] == [True, True]
    about = json.loads((tmp_path / "environment.json").read_text())
    assert about["device"]["platform"] == "cpu"
    assert "jax" in about["versions"]
    assert "measures nothing" in (tmp_path / "README.md").read_text()


def test_every_part(tmp_path: Path) -> None:
    for name in ("torch", "diffusers"):
        pytest.importorskip(name)
    rows = script(tmp_path)
    assert {row["part"]: row["status"] for row in rows if row["kind"] == "part"} == {
        part.name: "done" for part in PARTS
    }
    kinds = Counter((row["part"], row["kind"]) for row in rows)
    pieces = len(BATCHES) * (3 + len(STEPS))
    for family in ("sd15", "sdxl"):
        assert kinds[family, "sampling"] == kinds[f"{family}-torch", "sampling"] == pieces
        assert kinds[family, "program"] == len(BATCHES) * 4  # text, a call of the UNet, the decoder, a step
    for part in PARTS:
        if part.arguments[0] == "train":
            assert kinds[part.name, "training"] == kinds[part.name, "program"] == 1
    assert not [row for row in rows if row["kind"] == "sampling" and "error" in row]
    assert {row["side"] for row in rows if row["kind"] == "sampling"} == {*SIDES}
    outcomes = Counter(row["outcome"] for row in rows if row["kind"] == "test")
    assert outcomes["passed"] >= 13
    assert not outcomes["failed"]
    page = (tmp_path / "README.md").read_text()
    for title in ("Tests", "Sampling", "Training steps", "Kernels", "Attention"):
        assert f"\n## {title}\n" in page
