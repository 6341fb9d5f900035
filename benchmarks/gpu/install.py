"""The environment that the benchmark makes where it is given none: this package with CUDA, and PyTorch's side."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "outputs" / "gpu-venv"
EXTRAS = ("cuda,test", "cuda,test-core")
"""What is installed, the first that can be: with PyTorch and diffusers, or without."""
NEEDED = "import jax, pytest, hypersd_jax"


@dataclass(frozen=True, kw_only=True)
class Made:
    """The environment's interpreter, and the row that says how it came about."""

    python: str
    row: dict[str, Any]


def make(log: Path, *, limit: float) -> Made:
    """Make the environment in `FOLDER` within ``limit`` seconds, or use the one that an earlier run has left there."""
    begin, python = time.monotonic(), str(FOLDER / "bin" / "python")

    def made(status: str, reason: str) -> Made:
        return Made(python=python, row={"status": status, "seconds": time.monotonic() - begin, "reason": reason})

    if _works(python):
        return made("done", f"the one in {FOLDER.relative_to(ROOT)}")
    reason = ""
    with log.open("ab") as file:
        for extras in EXTRAS:
            for command in (
                [sys.executable, "-m", "venv", str(FOLDER)],
                [python, "-m", "pip", "install", "-q", "-e", f"{ROOT}[{extras}]"],
            ):
                left = begin + limit - time.monotonic()
                if left <= 0:
                    return made("out of time", f"cut off after {limit:.0f} s")
                try:
                    done = subprocess.run(command, stdout=file, stderr=file, timeout=left, cwd=ROOT, env={**os.environ})
                except (OSError, subprocess.TimeoutExpired) as error:
                    reason = str(error)[:300]
                    break
                if done.returncode:
                    reason = f"{' '.join(command)} ended with status {done.returncode}"
                    break
            else:
                return made("done", "" if extras == EXTRAS[0] else f"without PyTorch's side: {reason}")
    return made("failed", reason)


def _works(python: str) -> bool:
    """Whether an environment has what the parts import."""
    if not Path(python).exists():
        return False
    return subprocess.run([python, "-c", NEEDED], capture_output=True, cwd=ROOT).returncode == 0
