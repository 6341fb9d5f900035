"""A stage may become longer after it has ended, as long as nothing stands on it as it was."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from hypersd_jax.config import Config, load_config
from hypersd_jax.errors import UserError
from hypersd_jax.stages import train
from hypersd_jax.training import newest_step
from tests.helpers.short_runs import (
    ADAPTER,
    AUTOENCODER,
    TWO,
    recipe,
    records,
    same_tensors,
    sample_cheaply,
    share_steps,
)

SCORE = """
  - {name: two, kind: dmd, updates: 6, batch_size: 4, learning_rate: 1.0e-2, ema: 0.5, fake_updates: 1, weight: 1.0,
     regression: {pairs: 8, steps: 2, teacher: base}}
"""
MODEL = "model/vae/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        share_steps(patch)
        sample_cheaply(patch)
        yield


def again(folder: Path, *overrides: str) -> Config:
    return load_config(folder / "recipe.yaml", overrides)


@pytest.mark.parametrize(
    ("stages", "name", "student"),
    [(ADAPTER, "two", "loras/two.safetensors"), (SCORE, "two", "loras/two.safetensors"), (AUTOENCODER, "s", MODEL)],
    ids=("adapter", "score", "whole"),
)
def test_a_lengthened_stage_is_one_that_was_as_long_from_the_start(tmp_path, model, stages, name, student):
    """At a constant learning rate, bit for bit."""
    seldom = "log.checkpoint_every=100"  # each stage saves when it ends
    whole = train(recipe(tmp_path / "whole", model, seldom, stages=stages))
    grown = train(recipe(tmp_path / "grown", model, seldom, "stages.0.updates=3", stages=stages))
    before = (grown / student).read_bytes()
    train(again(tmp_path / "grown", seldom))
    same_tensors(grown / student, whole / student)
    assert records(grown) == records(whole)
    assert load_config(grown / "config.yaml").stages[0].updates == 6
    if name == "two":
        assert (grown / "earlier" / "two-3.safetensors").read_bytes() == before
        assert [path.name for path in (grown / "loras").glob("*.safetensors")] == ["two.safetensors"]


def test_a_decaying_learning_rate_goes_by_the_new_length(tmp_path, model):
    out = train(recipe(tmp_path, model, "stages.0.updates=3", "stages.0.schedule=linear"))
    train(again(tmp_path, "stages.0.schedule=linear"))
    rates = [line["lr"] for line in records(out)]
    assert rates == pytest.approx([1e-2, 1e-2 * 2 / 3, 1e-2 / 3, 1e-2 / 2, 1e-2 / 3, 1e-2 / 6])


def test_lengths_that_are_refused(tmp_path, model):
    out = train(recipe(tmp_path, model, stages=TWO))
    loras = {path.name: path.read_bytes() for path in (out / "loras").glob("*.safetensors")}
    with pytest.raises(UserError, match=r"stages\.one\.updates=3: 4 are done in .*out; set at least 4"):
        train(again(tmp_path, "stages.one.updates=3"))
    with pytest.raises(
        UserError, match=r"stages\.two\.updates=8: it was 6 when .*delete .*checkpoints/one, .*loras/one\.s"
    ):
        train(again(tmp_path, "stages.two.updates=8"))
    with pytest.raises(UserError, match=r"another configuration, stages\.1\.learning_rate"):
        train(again(tmp_path, "stages.one.learning_rate=0.5", "stages.one.updates=9"))
    assert {path.name: path.read_bytes() for path in (out / "loras").glob("*.safetensors")} == loras
    assert not (out / "earlier").exists()
    # What is said to be deleted is enough.
    shutil.rmtree(out / "checkpoints" / "one")
    (out / "loras" / "one.safetensors").unlink()
    train(again(tmp_path, "stages.two.updates=8", "stages.one.updates=2"))
    assert [(line["stage"], line["step"]) for line in records(out)] == [
        *(("two", step) for step in range(1, 9)),
        *(("one", step) for step in range(1, 3)),
    ]
    whole = train(recipe(tmp_path / "whole", model, "stages.two.updates=8", "stages.one.updates=2", stages=TWO))
    same_tensors(out / "loras" / "one.safetensors", whole / "loras" / "one.safetensors")


def test_a_lengthening_that_ends_early_leaves_no_stale_student(tmp_path, model, monkeypatch):
    """Between the last checkpoint and the export, where a student of fewer updates would pass for the new one."""
    out = train(recipe(tmp_path, model, "stages.0.updates=2"))
    with monkeypatch.context() as patch:

        def cut_off(*_given: object, **_more: object) -> None:
            raise RuntimeError("cut off")

        patch.setattr("hypersd_jax.stages.consistency.finish", cut_off)
        with pytest.raises(RuntimeError, match="cut off"):
            train(again(tmp_path, "stages.0.updates=4"))
    assert newest_step(out / "checkpoints" / "two") == 4
    train(again(tmp_path, "stages.0.updates=4"))
    whole = train(recipe(tmp_path / "whole", model, "stages.0.updates=4"))
    same_tensors(out / "loras" / "two.safetensors", whole / "loras" / "two.safetensors")
