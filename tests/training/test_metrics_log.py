from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax import training
from hypersd_jax.errors import UserError


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def metrics(loss: float) -> dict:
    return {"loss": jnp.float32(loss), "grad_norm": jnp.float32(0.1), "skipped": jnp.int32(0)}


def test_each_step_is_one_line_one_step_late(tmp_path):
    with training.MetricsLog(tmp_path, total=3, stage="teacher") as log:
        log.write(1, metrics(1.5))
        assert lines(tmp_path) == []
        log.write(2, metrics(0.3))
        assert [line["step"] for line in lines(tmp_path)] == [1]
        log.flush()
        assert [line["step"] for line in lines(tmp_path)] == [1, 2]
        log.write(3, metrics(0.2))
    first, second, third = lines(tmp_path)
    assert first.keys() == {"stage", "step", "loss", "grad_norm", "skipped", "seconds"}
    assert (first["stage"], first["loss"], second["grad_norm"], second["skipped"]) == ("teacher", 1.5, 0.1, 0)
    assert (second["loss"], third["step"]) == (0.3, 3)
    assert first["seconds"] >= 0
    assert list((tmp_path / "tensorboard" / "teacher").glob("events.out.tfevents.*"))


def test_non_finite_values_are_null(tmp_path):
    with training.MetricsLog(tmp_path, total=1, stage="a") as log:
        log.write(1, metrics(np.nan))
    assert lines(tmp_path)[0]["loss"] is None


def write_stage(folder, stage: str, steps: int, resume: int = 0) -> None:
    with training.MetricsLog(folder, total=9, stage=stage, resume_step=resume, tensorboard=False) as log:
        for step in range(resume + 1, steps + 1):
            log.write(step, metrics(float(step)))


def test_steps_between_lines_share_the_time(tmp_path, monkeypatch):
    clock = iter([10.0, 14.0, 16.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock, 0.0))
    with training.MetricsLog(tmp_path, total=9, stage="a", resume_step=2, tensorboard=False) as log:
        log.write(4, {})
        log.write(5, {})
    assert [line["seconds"] for line in lines(tmp_path)] == [2.0, 2.0]
    assert not (tmp_path / "tensorboard").exists()


def test_resuming_drops_the_stages_lines_beyond_the_restored_step(tmp_path):
    write_stage(tmp_path, "teacher", 3)
    write_stage(tmp_path, "tscd-8", 5)
    write_stage(tmp_path, "tscd-8", 6, resume=2)
    found = [(line["stage"], line["step"]) for line in lines(tmp_path)]
    assert found == [("teacher", n) for n in (1, 2, 3)] + [("tscd-8", n) for n in (1, 2, 3, 4, 5, 6)]


@pytest.mark.parametrize("tail", ['{"stage": "teacher", "st', "\x00\x00\x00", '{"stage": "teacher", "step": 3}'])
def test_an_unfinished_last_line_is_repaired(tmp_path, tail):
    write_stage(tmp_path, "teacher", 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(tail)
    write_stage(tmp_path, "teacher", 4, resume=2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


def test_a_foreign_file_is_refused_and_left_alone(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("step,loss\n1,2\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 1"):
        training.MetricsLog(tmp_path, total=1, stage="a")
    assert (tmp_path / "metrics.jsonl").read_text() == "step,loss\n1,2\n"
