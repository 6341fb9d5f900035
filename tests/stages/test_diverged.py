"""Steps that are not finite: a warning at once, an end of the run after too many, and no export of such a student."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from hypersd_jax.errors import UserError
from hypersd_jax.stages import adapter_student, train
from hypersd_jax.training import SkipWatch
from tests.helpers.short_runs import ADAPTER, AUTOENCODER, recipe, share_steps

DIVERGED = ["stages.0.learning_rate=1e6", "stages.0.updates=40", "log.stop_after_skipped=5", "log.checkpoint_every=100"]
ADVERSARIAL = ADAPTER.replace("ema: 0.5", "ema: 0.5, adversarial: {features: encoder}")
SKIPPED = "loss or gradient is not finite"
SCORE = """
  - {name: two, kind: dmd, updates: 40, batch_size: 4, learning_rate: 1.0e-2, ema: 0.5, fake_updates: 1, weight: 1.0}
"""


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        share_steps(patch)
        yield


def nothing_exported(output: Path) -> None:
    assert not list((output / "loras").iterdir())
    assert not (output / "models").exists()
    assert not (output / "model").exists()


@pytest.mark.parametrize(
    ("stages", "name", "every"),
    [(ADAPTER, "two", 1), (ADAPTER, "two", 7), (ADVERSARIAL, "two", 1), (SCORE, "two", 1), (AUTOENCODER, "s", 1)],
    ids=("adapter", "every-7", "adversarial", "score", "whole"),
)
def test_a_diverged_run_is_warned_of_and_stopped(tmp_path, model, stages, name, every):
    config = recipe(tmp_path, model, *DIVERGED, f"log.every={every}", stages=stages)
    warned = rf"stage {name}, update \d+ of 40: {SKIPPED}.*lower stages\.{name}\.learning_rate \(1e\+06\)"
    stopped = rf"stages\.{name}: 5 updates in a row, up to update \d+ of 40, were skipped.*nothing of this.*exported"
    with pytest.warns(UserWarning, match=warned) as warnings, pytest.raises(UserError, match=stopped):
        train(config)
    assert len([each for each in warnings if "not finite" in str(each.message)]) == 1
    nothing_exported(tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] <= 12


def counted(watch: SkipWatch, counters: list[int], first: int = 1) -> None:
    for number, counter in enumerate(counters, first):
        watch.add(number, jnp.int32(counter))
    watch.settle()


def watch(**settings: int) -> SkipWatch:
    return SkipWatch("two", **{"updates": 100, "limit": 3, "remedy": "do better", "skipped": 0} | settings)


def test_skips_are_counted_in_a_row():
    each = watch()
    with pytest.warns(UserWarning, match="update 2 of 100"):
        counted(each, [0, 1, 2, 2, 3, 4, 4])
    assert each.in_a_row == 0
    with (
        pytest.warns(UserWarning, match=SKIPPED),
        pytest.raises(UserError, match="3 updates in a row, up to update 4"),
    ):
        counted(watch(), [0, 1, 2, 3, 4])


def test_skips_are_counted_on_after_a_restart():
    """Two before, one after: a run that fails cannot pass by being started again."""
    with pytest.warns(UserWarning, match=SKIPPED), pytest.raises(UserError, match="up to update 13"):
        counted(watch(skipped=7, in_a_row=2), [8], first=13)


def test_half_of_a_short_stage_is_too_many():
    with (
        pytest.warns(UserWarning, match=SKIPPED),
        pytest.raises(UserError, match="2 updates in a row, up to update 2"),
    ):
        counted(watch(updates=4, limit=20), [1, 2, 3, 4])


def test_a_resumed_run_warns_again(tmp_path, model):
    config = recipe(tmp_path, model, *DIVERGED, "log.checkpoint_every=2")
    for _ in range(2):
        with pytest.warns(UserWarning, match=SKIPPED), pytest.raises(UserError, match="5 updates in a row"):
            train(config)
    nothing_exported(tmp_path / "out")


def test_weights_that_are_not_finite_are_not_exported(tmp_path, model):
    """A rate whose first update overflows: the loss before it was finite, so that nothing was skipped."""
    config = recipe(tmp_path, model, "stages.two.learning_rate=3e38", "stages.two.updates=1")
    for _ in range(2):
        with pytest.raises(UserError, match=r"stages\.two: (its weights|8 of 8 images).* not finite.*exported; lower"):
            train(config)
    nothing_exported(tmp_path / "out")


def test_images_that_are_not_finite_are_not_exported(tmp_path, model):
    config = recipe(tmp_path, model, "stages.two.learning_rate=1e25", "stages.two.updates=1")
    for _ in range(2):
        with pytest.raises(UserError, match=r"stages\.two: 8 of 8 images.*not finite, so nothing of it is exported"):
            train(config)
    nothing_exported(tmp_path / "out")
    assert not list((tmp_path / "out" / "samples").iterdir())


def test_previews_that_are_not_finite_cause_a_warning(tmp_path, model):
    settings = ["stages.two.learning_rate=1e25", "stages.two.updates=4", "log.sample_every=1"]
    with (
        pytest.warns(UserWarning, match=r"samples/two-000001\.png, stage two: 8 of 8 images"),
        pytest.raises(UserError),
    ):
        train(recipe(tmp_path, model, *settings))
    assert (tmp_path / "out" / "samples" / "two-000001.png").is_file()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_student_that_has_hardly_moved_is_exported_with_a_warning(tmp_path, model, dtype):
    """Its first updates are below the type's resolution; that is no adapter which is off."""
    rate = 1e-9 if dtype == "bfloat16" else 1e-12
    settings = [
        f"model.dtype={dtype}",
        f"stages.two.learning_rate={rate}",
        "stages.two.warmup=500",
        "stages.two.updates=2",
    ]
    config = recipe(tmp_path, model, *settings)
    with pytest.warns(UserWarning, match=rf"samples/two\.png: the student of two samples exactly.*seen in {dtype}"):
        train(config)
    assert (tmp_path / "out" / "loras" / "two.safetensors").is_file()


@pytest.mark.parametrize("rate", [1e-6, 1e-2])
def test_an_adapter_that_is_not_on_is_a_defect(tmp_path, model, monkeypatch, rate):
    config = recipe(tmp_path, model, f"stages.two.learning_rate={rate}", "stages.two.updates=2")
    sampled = adapter_student._sampled
    monkeypatch.setattr(
        adapter_student,
        "_sampled",
        lambda run, stage, student: sampled(run, stage, jax.tree.map(jnp.zeros_like, student)),
    )
    for _ in range(2):
        with pytest.raises(RuntimeError, match="its adapter is not on"):
            train(config)
    nothing_exported(tmp_path / "out")


def test_a_fully_fine_tuned_unet_that_has_hardly_moved(tmp_path, model):
    stage = SCORE.replace("kind: dmd", "kind: dmd, student: unet, times: [800]").replace("updates: 40", "updates: 1")
    config = recipe(tmp_path, model, "model.dtype=bfloat16", stages=stage)
    (found,) = config.stages
    config = dataclasses.replace(config, stages=(dataclasses.replace(found, learning_rate=1e-12),))
    with pytest.warns(UserWarning, match="too little to be seen in bfloat16"):
        train(config)
    assert (tmp_path / "out" / "models" / "two" / "model_index.json").is_file()
