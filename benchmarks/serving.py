"""How live is the live canvas? ``python benchmarks/serving.py``, three minutes on two CPU cores.

Starts ``hypersd serve`` on the embedded model and lets connections type at it from another process on the same machine:
one alone, then 50 at once, eight keys a second each. Writes benchmarks/results/serving: results.json and a table.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.live.typist import Record, one_by_one, typing

RESULTS = ROOT / "benchmarks" / "results" / "serving"
KEYS_PER_SECOND = 8.0
ALONE = 40
WARM_UP = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=2.0, help="of the load (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="sampling steps (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    command = [sys.executable, "-m", "hypersd_jax", "serve", "--port", "0", "--steps", str(options.steps)]
    begin = time.perf_counter()
    server = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        found: dict[str, Any] = {"steps": options.steps, "start_seconds": round(time.perf_counter() - begin, 1)}
        asyncio.run(one_by_one(url, WARM_UP))
        alone = asyncio.run(one_by_one(url, ALONE))
        found["one_inference_ms"] = round(1000 * float(np.median(alone.drawn)), 1)
        found["one"] = one(asyncio.run(typing(url, 30.0, KEYS_PER_SECOND, 0)), found["one_inference_ms"])
        memory = Memory(server.pid)
        records = asyncio.run(many(url, options.clients, 60 * options.minutes))
        found["many"] = crowd(records, found["one_inference_ms"], 60 * options.minutes)
        found["memory"] = memory.summary()
    finally:
        server.send_signal(signal.SIGTERM)
        found["exit_status"] = server.wait(timeout=30)
    found["load_average"] = [round(each, 1) for each in os.getloadavg()]
    found["cores"] = os.cpu_count()
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    text = table(found)
    (options.output / "README.md").write_text(text, encoding="utf-8")
    print(text)


async def many(url: str, clients: int, seconds: float) -> list[Record]:
    """All at once."""
    return await asyncio.gather(*(typing(url, seconds, KEYS_PER_SECOND, number) for number in range(clients)))


class Memory:
    """The resident memory of a process, sampled every second."""

    def __init__(self, pid: int) -> None:
        self._file = Path(f"/proc/{pid}/statm")
        self._samples: list[float] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._ended.wait(1.0):
            pages = int(self._file.read_text().split()[1])
            self._samples.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)

    def summary(self) -> dict[str, Any]:
        """Mebibytes at the start, in the middle and at the end, and how many a minute of the second half adds."""
        self._ended.set()
        self._thread.join()
        half = self._samples[len(self._samples) // 2 :]
        slope = float(np.polyfit(np.arange(len(half)), half, 1)[0]) * 60 if len(half) > 1 else 0.0
        return {
            "first_mib": round(self._samples[0], 1),
            "middle_mib": round(half[0], 1),
            "last_mib": round(half[-1], 1),
            "mib_per_minute_in_second_half": round(slope, 2),
        }


def one(record: Record, inference: float) -> dict[str, Any]:
    """One client's keystroke to image."""
    latency = quantiles(record.latencies)
    return {
        "keys": record.keys,
        "images": len(record.latencies),
        "stale": record.stale,
        "latency_ms": latency,
        "p95_over_one_inference": round(latency["p95"] / inference, 2),
        "p95_over_one_inference_meanwhile": round(latency["p95"] / (1000 * float(np.median(record.drawn))), 2),
    }


def crowd(records: Sequence[Record], inference: float, seconds: float) -> dict[str, Any]:
    """All clients' waits against the share of the device that each has a right to."""
    counts = np.asarray([len(record.waits) for record in records], float)
    waits = quantiles([wait for record in records for wait in record.waits[1:]])
    meanwhile = 1000 * float(np.median([each for record in records for each in record.drawn]))
    return {
        "clients": len(records),
        "seconds": seconds,
        "keys_per_second": round(sum(record.keys for record in records) / seconds, 1),
        "images_per_second": round(float(counts.sum()) / seconds, 2),
        "fair_share_ms": round(len(records) * inference, 1),
        "one_inference_meanwhile_ms": round(meanwhile, 1),
        "wait_ms": waits,
        "p95_over_fair_share": round(waits["p95"] / (len(records) * inference), 2),
        "p95_over_fair_share_meanwhile": round(waits["p95"] / (len(records) * meanwhile), 2),
        "fairness": round(float(counts.sum() ** 2 / (len(counts) * np.square(counts).sum())), 4),
        "fewest_images": int(counts.min()),
        "most_images": int(counts.max()),
        "stale": sum(record.stale for record in records),
        "worst_place": max(record.worst_place for record in records),
    }


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds."""
    return {f"p{q}": round(1000 * float(np.percentile(seconds, q)), 1) for q in (50, 95, 100)}


def table(found: dict[str, Any]) -> str:
    """The results in words."""
    one, many, memory = found["one"], found["many"], found["memory"]
    rows = [
        ("one inference, alone", f"{found['one_inference_ms']} ms"),
        (
            "one client, keystroke to image, p50 and p95",
            f"{one['latency_ms']['p50']} and {one['latency_ms']['p95']} ms",
        ),
        ("p95 over one inference (goal: at most 1.5)", one["p95_over_one_inference"]),
        (f"{many['clients']} clients: images a second", many["images_per_second"]),
        ("one inference meanwhile", f"{many['one_inference_meanwhile_ms']} ms"),
        ("fair share: clients x one inference alone", f"{many['fair_share_ms']} ms"),
        ("wait for what was typed, p50 and p95", f"{many['wait_ms']['p50']} and {many['wait_ms']['p95']} ms"),
        ("p95 over the fair share (goal: at most 1.2)", many["p95_over_fair_share"]),
        ("the same, by the inference meanwhile", many["p95_over_fair_share_meanwhile"]),
        ("Jain's fairness index (goal: at least 0.95)", many["fairness"]),
        ("stale images shown (goal: 0)", one["stale"] + many["stale"]),
        ("memory at the start and the end of the load", f"{memory['first_mib']} and {memory['last_mib']} MiB"),
        ("growth in its second half", f"{memory['mib_per_minute_in_second_half']} MiB a minute"),
        ("start, until the page can be opened", f"{found['start_seconds']} s"),
        ("exit status after SIGTERM", found["exit_status"]),
    ]
    lines = [
        "# The live canvas under load",
        "",
        f"`python benchmarks/serving.py --clients {many['clients']} --minutes {many['seconds'] / 60:g} "
        f"--steps {found['steps']}`: the embedded model, {found['steps']} steps, {found['cores']} cores; clients type "
        f"{KEYS_PER_SECOND:g} keys a second each, from another process on the same cores. The load average at the end, "
        f"the server's and the clients' own work included: {found['load_average'][0]}.",
        "",
        "| what | measured |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
        "",
        "The wait is from the first keystroke that nothing on the page shows yet to the image that does. An image is",
        "stale that comes after a newer one, or whose prompt was out of date when it was begun.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
