"""What `benchmarks/kill_test.py --processes N` makes of processes that lost one of theirs."""

from __future__ import annotations

import random
import subprocess
import sys
import time

import pytest

from benchmarks.kill_test import KINDS, moments
from benchmarks.killing import others

UNHEALTHY = """UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):
1
12
The tasks have crashed."""
LEADER = "Failed to send RPC to coordination service. Either the leader task was preempted/died/restarted unexpectedly"
BARRIER = "# of tasks that reached the barrier: 1/2.\nThe first task at the barrier: 0. Some timed out task names:\n1\n"


@pytest.mark.parametrize(
    ("printed", "named"),
    [(UNHEALTHY, {1, 12}), (LEADER, {0}), (BARRIER, {1}), ("Traceback (most recent call last):\n1\n", set())],
)
def test_who_is_named(printed, named):
    assert {number for number in (0, 1, 2, 12) if others.names(printed, number)} == named


def test_the_one_to_kill_is_drawn_and_the_moments_stay():
    alone, together = (moments(30, 120, 5.0, random.Random(0), processes) for processes in (1, 3))
    assert {moment.process for moment in alone} == {0}
    assert {moment.process for moment in together} == {0, 1, 2}
    assert [(moment.kind, moment.update) for moment in alone] == [(moment.kind, moment.update) for moment in together]


class Printed:
    def printed(self, number: int) -> str:
        return UNHEALTHY if number == 0 else ""


def test_a_process_that_goes_on_is_hung(monkeypatch):
    """As is one that ends as if all were well; both are ended, and counted as one time."""
    monkeypatch.setattr(others, "PATIENCE_SECONDS", 3.0)
    programs = ("raise SystemExit(1)", "", "pass", "import time; time.sleep(60)")
    processes = [subprocess.Popen([sys.executable, "-c", program]) for program in programs]
    found = others.watch(Printed(), processes, 1, time.monotonic())
    assert processes[3].returncode < 0
    processes[1].wait()
    assert [other["process"] for other in found] == [0, 2, 3]
    assert [others.is_hung(other) for other in found] == [False, True, True]
    assert [other["names"] for other in found] == [True, False, False]
    kill = {"kind": "save", "logged": 7, "saved": 5, "save_in_flight": True, "process": 1, "others": found, "lost": 0}
    assert others.failures([kill]) == ["1 times others did not end by themselves within 3 s"]
    assert others.failures([{**kill, "others": found[:1], "lost": 5}]) == ["5 saved updates were lost"]
    assert "| in a save | 1 | 0 | 1 | 2.0 |" in others.table([kill], KINDS)[2]
