"""Training a recipe, with every stage that another run has trained already taken from there.

OUTPUT/stages/KEY holds a finished stage: its last checkpoint and its LoRA. The key is a digest of all that made it:
base, data, seed, adapter, and the settings of every stage up to it. OUTPUT/runs/KEY is the run in progress, which goes
on after a kill; what it has finished moves over at its end, and appears under its name only when it is whole.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from hypersd_jax.config import Config
from hypersd_jax.stages import train
from hypersd_jax.training.reuse import history, link_tree
from hypersd_jax.weights.tensors import open_tensors

STUDENT = "student.safetensors"


def student_file(root: Path, key: str) -> Path:
    """Where a finished stage's LoRA lies."""
    return root / "stages" / key / STUDENT


def missing_updates(config: Config, root: Path, base: str, promised: set[str]) -> int:
    """Updates that training this recipe still takes; its stages join ``promised``, which count as trained."""
    updates = 0
    for count, stage in enumerate(config.adapter_stages, start=1):
        key = history(config, count, base)
        if key not in promised and not student_file(root, key).exists():
            updates += stage.updates
        promised.add(key)
    return updates


def train_recipe(config: Config, root: Path, base: str) -> dict[str, Path]:
    """Train what is missing; returns each stage's LoRA by name. ``config.output_dir`` is the run's own folder."""
    stages = config.adapter_stages
    keys = [history(config, count, base) for count in range(1, len(stages) + 1)]
    if not all(student_file(root, key).exists() for key in keys):
        run = Path(config.output_dir)
        for stage, key in zip(stages, keys, strict=True):
            if not student_file(root, key).exists():
                break
            _take(root / "stages" / key, run, stage.name)
        train(config)
        for stage, key in zip(stages, keys, strict=True):
            if not student_file(root, key).exists():
                _publish(run, stage.name, root / "stages" / key)
        shutil.rmtree(run / "checkpoints")
    return {stage.name: student_file(root, key) for stage, key in zip(stages, keys, strict=True)}


def run_folder(config: Config, root: Path, base: str) -> Path:
    """Where the run of this recipe is in progress."""
    return root / "runs" / history(config, len(config.adapter_stages), base)


def _take(stored: Path, run: Path, name: str) -> None:
    """Put a finished stage into a run's folder, as if the run had trained it."""
    checkpoints, lora = run / "checkpoints" / name, run / "loras" / f"{name}.safetensors"
    if not checkpoints.exists():
        link_tree(stored / "checkpoints", checkpoints)
    if not lora.exists():
        lora.parent.mkdir(parents=True, exist_ok=True)
        os.link(stored / STUDENT, lora)


def _publish(run: Path, name: str, stored: Path) -> None:
    """Keep a run's stage: its newest checkpoint, and its student."""
    steps = [path for path in (run / "checkpoints" / name).iterdir() if path.name.isdigit()]
    newest = max(steps, key=lambda path: int(path.name))
    temporary = stored.with_name(f".tmp-{stored.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    link_tree(newest, temporary / "checkpoints" / newest.name)
    lora = run / "loras" / f"{name}.safetensors"
    with open_tensors(lora) as file:  # a file that cannot be read is not kept
        file.keys()
    os.link(lora, temporary / STUDENT)
    temporary.replace(stored)
