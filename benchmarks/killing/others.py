"""What becomes of the other processes of a run when one is killed: when they end, and what they say."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.killing.runs import Run

PATIENCE_SECONDS = 60.0
"""Within which the others have to end by themselves."""

SAYINGS = (
    ("tasks are unhealthy", "names the processes that no longer answer"),
    ("Either the leader task", "says that process 0 cannot be reached"),
    ("did not meet the others", "says that it did not meet the others"),
    ("Traceback (most recent call last)", "ends with a Python error"),
)
"""Words on standard error, and what they mean; the first that fits counts."""


def watch(run: Run, processes: Sequence[subprocess.Popen], killed: int, since: float) -> list[dict[str, Any]]:
    """Wait for the others to end, and end those that hang.

    Args:
        run: whose processes they are.
        processes: all of them.
        killed: the number of the one that was killed.
        since: when, by the monotonic clock.

    Returns:
        for each of the others its ``process`` number, ``seconds`` from the kill to its end (None: it did not end by
        itself), ``status``, what it ``says``, and whether it ``names`` the killed one.
    """
    others = {number: process for number, process in enumerate(processes) if number != killed}
    seconds: dict[int, float] = {}
    while len(seconds) < len(others) and time.monotonic() - since < PATIENCE_SECONDS:
        for number, process in others.items():
            if number not in seconds and process.poll() is not None:
                seconds[number] = round(time.monotonic() - since, 2)
        time.sleep(0.01)
    found = []
    for number, process in others.items():
        process.kill()
        status, printed = process.wait(), run.printed(number)
        ended = {"process": number, "seconds": seconds.get(number), "status": status}
        found.append({**ended, "says": saying(printed), "names": names(printed, killed)})
    return found


def saying(text: str) -> str:
    """What a process that lost another one says, in a few words."""
    return next((meaning for words, meaning in SAYINGS if words in text), "says nothing of it")


def names(text: str, killed: int) -> bool:
    """Whether what a process printed tells which one is missing."""
    if killed == 0 and "Either the leader task" in text:
        return True
    lists = re.findall(r"(?:tasks are unhealthy[^\n]*|timed out task names:)\n((?:\S*\d\n)+)", text)
    return any(str(killed) in re.findall(r"(\d+)\n", found) for found in lists)


def is_hung(other: dict[str, Any]) -> bool:
    """Whether a process did not end by itself, or as if all were well."""
    return other["seconds"] is None or other["status"] == 0


def counts(kills: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of all kills: how often the run resumed, what was lost, how often others hung, how long they took at most."""
    waits = [other["seconds"] for kill in kills for other in kill["others"] if other["seconds"] is not None]
    return {
        "kills": len(kills),
        "resumed": sum(not kill["lost"] for kill in kills),
        "lost": sum(kill["lost"] for kill in kills),
        "hung": sum(any(map(is_hung, kill["others"])) for kill in kills),
        "longest_wait": max(waits, default=None),
    }


def summary(kills: Sequence[dict[str, Any]]) -> str:
    """The counts as a line of text."""
    found = counts(kills)
    return (
        f"{found['kills']} kills, resumed {found['resumed']} times, saved updates lost: {found['lost']}. Others "
        f"that did not end by themselves: {found['hung']} times; longest time to their end: {found['longest_wait']} s."
    )


def failures(kills: Sequence[dict[str, Any]]) -> list[str]:
    """What must not be, one line each."""
    found = counts(kills)
    wrong = [f"{found['lost']} saved updates were lost"] if found["lost"] else []
    if found["hung"]:
        wrong.append(f"{found['hung']} times others did not end by themselves within {PATIENCE_SECONDS:.0f} s")
    return wrong


def table(kills: Sequence[dict[str, Any]], kinds: dict[str, str]) -> list[str]:
    """Lines of two Markdown tables: the kills by their moment (``kinds``: in words), and what the others say."""
    lines = ["| killed | times | of them process 0 | with a checkpoint half written | updates done again, mean |"]
    lines[0] += " the others end after, mean | at most |"
    lines.append("|---" * 7 + "|")
    for kind in dict.fromkeys(kill["kind"] for kill in kills):
        own = [kill for kill in kills if kill["kind"] == kind]
        waits = [other["seconds"] for kill in own for other in kill["others"] if other["seconds"] is not None]
        cells = [kinds[kind], len(own), sum(kill["process"] == 0 for kill in own)]
        cells.append(sum(kill["save_in_flight"] for kill in own))
        cells.append(f"{sum(max(kill['logged'] - kill['saved'], 0) for kill in own) / len(own):.1f}")
        cells += [f"{sum(waits) / len(waits):.1f} s", f"{max(waits):.1f} s"] if waits else ["never", "never"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "| killed | one that is left | times | and tells who is missing |", "|---|---|---|---|"]
    for who, is_first in (("process 0", True), ("another one", False)):
        others = [other for kill in kills if (kill["process"] == 0) == is_first for other in kill["others"]]
        for what in sorted({other["says"] for other in others}):
            own = [other for other in others if other["says"] == what]
            lines.append(f"| {who} | {what} | {len(own)} | {sum(other['names'] for other in own)} |")
    return lines
