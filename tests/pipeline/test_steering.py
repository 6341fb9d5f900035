"""Attention steered away from negative prompts, and steps that are sampled unlike the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hypersd_jax.diffusion import begin, guided
from hypersd_jax.errors import UserError
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.pipeline.settings import table_for
from hypersd_jax.pipeline.steering import Section, Steering, sections, written
from tests.helpers.compilations import Compilations
from tests.helpers.tiny_xl import tiny_xl
from tests.pipeline.test_pipeline import lora

PROMPTS = ["red apple, fluent flat style", "a cat face"]
CALL: dict[str, Any] = {"steps": 3, "guidance": 0.0, "sampler": "ddim", "output": "latent"}


@pytest.fixture(scope="module")
def pipe(model: Path) -> Pipeline:
    return Pipeline.from_pretrained(model)


@pytest.fixture(scope="module")
def compilations() -> Compilations:
    return Compilations.counting()


# MARK: attention


def test_off_changes_nothing_and_compiles_nothing(pipe: Pipeline, compilations: Compilations) -> None:
    plain = pipe(PROMPTS, **CALL)
    before = compilations.count
    for off in ({}, {"nag_scale": 0.0}, {"nag_scale": 1.0, "nag_tau": 9.0}):
        np.testing.assert_array_equal(pipe(PROMPTS, **CALL, **off), plain)
    assert compilations.count == before


def test_its_numbers_compile_nothing(pipe: Pipeline, compilations: Compilations) -> None:
    first = pipe(PROMPTS, "blob style", **CALL, nag_scale=5.0)
    before = compilations.count
    for values in ((3.0, 2.5, 0.25), (5.0, 1.1, 0.25), (5.0, 2.5, 1.0)):
        numbers = dict(zip(("nag_scale", "nag_tau", "nag_alpha"), values, strict=True))
        other = pipe(PROMPTS, "blob style", **CALL, **numbers)
        assert np.abs(other - first).max() > 1e-4, values
    assert np.abs(pipe(PROMPTS, "a blue cat", **CALL, nag_scale=5.0) - first).max() > 1e-4
    assert compilations.count == before
    assert np.abs(first - pipe(PROMPTS, **CALL)).max() > 1e-3


def test_limits(pipe: Pipeline) -> None:
    """Alpha 0 takes nothing of it, and a negative prompt that is the prompt leaves nothing to steer away from."""
    plain = pipe(PROMPTS, **CALL)
    np.testing.assert_allclose(pipe(PROMPTS, "blob", **CALL, nag_scale=5.0, nag_alpha=0.0), plain, rtol=0, atol=1e-5)
    np.testing.assert_allclose(pipe(PROMPTS, PROMPTS, **CALL, nag_scale=5.0), plain, rtol=0, atol=1e-4)


def test_each_prompt_has_its_own(pipe: Pipeline) -> None:
    both = pipe(PROMPTS, ["blob style", None], **CALL, nag_scale=4.0, num_images=2)
    alone = pipe(PROMPTS[0], "blob style", **CALL, nag_scale=4.0, num_images=2)
    np.testing.assert_allclose(both[:2], alone, rtol=0, atol=2e-5)
    np.testing.assert_array_equal(both, pipe(PROMPTS, ["blob style", ""], **CALL, nag_scale=4.0, num_images=2))
    stepped = pipe(PROMPTS, ["blob style", None], **CALL, nag_scale=4.0, num_images=2, stepwise=True)
    np.testing.assert_array_equal(stepped, both)


def test_a_long_negative_is_read_in_as_many_windows(pipe: Pipeline) -> None:
    long = "a blue cat with green stripes, " * 6
    call = {**CALL, "long_prompts": "chunk", "nag_scale": 4.0}
    assert np.abs(pipe(PROMPTS, long, **call) - pipe(PROMPTS, long[:60], **call)).max() > 1e-4


def test_zeros_are_no_negative_prompt(tmp_path: Path) -> None:
    """SDXL's unconditional is zeros, whose attention is; it is steered away from "" then, guided or not."""
    pipe = Pipeline.from_pretrained(tiny_xl(tmp_path / "xl"))
    for guidance in (0.0, 3.0):
        call = {**CALL, "steps": 2, "guidance": guidance, "nag_scale": 5.0}
        unsaid, empty = pipe("red apple", None, **call), pipe("red apple", "", **call)
        same = np.abs(unsaid - empty).max()
        assert (same > 1e-4) if guidance else (same == 0), guidance
        assert np.abs(unsaid - pipe("red apple", None, **{**call, "nag_scale": 0})).max() > 1e-4


# MARK: by step


def test_sections() -> None:
    assert sections(Steering(), 4) == (Section(0, 4, True, False),)
    assert sections(Steering(guidance_steps=(1, 1)), 3) == (Section(0, 1, True, False), Section(1, 3, False, False))
    assert sections(Steering(guidance_steps=(2, None), base_steps=(1, 2)), 4) == (
        Section(0, 1, False, True),
        Section(1, 2, True, True),
        Section(2, 4, True, False),
    )
    assert sections(Steering(guidance_steps=(1, None)), 2) == (Section(0, 2, True, False),)
    assert [written(steps) for steps in (None, (1, 1), (2, 4), (2, None))] == [None, "1", "2-4", "2-"]


@pytest.mark.parametrize("stepwise", [False, True])
@pytest.mark.parametrize(
    ("guidance_steps", "base_steps"), [((1, 1), None), ((2, None), None), (None, (1, 1)), ((1, 2), (1, 1))]
)
def test_as_a_loop_by_hand(pipe: Pipeline, guidance_steps: Any, base_steps: Any, stepwise: bool) -> None:
    """Each step by `Pipeline.predict`, with and without the LoRAs, which are of UNet and text encoder."""
    call = {**CALL, "guidance": 3.0 if guidance_steps else 0.0}
    text = {
        path: {
            "down": np.full((16, 2), 0.1, np.float32),
            "up": np.full((2, 16), 0.2, np.float32),
            "scale": np.ones(2, np.float32),
        }
        for path in ("text_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.0.self_attn.v_proj")
    }
    start = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
    pipe.add_lora("a", {**lora(pipe, 4, 0), "text_encoder": text})
    call |= {"guidance_steps": guidance_steps, "base_steps": base_steps, "stepwise": stepwise}
    found = pipe(PROMPTS, "blob" if guidance_steps else None, **call, latents=start)
    table = table_for(pipe.settings(steps=3, sampler="ddim"), pipe.base.scheduler_config)
    x = np.asarray(begin(table, start).x)
    for i in range(3):
        pipe.set_lora_scale("a", float(not inside(base_steps, i + 1)))
        cond, uncond = pipe.encode_prompts(PROMPTS, "blob")
        t = np.float32(table["timesteps"][i])
        eps = np.asarray(pipe.predict(x, t, cond))
        if inside(guidance_steps, i + 1):
            eps = np.asarray(guided(pipe.predict(x, t, uncond), eps, np.float32(3.0)))
        x0 = (x - table["sigma"][i] * eps) / table["alpha"][i]
        x = table["c_x0"][i] * x0 + table["c_eps"][i] * eps
    pipe.unload_lora()
    np.testing.assert_allclose(found, x, rtol=0, atol=2e-4)


def inside(steps: Any, step: int) -> bool:
    return steps is not None and steps[0] <= step <= (steps[1] or 3)


def test_all_and_none_are_the_plain_calls(pipe: Pipeline, compilations: Compilations) -> None:
    call = {**CALL, "guidance": 3.0}
    plain = pipe(PROMPTS, **call)
    before = compilations.count
    np.testing.assert_array_equal(pipe(PROMPTS, **call, guidance_steps=(1, None)), plain)
    assert compilations.count == before
    base = pipe(PROMPTS, **CALL)
    pipe.add_lora("a", lora(pipe, 4, 0))
    np.testing.assert_array_equal(pipe(PROMPTS, **CALL, base_steps=(1, 3)), base)
    first = pipe(PROMPTS, **CALL, base_steps=(1, 1))
    pipe.fuse_lora()
    np.testing.assert_allclose(pipe(PROMPTS, **CALL, base_steps=(1, 1)), first, rtol=0, atol=5e-5)
    pipe.unfuse_lora()
    pipe.unload_lora()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"nag_scale": -1.0}, "nag_scale=-1 is negative"),
        ({"nag_scale": "much"}, "nag_scale is not a number"),
        ({"nag_tau": 0.0}, "nag_tau=0 must be above 0"),
        ({"nag_alpha": 1.5}, r"nag_alpha=1\.5 must be in 0\.\.1"),
        ({"guidance_steps": (1, 1)}, "guidance_steps: guidance=0 is off"),
        ({"guidance": 3.0, "guidance_steps": (0, 1)}, r"guidance_steps=\(0, 1\) must be the first and the last"),
        ({"guidance": 3.0, "guidance_steps": 1}, "guidance_steps=1 must be the first and the last step"),
        ({"guidance": 3.0, "guidance_steps": (3, 4)}, "guidance_steps=3-4, but 3 steps are taken"),
        ({"base_steps": (2, 1)}, r"base_steps=\(2, 1\) must be"),
        ({"base_steps": (1, 1)}, "base_steps: no LoRA is loaded"),
    ],
)
def test_what_does_not_fit_is_named(pipe: Pipeline, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pipe(PROMPTS, **{**CALL, **given})
