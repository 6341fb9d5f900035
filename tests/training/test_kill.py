"""A run that is killed without warning, at a random moment, ends where an undisturbed one ends."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks.kill_test import moments

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


def kill_after(victim: subprocess.Popen, last: int, delay: float) -> None:
    """SIGKILL some time after step ``last``: somewhere in the next step, its log line or its save."""
    for line in victim.stdout:
        if line.split() == ["step", str(last)]:
            break
    time.sleep(delay)
    victim.kill()


def kill_in_save(victim: subprocess.Popen, checkpoints: Path, last: int) -> list[str]:
    """SIGKILL with a checkpoint half written; returns what of it is there."""
    for line in victim.stdout:
        if line.split() == ["step", str(last)]:
            break
    while victim.poll() is None:
        # Stopped first, so that what is seen is still so when the process dies.
        victim.send_signal(signal.SIGSTOP)
        found = [path.name for path in checkpoints.glob("*.orbax-checkpoint-tmp*")]
        if found:
            victim.kill()
            return found
        victim.send_signal(signal.SIGCONT)
        time.sleep(0.001)
    return []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kill") / "undisturbed"
    assert finish(start(folder)) == 0
    return folder


@pytest.mark.parametrize("moment", ["after a step", "in a save"])
def test_a_killed_run_resumes_bit_for_bit(undisturbed: Path, moment: str) -> None:
    killed = undisturbed.parent / moment.replace(" ", "-")
    draw = random.Random(1)
    victim = start(killed)
    last = draw.randint(2, STEPS - 3)
    if moment == "in a save":
        assert kill_in_save(victim, killed / "checkpoints", last)
    else:
        kill_after(victim, last, draw.uniform(0.0, 0.05))
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


def test_the_moments_of_the_longer_test() -> None:
    """`benchmarks/kill_test.py`: in order, inside the run, of every kind, the same for a seed."""
    found = moments(30, 120, 5.0, random.Random(0))
    assert found == moments(30, 120, 5.0, random.Random(0)) != moments(30, 120, 5.0, random.Random(1))
    assert Counter(moment.kind for moment in found) == {"save": 10, "update": 14, "start": 3, "export": 3}
    updates = [moment.update for moment in found]
    assert updates == sorted(updates)
    assert 0 < updates[0] <= updates[-1] < 4 * 120
