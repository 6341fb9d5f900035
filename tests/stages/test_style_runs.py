"""Ordinary LoRA stages: on the base alone, and beside a few-step LoRA that stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from hypersd_jax import adapters
from hypersd_jax.bases import with_dropped
from hypersd_jax.config import LoraStage
from hypersd_jax.distill import corruption
from hypersd_jax.errors import UserError
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.stages import run as stage_run
from hypersd_jax.stages import train
from hypersd_jax.stages.kinds import STUDENT
from hypersd_jax.stages.streams import Draw, drawn_from
from hypersd_jax.weights.lora import read_lora
from tests.helpers.score_runs import (
    TOLERANCE,
    ByHand,
    Opened,
    Step,
    counted,
    open_stage,
    randomised,
    recipe,
    relative_error,
)
from tests.helpers.short_runs import recipe as short_recipe
from tests.helpers.short_runs import records, same_tensors, sample_cheaply, share_steps

ALONE = "  - {name: style, kind: lora, updates: 4, batch_size: 4, learning_rate: 1.0e-2, ema: 0.5, prompt_dropout: 0.5}"
BESIDE = """
  - {name: style, kind: lora, updates: 1, batch_size: 4, learning_rate: 1.0e-2, prompt_dropout: 0.5, snr_gamma: null,
     guidance: 3.0, beside: {k: 2, solver_steps: 8, weight: 0.5}}
"""
RUN = """
  - {name: two, k: 2, solver_steps: 8, updates: 2, batch_size: 4, learning_rate: 1.0e-2, guidance: [2, 4]}
  - {name: style, kind: lora, updates: 4, batch_size: 4, learning_rate: 1.0e-2, ema: 0.5,
     beside: {k: 2, solver_steps: 8}}
"""


class StyleByHand(ByHand):
    """The terms of a style stage's loss."""

    def denoising(self, key: jax.Array, adapter: Any, gamma: float | None) -> float:
        """Noise prediction by the style alone, at uniform times, half of the captions dropped."""
        d = corruption(key, self.shape, self.batch["indices"], times=1000, prompt_dropout=0.5)
        assert 0 < int(d.dropped.sum()) < len(d.dropped)
        t, eps = np.asarray(d.t), np.asarray(d.eps, np.float64)
        cond = with_dropped(self.cond, self.uncond, d.dropped)
        errors = ((self.unet(self.noise(self.batch["latents"], eps, t), t, adapter, cond)[0] - eps) ** 2).mean(
            (1, 2, 3)
        )
        alpha, sigma = (each.reshape(-1) for each in self.at(t))
        snr = (alpha / sigma) ** 2
        return float(np.mean(errors * (1.0 if gamma is None else np.minimum(snr, gamma) / snr)))

    def together(self, key: jax.Array, both: Any, style: Any) -> float:
        """TSCD's loss of both LoRAs, whose teacher is the base with the style, guided."""
        d = self.drawn(
            drawn_from(drawn_from(key, Draw.BESIDE), Draw.REGULARISER), self.opened.frozen.segments, (3.0, 3.0)
        )
        x = self.noise(self.batch["latents"], d.eps, d.t_n)
        prompted, empty = self.unet(x, d.t_n, style)[0], self.unet(x, d.t_n, style, self.uncond)[0]
        before = self.ddim(x, empty + 3.0 * (prompted - empty), d.t_n, d.t_prev)
        target = np.where(
            (d.t_end == d.t_prev).reshape(-1, 1, 1, 1),
            before,
            self.ddim(before, self.unet(before, d.t_prev, both)[0], d.t_prev, d.t_end),
        )
        return float(np.mean((self.ddim(x, self.unet(x, d.t_n, both)[0], d.t_n, d.t_end) - target) ** 2))


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Opened:
    return open_stage(recipe(tmp_path_factory.mktemp("beside"), model, BESIDE), "fast")


@pytest.fixture(scope="module")
def first(beside: Opened) -> Step:
    return beside.step()


def losses(opened: Opened, style: Any) -> tuple[float, dict[str, float]]:
    """The loss with these factors, and its metrics."""
    (phase,) = opened.kind.phases(opened.run.base, opened.stage)
    models = {STUDENT: style}
    value, metrics = jax.jit(phase.loss)(models, models, opened.frozen, opened.batch, opened.key(None))
    return float(value), {name: float(each) for name, each in metrics.items()}


@pytest.mark.parametrize("gamma", [None, 5.0])
def test_denoising_by_hand(tmp_path: Path, model: Path, gamma: float | None) -> None:
    override = f"stages.style.snr_gamma={'null' if gamma is None else gamma}"
    opened = open_stage(recipe(tmp_path, model, ALONE, override))
    hand, style = StyleByHand(opened), randomised(opened.start, 3)
    value, metrics = losses(opened, style)
    assert value == pytest.approx(hand.denoising(opened.key(None), hand.adapter(style), gamma), rel=TOLERANCE)
    assert metrics["calls"] == 1.0


def test_beside_by_hand(beside: Opened, first: Step) -> None:
    """The style denoises alone, and both together are consistent with the guided base in that style."""
    hand, key = StyleByHand(beside), beside.key(None)
    style = randomised(first.before.trainable[STUDENT], 3)
    own = adapters.join(style, beside.run.fresh_scales)
    both = adapters.concatenate([hand.adapter(beside.start), own])
    value, metrics = losses(beside, style)
    denoising, together = hand.denoising(key, own, None), hand.together(key, both, own)
    assert metrics["mse"] == pytest.approx(denoising, rel=TOLERANCE)
    assert metrics["together"] == pytest.approx(together, rel=TOLERANCE)
    assert value == pytest.approx(denoising + 0.5 * together, rel=TOLERANCE)


def test_only_the_style_is_trained(beside: Opened, first: Step) -> None:
    """From a style of nothing, whose output factors alone have a gradient; the few-step LoRA is read, not trained."""
    assert first.after.trainable.keys() == {STUDENT}
    before, after = first.before.trainable[STUDENT], first.after.trainable[STUDENT]
    assert relative_error(after, before) > 1e-3
    assert not any(np.asarray(pair["up"]).any() for pair in before.values())
    under = beside.frozen.under
    for path, pair in beside.start.items():
        np.testing.assert_array_equal(under[path]["up"], pair["up"])


def test_the_logged_calls_are_those_that_are_made(beside: Opened) -> None:
    ((calls, whole, half),) = counted(beside, 0, [beside.key(None)])
    assert calls == {"calls": whole}
    assert (whole, half) == (1 + 1 + 2 + 1, 0)


def _train(folder: Path, model: Path, *overrides: str, stages: str = RUN) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        share_steps(patch)
        sample_cheaply(patch)
        return train(short_recipe(folder, model, *overrides, stages=stages))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    return _train(tmp_path_factory.mktemp("run"), model)


def test_the_files_of_a_run(trained: Path, model: Path) -> None:
    """Both LoRAs as one, which says how to sample; the style alone, which does not, and the sum is exact."""
    loras = trained / "loras"
    assert {path.name for path in loras.glob("*.safetensors")} == {
        "two.safetensors",
        "style.safetensors",
        "style.style.safetensors",
    }
    pipe = Pipeline.from_pretrained(model)
    pipe.load_lora(loras / "style.safetensors")
    settings = pipe.settings()
    assert (settings.steps, settings.sampler, settings.guidance) == (2, "ddim", 0.0)
    as_one = pipe("lion", output="latent")
    pipe.unload_lora()
    pipe.load_lora(loras / "two.safetensors")
    alone = pipe.settings()
    fast = pipe("lion", output="latent")
    pipe.load_lora(loras / "style.style.safetensors")
    assert pipe.settings() == alone
    np.testing.assert_allclose(pipe("lion", output="latent"), as_one, rtol=0, atol=1e-4)
    assert np.abs(as_one - fast).max() > 1e-3
    shapes = pipe.base.shapes
    ranks = [
        {entry["down"].shape[-1] for entry in read_lora(loras / name, shapes).adapters["unet"].values()}
        for name in ("two.safetensors", "style.style.safetensors", "style.safetensors")
    ]
    assert ranks == [{4}, {4}, {8}]


def test_it_resumes_bit_for_bit(trained: Path, tmp_path: Path, model: Path) -> None:
    short = _train(tmp_path, model, "stages.style.updates=2")
    output = _train(tmp_path, model)
    assert output == short
    for name in ("style.safetensors", "style.style.safetensors"):
        same_tensors(output / "loras" / name, trained / "loras" / name)
    assert [line["together"] for line in records(output) if line["stage"] == "style"] == [
        line["together"] for line in records(trained) if line["stage"] == "style"
    ]


def test_a_style_alone_and_a_start(trained: Path, tmp_path: Path, model: Path) -> None:
    """A file that the run starts from is trained on; with `beside` it stays, and another is trained."""
    output = _train(tmp_path / "a", model, stages=ALONE)
    assert [path.name for path in (output / "loras").glob("*.safetensors")] == ["style.safetensors"]
    header = read_lora(output / "loras" / "style.safetensors", Pipeline.from_pretrained(model).base.shapes).metadata
    assert header["ss_training_comment"] == "hypersd_jax lora on the base"
    assert not header.keys() & {"steps", "sampler", "guidance", "timesteps"}
    start = f"lora.start={trained / 'loras' / 'two.safetensors'}"
    again = _train(tmp_path / "b", model, start, "stages.style.beside={k: 2, solver_steps: 8}", stages=ALONE)
    assert {path.name for path in (again / "loras").glob("*.safetensors")} == {
        "style.safetensors",
        "style.style.safetensors",
    }


def test_what_is_refused(beside: Opened, tmp_path: Path, model: Path) -> None:
    with pytest.raises(UserError, match=r"stages\.style\.beside: needs a few-step LoRA: lora\.start, or a stage"):
        beside.kind.check(beside.run, beside.stage, [])
    alone = LoraStage(kind="lora", name="style", updates=1, batch_size=4)
    with pytest.raises(UserError, match=r"stages\.style: kind=lora after another stage needs beside"):
        beside.kind.check(beside.run, alone, ["two"])
    stage_run.check_stages(open_stage(recipe(tmp_path, model, ALONE)).run)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("snr_gamma=0", "snr_gamma must be above 0"),
        ("prompt_dropout=1.0", "prompt_dropout must lie in [0, 1)"),
        ("guidance=0.5", "guidance must be at least 1"),
        ("beside={k: 3, solver_steps: 8}", "solver_steps (8) must be a multiple of k (3)"),
        ("beside={weight: 0}", "weight must be above 0"),
        ("k=4", "k"),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, override: str, line: str) -> None:
    with pytest.raises(UserError) as raised:
        recipe(tmp_path, tmp_path, ALONE, f"stages.style.{override}")
    assert line in str(raised.value)
