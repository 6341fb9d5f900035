"""What one process knows, all of them hear at the same call, `LAG` calls later."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from hypersd_jax.training import LAG, Agreement

ROOT = Path(__file__).parents[2]


def test_one_process_agrees_with_itself_at_once():
    assert Agreement().largest(15, 1) == (15, 1)


def test_two_processes_hear_the_same():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.training.scripts.agree"]
    settings: dict[str, Any] = {"cwd": ROOT, "env": {**os.environ, "JAX_PLATFORMS": "cpu"}, "stdout": subprocess.PIPE}
    processes = [subprocess.Popen([*command, str(number), str(port)], text=True, **settings) for number in (0, 1)]
    heard = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    for lines in heard:
        assert [line for line in lines if line[0].isdigit()] == [*["0 0"] * (LAG + 1), "15 0", "15 1"]
