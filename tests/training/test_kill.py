"""A run that is killed without warning, at a random moment, ends where an undisturbed one ends."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
STEPS = 12


def start(folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.training.scripts.killed", str(folder)]
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | cache, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> int:
    """Let it run to its end; returns the step that it started from."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-4000:]
    return int(out.split()[1])


def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert finish(start(undisturbed)) == 0

    draw = random.Random(1)
    victim = start(killed)
    last = draw.randint(2, STEPS - 3)
    for line in victim.stdout:
        if line.split() == ["step", str(last)]:
            break
    time.sleep(draw.uniform(0.0, 0.05))  # somewhere in the next step, its log line or its save
    victim.kill()
    victim.communicate()
    assert victim.returncode < 0, "the run ended before it could be killed"
    assert not (killed / "final.npz").exists()

    # When `step N` is printed, N's save may still be on its way, but N-1's is whole.
    assert finish(start(killed)) >= last - 1
    with np.load(undisturbed / "final.npz") as wanted, np.load(killed / "final.npz") as found:
        assert wanted.files == found.files
        for name in wanted.files:
            np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)

    logs = [[json.loads(line) for line in (run / "metrics.jsonl").open()] for run in (undisturbed, killed)]
    for log in logs:
        assert [line["step"] for line in log] == list(range(1, STEPS + 1))
    for wanted, found in zip(*logs, strict=True):
        assert wanted | {"seconds": 0} == found | {"seconds": 0}
    assert len(list((killed / "checkpoints").iterdir())) == 2
