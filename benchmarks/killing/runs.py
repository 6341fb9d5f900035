"""One run of a tiny model in a folder: its commands, what it has written, and whether two runs ended alike."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from hypersd_jax.weights.tensors import open_tensors

ROOT = Path(__file__).parents[2]
STAGES = ("tscd-8", "tscd-4", "tscd-2", "tscd-1")
CHECKPOINT_EVERY = 5
DEVICES = 2
"""Of each process, where there are several."""
TIMEOUT_SECONDS = 20
"""``distributed.timeout_seconds``, where there are several processes."""
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
  - &stage {{name: tscd-8, k: 8, solver_steps: 8, updates: {updates}, batch_size: {batch_size}, learning_rate: 1.0e-3,
            warmup: 5, schedule: cosine, guidance: [3, 5], ema: 0.9}}
  - {{<<: *stage, name: tscd-4, k: 4, teacher: previous}}
  - {{<<: *stage, name: tscd-2, k: 2, solver_steps: 4, teacher: previous}}
  - {{<<: *stage, name: tscd-1, k: 1, solver_steps: 2, teacher: previous}}
"""


class Run:
    """One output folder, and the commands that fill it, one for each process."""

    def __init__(self, folder: Path, model: Path, updates: int, processes: int = 1) -> None:
        folder.mkdir(parents=True)
        self.output, self.updates, self.processes = folder / "out", updates, processes
        self._folder, self._recipe = folder, folder / "recipe.yaml"
        settings = {"updates": updates, "checkpoint_every": CHECKPOINT_EVERY, "batch_size": max(4, DEVICES * processes)}
        self._recipe.write_text(RECIPE.format(output=self.output, model=model, **settings), encoding="utf-8")
        self._port = free_port() if processes > 1 else None

    def start(self, cache: Path) -> list[subprocess.Popen]:
        """Start all processes, each with the same command every time."""
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache), "HF_HUB_OFFLINE": "1"}
        if self.processes == 1:
            return [self._start(0, [str(ROOT / "train.py"), "--config", str(self._recipe)], environment)]
        environment["JAX_NUM_CPU_DEVICES"] = str(DEVICES)
        command = ["-m", "benchmarks.killing.train_split", "--config", str(self._recipe)]
        command += [f"mesh.data={self.processes}", f"mesh.fsdp={DEVICES}"]
        command += [f"distributed.coordinator=localhost:{self._port}", f"distributed.processes={self.processes}"]
        command += [f"distributed.timeout_seconds={TIMEOUT_SECONDS}"]
        return [
            self._start(number, [*command, f"distributed.process={number}"], environment)
            for number in range(self.processes)
        ]

    def _start(self, number: int, command: list[str], environment: dict[str, str]) -> subprocess.Popen:
        with self._errors(number).open("wb") as errors:
            return subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=errors
            )

    def _errors(self, number: int) -> Path:
        return self._folder / f"stderr-{number}.txt"

    def printed(self, number: int = 0) -> str:
        """What a process has written to standard error since its last start."""
        return self._errors(number).read_text(encoding="utf-8", errors="replace")

    def errors(self) -> str:
        """The end of what each process has written to standard error."""
        return "\n".join(self.printed(number)[-1500:] for number in range(self.processes))

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


def free_port() -> int:
    """A port that is free now, below those that the system hands out: it is to be free at every later start too."""
    while True:
        port = random.SystemRandom().randrange(20_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("localhost", port))
            return port


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
