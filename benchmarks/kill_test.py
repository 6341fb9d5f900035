"""A longer run killed again and again: ``python benchmarks/kill_test.py``; writes benchmarks/results/kill_test.*.

Four stages of a tiny model are trained twice. One run is left alone. The other gets SIGKILL at 30 moments, drawn from a
seed: after some update; while a checkpoint is being saved; around the end of a stage, where its LoRA is written; while
the process starts. After each the same command starts again. Right is that it always resumes from a checkpoint, that
the final LoRAs are bit for bit those of the run left alone, that metrics.jsonl has every update once with the same
numbers, and that nothing half-written stays behind.
"""

from __future__ import annotations

import argparse
import contextlib
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
import numpy as np
from tqdm import tqdm

from hypersd_jax.weights.tensors import open_tensors
from tests.helpers.tiny_model import tiny_model

RESULT = ROOT / "benchmarks" / "results" / "kill_test"
STAGES = ("tscd-8", "tscd-4", "tscd-2", "tscd-1")
CHECKPOINT_EVERY = 5
HALF_WRITTEN = "orbax-checkpoint-tmp"
CLOCKS = {"seconds", "input_wait"}
"""What metrics.jsonl says of time, which no two runs share."""

RECIPE = """
output_dir: {output}
model: {model}
data: {{source: emoji, resolution: 16}}
lora: {{rank: 4}}
log: {{checkpoint_every: {checkpoint_every}, tensorboard: false}}
evaluation: {{samples: 0, batch_size: 8}}
stages:
  - &stage {{name: tscd-8, k: 8, solver_steps: 8, updates: {updates}, batch_size: 4, learning_rate: 1.0e-3, warmup: 5,
            schedule: cosine, guidance: [3, 5], ema: 0.9}}
  - {{<<: *stage, name: tscd-4, k: 4, teacher: previous}}
  - {{<<: *stage, name: tscd-2, k: 2, solver_steps: 4, teacher: previous}}
  - {{<<: *stage, name: tscd-1, k: 1, solver_steps: 2, teacher: previous}}
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moment:
    """When to kill: once ``update`` updates of the whole run are logged, and then ``delay`` seconds after ``kind``.

    "update": at once; "save": when the next half-written checkpoint is seen; "export": when the last checkpoint of the
    stage is whole; "start": after the process has started, whatever is logged.
    """

    kind: str
    update: int
    delay: float


def moments(count: int, updates: int, start_seconds: float, draw: random.Random) -> list[Moment]:
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
    return sorted(found, key=lambda moment: moment.update)


class Run:
    """One output folder, and the command that fills it."""

    def __init__(self, folder: Path, model: Path, updates: int) -> None:
        folder.mkdir(parents=True)
        self.output, self.updates = folder / "out", updates
        self.recipe = folder / "recipe.yaml"
        text = RECIPE.format(output=self.output, model=model, updates=updates, checkpoint_every=CHECKPOINT_EVERY)
        self.recipe.write_text(text, encoding="utf-8")
        self._errors = folder / "stderr.txt"

    def start(self, cache: Path) -> subprocess.Popen:
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, str(ROOT / "train.py"), "--config", str(self.recipe)]
        with self._errors.open("wb") as errors:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=errors)

    def errors(self) -> str:
        return self._errors.read_text(encoding="utf-8", errors="replace")[-1500:]

    def logged(self) -> int:
        """Updates in metrics.jsonl."""
        with contextlib.suppress(FileNotFoundError):
            return (self.output / "metrics.jsonl").read_bytes().count(b"\n")
        return 0

    def half_written(self) -> list[str]:
        """Checkpoints that are being saved, or were when the process was killed."""
        found = []
        with contextlib.suppress(FileNotFoundError):
            for stage in os.scandir(self.output / "checkpoints"):
                with contextlib.suppress(FileNotFoundError):
                    found += [entry.path for entry in os.scandir(stage) if HALF_WRITTEN in entry.name]
        return found

    def saved(self) -> int:
        """Updates of the whole run up to the newest whole checkpoint."""
        newest = 0
        for number, stage in enumerate(STAGES):
            with contextlib.suppress(FileNotFoundError):
                for entry in os.scandir(self.output / "checkpoints" / stage):
                    if entry.name.isdigit():
                        newest = max(newest, number * self.updates + int(entry.name))
        return newest

    def records(self) -> list[dict[str, Any]]:
        lines = (self.output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [{key: value for key, value in json.loads(line).items() if key not in CLOCKS} for line in lines]

    def tensors(self, stage: str) -> dict[str, np.ndarray]:
        with open_tensors(self.output / "loras" / f"{stage}.safetensors") as file:
            return {key: file.read(key) for key in file.keys()}  # noqa: SIM118


def kill_at(run: Run, moment: Moment, cache: Path, limit: float) -> dict[str, Any]:
    """Start the run, wait for the moment, kill; what was seen. A process that ends by itself is an error."""
    before_logged, before_saved = run.logged(), run.saved()
    # What an earlier life logged is there from the start: the moment has to lie beyond it.
    target = max(moment.update, before_logged + 1)
    process = run.start(cache)
    begin = time.monotonic()

    def reached() -> bool:
        if moment.kind == "start":
            return True
        if moment.kind == "export":
            return run.saved() >= moment.update
        return run.logged() >= target and (moment.kind == "update" or bool(run.half_written()))

    while process.poll() is None and not reached():
        if time.monotonic() - begin > limit:
            process.kill()
            raise SystemExit(f"{moment}: not reached within {limit:.0f} s\n{run.errors()}")
        time.sleep(0.0005 if moment.kind == "save" and run.logged() >= target else 0.005)
    time.sleep(moment.delay)
    process.kill()
    status = process.wait()
    if status >= 0:
        raise SystemExit(f"{moment}: the run ended by itself, with status {status}\n{run.errors()}")
    found = {"kind": moment.kind, "delay": round(moment.delay, 4), "seconds": round(time.monotonic() - begin, 2)}
    found |= {"logged": run.logged(), "saved": run.saved(), "save_in_flight": bool(run.half_written())}
    if run.saved() < before_saved:
        raise SystemExit(f"{moment}: the newest checkpoint went back from {before_saved} to {run.saved()}")
    return found


def finish(run: Run, cache: Path, limit: float) -> None:
    """Let the run come to its end."""
    process = run.start(cache)
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        process.kill()
        raise SystemExit(f"not finished within {limit:.0f} s\n{run.errors()}") from None
    if status:
        raise SystemExit(f"the run ended with status {status}\n{run.errors()}")


def differences(alone: Run, killed: Run) -> list[str]:
    """In what the killed run is not what it should be; one line each."""
    wrong = []
    for stage in STAGES:
        wanted, found = alone.tensors(stage), killed.tensors(stage)
        if wanted.keys() != found.keys():
            wrong.append(f"{stage}: other tensors")
        elif any(wanted[key].tobytes() != found[key].tobytes() for key in wanted):
            wrong.append(f"{stage}: other numbers")
    steps = [(record["stage"], record["step"]) for record in killed.records()]
    if steps != [(stage, step) for stage in STAGES for step in range(1, alone.updates + 1)]:
        wrong.append("metrics.jsonl: not every update once")
    else:
        for wanted, found in zip(alone.records(), killed.records(), strict=True):
            other = [key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key)]
            if other:
                wrong.append(f"metrics.jsonl, {found['stage']}, update {found['step']}: other {', '.join(other)}")
                break
    left = [path for path in killed.output.rglob("*") if "tmp" in path.name]
    wrong += [f"{path.relative_to(killed.output)} was left behind" for path in left]
    return wrong


def report(content: dict[str, Any]) -> str:
    lines = ["# A run that is killed", "", f"`{content['command']}`, {content['date']}, jax {content['jax']}.", ""]
    updates, stages = content["updates"], len(STAGES)
    lines += [f"{stages} stages of {updates} updates of a tiny model, a checkpoint every {CHECKPOINT_EVERY}.", ""]
    lines += ["| killed | times | with a checkpoint half written | updates done again, mean |", "|---|---|---|---|"]
    kills = content["kills"]
    for kind in dict.fromkeys(kill["kind"] for kill in kills):
        own = [kill for kill in kills if kill["kind"] == kind]
        again = sum(max(kill["logged"] - kill["saved"], 0) for kill in own) / len(own)
        words = {
            "update": "after an update",
            "save": "in a save",
            "export": "at a stage's end",
            "start": "at its start",
        }
        lines.append(f"| {words[kind]} | {len(own)} | {sum(kill['save_in_flight'] for kill in own)} | {again:.1f} |")
    lines += ["", f"Resumed each of the {len(kills)} times. Against the run left alone: "]
    lines[-1] += "; ".join(content["wrong"]) or "LoRAs bit for bit the same, every update logged once, nothing left."
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, metavar="N")
    parser.add_argument("--updates", type=int, default=120, metavar="N", help="of each stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=300.0, metavar="SECONDS", help="that one start may take")
    parser.add_argument("--results", type=Path, default=RESULT, help="table and JSON to write, without suffix")
    options = parser.parse_args()
    if not len(STAGES) < options.kills <= options.updates:
        parser.error(f"--kills must lie between {len(STAGES)} and --updates")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, cache = tiny_model(folder / "model"), folder / "cache"
        alone, killed = (Run(folder / kind, model, options.updates) for kind in ("alone", "killed"))
        begin = time.monotonic()
        finish(alone, cache, options.limit)
        # The first kill also says how long a start takes, with every program in the cache.
        kills = [kill_at(killed, Moment(kind="update", update=1, delay=0.0), cache, options.limit)]
        plan = moments(options.kills - 1, options.updates, kills[0]["seconds"], random.Random(options.seed))
        kills += [kill_at(killed, moment, cache, options.limit) for moment in tqdm(plan, unit="kill")]
        finish(killed, cache, options.limit)
        wrong = differences(alone, killed)
    content = {
        "command": f"python benchmarks/kill_test.py --kills {options.kills} --updates {options.updates}"
        f" --seed {options.seed}",
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "updates": options.updates,
        "seconds": round(time.monotonic() - begin),
        "kinds": dict(Counter(kill["kind"] for kill in kills)),
        "saves_in_flight": sum(kill["save_in_flight"] for kill in kills),
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
