"""Reuse stages that another run has trained: the same history gives the same student."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
from pathlib import Path

from hypersd_jax.config import Config, StageConfig, to_dict
from hypersd_jax.errors import UserError, short
from hypersd_jax.training.checkpoints import HALF_WRITTEN, Checkpointer
from hypersd_jax.training.first_process import from_first, on_first
from hypersd_jax.training.output import Output
from hypersd_jax.weights.tensors import replacing


def history(config: Config, count: int, base: str, start: str | None = None) -> str:
    """Compute the digest of all that decides the student of the ``count``-th stage.

    Base (the fingerprint of its UNet), data, seed and adapter of the run, the fingerprint of the adapter that it starts
    from (``start``), and the settings of every stage up to it.
    """
    tree = to_dict(config)
    parts = {name: tree[name] for name in ("model", "data", "lora", "seed")}
    del parts["lora"]["start"]  # a place; what counts is its content
    if start is not None:
        parts["start"] = start
    stages = [stage for stage in tree["stages"] if not stage["skip"]][:count]
    text = json.dumps([base, parts, stages], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def of_length(config: Config, stage: StageConfig, updates: int) -> Config:
    """Return the configuration with another number of updates for one stage."""
    changed = dataclasses.replace(stage, updates=updates)
    stages = tuple(changed if each.name == stage.name else each for each in config.stages)
    return dataclasses.replace(config, stages=stages)


def reuse_stages(config: Config, output: Output, base: str, start: str | None = None) -> list[str]:
    """Link the first stages of ``config.reuse`` that have the same history into this run's folder.

    They are links to the same files, which nothing rewrites in place, so that they cost no space. A stage that is in
    the folder already stays; if it is unfinished, it and later ones are trained here. A reused stage has no lines in
    metrics.jsonl and no samples here. Every process calls this; the first one looks and links.

    Returns:
        The names of the reused stages.
    """
    if config.reuse is None:
        return []
    other = Output(Path(config.reuse))
    reused = []
    for count, stage in enumerate(config.adapter_stages, start=1):
        digest = history(config, count, base, start)
        student, folder = other.student(stage), output.checkpoints(stage.name)
        if not from_first(student.exists()) or not _is_finished(other.checkpoints(stage.name), stage, digest):
            break
        if from_first(folder.exists()) and not _is_finished(folder, stage, digest):
            break
        on_first(functools.partial(_link_stage, stage, other, output))
        reused.append(stage.name)
    return reused


def _link_stage(stage: StageConfig, other: Output, output: Output) -> None:
    """Link a stage's checkpoints and its student; UserError where that cannot be."""
    try:
        if not output.checkpoints(stage.name).exists():
            link_tree(other.checkpoints(stage.name), output.checkpoints(stage.name))
        _link_student(other.student(stage), output.student(stage))
    except (OSError, shutil.Error) as error:
        reason = getattr(error, "strerror", None) or short(error)
        raise UserError(f"reuse: {stage.name} of {other.root} cannot be reused ({reason})") from None


def require_run(config: Config) -> None:
    """Refuse (UserError) a ``reuse`` that names no run's folder."""
    if config.reuse is not None and not (Path(config.reuse) / "config.yaml").is_file():
        raise UserError(f"reuse: {config.reuse} is not a run's folder (config.yaml is missing)")


def _is_finished(folder: Path, stage: StageConfig, digest: str) -> bool:
    if not from_first(folder.is_dir()):
        return False
    with Checkpointer(folder, read_only=True) as checkpoints:
        return checkpoints.latest() == stage.updates and checkpoints.metadata().get("history") == digest


def _link_student(theirs: Path, mine: Path) -> None:
    mine.parent.mkdir(parents=True, exist_ok=True)
    if mine.exists():
        return
    if theirs.is_dir():
        link_tree(theirs, mine)
        return
    with replacing(mine) as temporary:
        Path(temporary).unlink(missing_ok=True)
        _link(theirs, temporary)


def _link(source: str | Path, target: str | Path) -> None:
    """Link a file under another name; copy it where the file system cannot."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def link_tree(source: Path, target: Path) -> None:
    """Link the files of a folder under another name; the folder appears at once."""
    temporary = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copytree(source, temporary, copy_function=_link, ignore=shutil.ignore_patterns(f"*{HALF_WRITTEN}*"))
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
