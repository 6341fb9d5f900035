"""The output folder of a training run, and a folder of checkpoints in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypersd_jax.config import load_run
from hypersd_jax.errors import UserError
from hypersd_jax.inspection.report import Report, command, counted, labelled
from hypersd_jax.inspection.sort import checkpoint_steps
from hypersd_jax.training.output import Output


def inspect_run(path: Path) -> Report:
    """Describe a run by its own record, config.yaml, and the files that it has made so far.

    Raises:
        UserError: config.yaml is no run's, or results.json is damaged.
    """
    config = load_run(path)
    output, rows = Output(path), read_rows(path / "results.json")
    stages: list[dict[str, Any]] = []
    for stage in config.active_stages:
        folder, student = output.checkpoints(stage.name), output.student(stage)
        steps = checkpoint_steps(folder) if folder.is_dir() else []
        stages.append(
            {
                "name": stage.name,
                "kind": stage.kind,
                "updates": stage.updates,
                "updates_done": max(steps, default=0),
                "student": str(student) if student.exists() else None,
            }
        )
    made = [each["student"] for each in stages if each["student"]]
    call = None
    if made:
        sampled = ["--lora", str(made[-1])] if str(made[-1]).endswith(".safetensors") else ["--model", str(made[-1])]
        base = [] if config.model.source == "embedded" or sampled[0] == "--model" else ["--model", config.model.source]
        call = command("hypersd", "sample", *base, *sampled, "--prompt", "a lighthouse at dusk")
    data = {
        "file": str(path),
        "what": "run",
        "model": config.model.source,
        "data": config.data.source,
        "stages": stages,
        "results": len(rows),
        "call": call,
    }
    lines = [f"{path}: a run on {config.model.source}, data {config.data.source}"]
    for each in stages:
        done = f"{each['updates_done']:,} of {each['updates']:,} updates, {each['student'] or 'no student yet'}"
        lines.append(labelled("stage", f"{each['name']} ({each['kind']}): {done}"))
    lines.append(labelled("results", counted(len(rows), "row") if rows else "none yet"))
    return Report(data=data, lines=lines if call is None else [*lines, labelled("try", call)])


def inspect_checkpoints(path: Path) -> Report:
    """Describe the checkpoints of a stage: their steps, and what the newest says of itself; no state is read."""
    from hypersd_jax.training import Checkpointer

    steps = checkpoint_steps(path)
    with Checkpointer(path, read_only=True) as checkpoints:
        found = checkpoints.metadata(steps[-1])
    facts = {key: found[key] for key in ("stage", "base", "seed", "history") if key in found}
    data = {"file": str(path), "what": "checkpoints", "steps": steps, "newest": dict(found)}
    lines = [f"{path}: {counted(len(steps), 'checkpoint')} of a stage, at {', '.join(map(str, steps))} updates"]
    return Report(data=data, lines=[*lines, *(labelled(key, str(value)) for key, value in facts.items())])


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's results.json; [] where there is none yet."""
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: is no list of rows")
    return rows
