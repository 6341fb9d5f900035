"""Stages that another run has trained already: the same history, so the same student."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from hypersd_jax.config import Config, load_config, to_dict
from hypersd_jax.errors import UserError
from hypersd_jax.stages.export import student_path
from hypersd_jax.stages.output import Output
from hypersd_jax.training import Checkpointer


def history(config: Config, count: int, base: str) -> str:
    """A digest of all that makes the ``count``-th stage's student.

    Base (the fingerprint of its UNet), data, seed and adapter of the run, and the settings of every stage up to it.
    """
    tree = to_dict(config)
    parts = {name: tree[name] for name in ("model", "data", "lora", "seed")}
    stages = [stage for stage in tree["stages"] if not stage["skip"]][:count]
    text = json.dumps([base, parts, stages], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def take_over(config: Config, output: Output, base: str) -> list[str]:
    """Put the first stages of ``config.reuse`` that have the same history into this run's folder.

    They are links to the same files, which nothing rewrites in place, so that they cost no space. What is in the
    folder already stays.

    Returns:
        The names of the stages that were taken.

    Raises:
        UserError: ``reuse`` is no run's folder.
    """
    if config.reuse is None:
        return []
    other = Output(Path(config.reuse))
    record = other.root / "config.yaml"
    if not record.is_file():
        raise UserError(f"reuse: {config.reuse} is not a run's folder (config.yaml is missing)")
    theirs = load_config(record)
    taken = []
    for count, stage in enumerate(config.adapter_stages, start=1):
        if count > len(theirs.adapter_stages) or history(config, count, base) != history(theirs, count, base):
            break
        student = student_path(other, stage)
        if not student.exists() or not _is_finished(other.checkpoints(stage.name), stage.updates):
            break
        if not output.checkpoints(stage.name).exists():
            link_tree(other.checkpoints(stage.name), output.checkpoints(stage.name))
        mine = student_path(output, stage)
        mine.parent.mkdir(parents=True, exist_ok=True)
        if not mine.exists():
            link_tree(student, mine) if student.is_dir() else os.link(student, mine)
        taken.append(stage.name)
    return taken


def _is_finished(folder: Path, updates: int) -> bool:
    if not folder.is_dir():
        return False
    with Checkpointer(folder) as checkpoints:
        return checkpoints.latest() == updates


def link_tree(source: Path, target: Path) -> None:
    """The same files under another name; the folder appears at once."""
    temporary = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, temporary, copy_function=os.link)
    temporary.replace(target)
