"""A longer run killed again and again: ``python benchmarks/kill_test.py``; writes benchmarks/results/kill_test.*.

Four stages of a tiny model are trained twice. One run is left alone. The other gets SIGKILL at 30 moments, drawn from a
seed: after some update; while a checkpoint is being saved; around the end of a stage, where its LoRA is written; while
the process starts. After each the same command starts again. Right is that it always resumes from a checkpoint, that
the final LoRAs are bit for bit those of the run left alone, that metrics.jsonl has every update once with the same
numbers, and that nothing half-written stays behind.

With ``--processes N`` several processes train the run together, two devices each, and the results are kill_test_
processes.*. One of them, chosen at random too, is killed. The others have to end by themselves within a minute, with a
status that is not 0, and then all start again with the same commands.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import jax
from tqdm import tqdm

from benchmarks.killing import others
from benchmarks.killing.runs import CHECKPOINT_EVERY, DEVICES, STAGES, TIMEOUT_SECONDS, Run, differences
from tests.helpers.tiny_model import tiny_model

RESULT = ROOT / "benchmarks" / "results" / "kill_test"
KINDS = {"update": "after an update", "save": "in a save", "export": "at a stage's end", "start": "at its start"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moment:
    """When to kill: once ``update`` updates of the whole run are logged, and then ``delay`` seconds after ``kind``.

    "update": at once; "save": when the next half-written checkpoint is seen; "export": when the last checkpoint of the
    stage is whole; "start": after the process has started, whatever is logged.
    ``process`` is the number of the one that is killed.
    """

    kind: str
    update: int
    delay: float
    process: int = 0


def moments(count: int, updates: int, start_seconds: float, draw: random.Random, processes: int = 1) -> list[Moment]:
    """``count`` moments over a run of four stages, in the order in which they come."""
    ends = [Moment(kind="export", update=updates * n, delay=draw.uniform(0.0, 1.5)) for n in range(1, len(STAGES))]
    chosen = draw.sample(range(2, len(STAGES) * updates - 2 * CHECKPOINT_EVERY), count - len(ends))
    found = list(ends)
    for number, update in enumerate(chosen):
        if number < count // 3:
            found.append(Moment(kind="save", update=update, delay=draw.uniform(0.0, 0.05)))
        elif number < count // 3 + count // 8:
            found.append(Moment(kind="start", update=update, delay=draw.uniform(0.0, start_seconds)))
        else:
            found.append(Moment(kind="update", update=update, delay=draw.uniform(0.0, 0.1)))
    found.sort(key=lambda moment: moment.update)
    return [dataclasses.replace(moment, process=draw.randrange(processes)) for moment in found]


def kill_at(run: Run, moment: Moment, cache: Path, limit: float) -> dict[str, Any]:
    """Start the run, wait for the moment, kill; what was seen. A process that ends by itself is an error."""
    before_logged, before_saved = run.logged(), run.saved()
    # What an earlier life logged is there from the start: the moment has to lie beyond it.
    target = max(moment.update, before_logged + 1)
    processes = run.start(cache)
    begin = time.monotonic()
    # A run that resumes drops the lines beyond its checkpoint, and no others.
    fewest = before_logged

    def reached() -> bool:
        nonlocal fewest
        logged = run.logged()
        fewest = min(fewest, logged)
        if moment.kind == "start":
            return True
        if moment.kind == "export":
            return run.saved() >= moment.update
        return logged >= target and (moment.kind == "update" or bool(run.half_written()))

    while all(process.poll() is None for process in processes) and not reached():
        if time.monotonic() - begin > limit:
            end(processes)
            raise SystemExit(f"{moment}: not reached within {limit:.0f} s\n{run.errors()}")
        time.sleep(0.0005 if moment.kind == "save" and run.logged() >= target else 0.005)
    time.sleep(moment.delay)
    if any(process.poll() is not None for process in processes):
        statuses = end(processes)
        raise SystemExit(f"{moment}: the run ended by itself, with status {statuses}\n{run.errors()}")
    processes[moment.process].kill()
    killed = time.monotonic()
    if processes[moment.process].wait() >= 0:
        end(processes)
        raise SystemExit(f"{moment}: the process ended by itself\n{run.errors()}")
    found = {"kind": moment.kind, "delay": round(moment.delay, 4), "seconds": round(killed - begin, 2)}
    found |= {"logged": run.logged(), "saved": run.saved(), "save_in_flight": bool(run.half_written())}
    if len(processes) > 1:
        found |= {"process": moment.process, "others": others.watch(run, processes, moment.process, killed)}
        found["lost"] = max(before_saved - fewest, 0)
    if run.saved() < before_saved:
        raise SystemExit(f"{moment}: the newest checkpoint went back from {before_saved} to {run.saved()}")
    return found


def end(processes: list[subprocess.Popen]) -> list[int]:
    """Kill what still runs; the status of each."""
    for process in processes:
        process.kill()
    return [process.wait() for process in processes]


def finish(run: Run, cache: Path, limit: float) -> None:
    """Let the run come to its end."""
    processes = run.start(cache)
    deadline = time.monotonic() + limit
    try:
        statuses = [process.wait(max(deadline - time.monotonic(), 0.0)) for process in processes]
    except subprocess.TimeoutExpired:
        end(processes)
        raise SystemExit(f"not finished within {limit:.0f} s\n{run.errors()}") from None
    if any(statuses):
        raise SystemExit(f"the run ended with status {statuses}\n{run.errors()}")


def report(content: dict[str, Any]) -> str:
    kills, processes = content["kills"], content.get("processes", 1)
    title = "A run that is killed" if processes == 1 else f"A run of {processes} processes, one of which is killed"
    lines = [f"# {title}", "", f"`{content['command']}`, {content['date']}, jax {content['jax']}.", ""]
    updates, stages = content["updates"], len(STAGES)
    lines += [f"{stages} stages of {updates} updates of a tiny model, a checkpoint every {CHECKPOINT_EVERY}."]
    if processes == 1:
        lines += ["", *table(kills), "", f"Resumed each of the {len(kills)} times. Against the run left alone: "]
    else:
        lines[-1] += f" {DEVICES} devices a process: mesh.data={processes} mesh.fsdp={DEVICES}"
        lines[-1] += f" distributed.timeout_seconds={TIMEOUT_SECONDS}."
        lines += ["", *others.table(kills, KINDS), "", others.summary(kills)]
        lines[-1] += f" Against {processes} processes left alone: "
    lines[-1] += "; ".join(content["wrong"]) or "LoRAs bit for bit the same, every update logged once, nothing left."
    return "\n".join(lines) + "\n"


def table(kills: list[dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table: the kills of a single process by their moment."""
    lines = ["| killed | times | with a checkpoint half written | updates done again, mean |", "|---|---|---|---|"]
    for kind in dict.fromkeys(kill["kind"] for kill in kills):
        own = [kill for kill in kills if kill["kind"] == kind]
        again = sum(max(kill["logged"] - kill["saved"], 0) for kill in own) / len(own)
        lines.append(f"| {KINDS[kind]} | {len(own)} | {sum(kill['save_in_flight'] for kill in own)} | {again:.1f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, metavar="N")
    parser.add_argument("--updates", type=int, default=120, metavar="N", help="of each stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="that train the run together")
    parser.add_argument("--limit", type=float, default=300.0, metavar="SECONDS", help="that one start may take")
    parser.add_argument("--results", type=Path, help=f"table and JSON to write, without suffix ({RESULT.name})")
    options = parser.parse_args()
    several = options.processes > 1
    options.results = options.results or RESULT.with_name(f"{RESULT.name}_processes" if several else RESULT.name)
    if not len(STAGES) < options.kills <= options.updates:
        parser.error(f"--kills must lie between {len(STAGES)} and --updates")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, cache = tiny_model(folder / "model"), folder / "cache"
        alone, killed = (Run(folder / kind, model, options.updates, options.processes) for kind in ("alone", "killed"))
        begin = time.monotonic()
        finish(alone, cache, options.limit)
        # The first kill also says how long a start takes, with every program in the cache.
        kills = [kill_at(killed, Moment(kind="update", update=1, delay=0.0), cache, options.limit)]
        plan = moments(
            options.kills - 1, options.updates, kills[0]["seconds"], random.Random(options.seed), options.processes
        )
        kills += [kill_at(killed, moment, cache, options.limit) for moment in tqdm(plan, unit="kill")]
        finish(killed, cache, options.limit)
        wrong = differences(alone, killed) + (others.failures(kills) if several else [])
    content = {
        "command": "python benchmarks/kill_test.py"
        + (f" --processes {options.processes}" if several else "")
        + f" --kills {options.kills} --updates {options.updates}"
        f" --seed {options.seed}",
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "updates": options.updates,
        "seconds": round(time.monotonic() - begin),
        "kinds": dict(Counter(kill["kind"] for kill in kills)),
        "saves_in_flight": sum(kill["save_in_flight"] for kill in kills),
        **({"processes": options.processes, "counts": others.counts(kills)} if several else {}),
        "kills": kills,
        "wrong": wrong,
    }
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    text = report(content)
    options.results.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
