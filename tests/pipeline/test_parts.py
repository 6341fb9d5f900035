"""The parts of a call one by one, and the settings that come back with its images."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import jax
import numpy as np
import pytest

from hypersd_jax.diffusion import guided
from hypersd_jax.diffusion.prediction import to_x0_eps
from hypersd_jax.errors import UserError
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.pipeline.settings import table_for
from tests.helpers.lora_files import random_adapter
from tests.helpers.tiny_model import tiny_model

PROMPTS = ["red apple, fluent flat style", "a cat face"]
NEGATIVES = [None, "blob style"]
IMAGES = np.random.default_rng(0).random((2, 16, 16, 3)).astype(np.float32)
CALL: dict[str, Any] = {"steps": 1, "sampler": "ddim", "output": "latent"}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """With a LoRA, which every part of a call must read."""
    pipe = Pipeline.from_pretrained(tiny_model(tmp_path_factory.mktemp("parts") / "model"))
    pipe.add_lora("style", {"unet": random_adapter(pipe.base.shapes["unet"], 0)})
    return pipe


@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_predict_is_what_a_step_does(pipe: Pipeline, guidance: float) -> None:
    """One DDIM step by hand, from `predict` on the conditioning of `encode_prompts`, ends where the call does."""
    latents = np.random.default_rng(1).standard_normal((2, 8, 8, 4)).astype(np.float32)
    expected, settings = pipe.generate(
        PROMPTS, NEGATIVES if guidance else None, latents=latents, guidance=guidance, **CALL
    )
    table = {key: value[0] if value.ndim else value for key, value in _table(pipe, settings).items()}
    cond, uncond = pipe.encode_prompts(PROMPTS, NEGATIVES)
    x = latents * table["init_noise_sigma"]
    output = pipe.predict(x, table["timesteps"], cond, uncond if settings.guided else None, guidance=guidance)
    x0, eps = to_x0_eps(output, x, table["alpha"], table["sigma"], settings.prediction_type)
    np.testing.assert_allclose(table["c_x0"] * x0 + table["c_eps"] * eps, expected, rtol=0, atol=1e-4)
    halves = [pipe.predict(x, [table["timesteps"]] * 2, each) for each in (uncond, cond)]
    by_hand = guided(*halves, guidance) if settings.guided else halves[1]
    np.testing.assert_allclose(output, by_hand, rtol=0, atol=1e-5)


def _table(pipe: Pipeline, settings: Any) -> dict[str, np.ndarray]:
    return table_for(settings, pipe.base.scheduler_config)


def test_predict_reads_the_lora(pipe: Pipeline) -> None:
    cond = pipe.encode_prompts(PROMPTS)
    x = np.random.default_rng(2).standard_normal((2, 8, 8, 4)).astype(np.float32)
    with_lora = np.asarray(pipe.predict(x, 500, cond))
    unet, params, adapter = (
        pipe.base.components.unet,
        pipe.base.params["unet"],
        pipe._loras.adapters()["unet"],
    )
    by_hand = jax.jit(lambda: unet(params, x, np.full(2, 500), cond.context, adapter=adapter))()
    np.testing.assert_allclose(with_lora, by_hand, rtol=0, atol=1e-5)
    pipe.set_lora_scale("style", 0.0)
    assert np.abs(with_lora - pipe.predict(x, 500, cond)).max() > 1e-3
    pipe.set_lora_scale("style", 1.0)


def test_encoding_and_decoding_are_the_calls(pipe: Pipeline) -> None:
    call = {**CALL, "guidance": 0.0}
    latents = pipe(PROMPTS, **call)
    np.testing.assert_array_equal(pipe.decode(latents), pipe(PROMPTS, **{**call, "output": "np"}))
    # What a black mask keeps are the latents that the image is read as.
    kept = pipe(PROMPTS, image=IMAGES, mask=np.zeros((16, 16)), **call)
    np.testing.assert_allclose(kept, pipe.encode_images(IMAGES), rtol=0, atol=1e-6)
    cond, uncond = pipe.encode_prompts(PROMPTS, "")
    np.testing.assert_array_equal(pipe.encode_prompts(PROMPTS).context, cond.context)
    np.testing.assert_array_equal(uncond.context, pipe.encode_prompts(["", ""]).context)


def test_the_settings_come_back(pipe: Pipeline) -> None:
    images, settings = pipe.generate(
        PROMPTS, steps=4, guidance=3.0, seed=-5, image=IMAGES[0], strength=0.5, stepwise=True, output="np"
    )
    assert images.shape == (2, 16, 16, 3)
    assert dataclasses.asdict(settings) == {
        "sampler": "ddim",
        "steps": 4,
        "eta": 0.0,
        "guidance": 3.0,
        "guided": True,
        "spacing": "trailing",
        "timesteps": None,
        "original_inference_steps": None,
        "respacing": None,
        "prediction_type": "epsilon",
        "seed": -5,
        "num_images": 1,
        "height": 16,
        "width": 16,
        "strength": 0.5,
        "control_scales": (),
        "guess_mode": False,
        "long_prompts": "cut",
        "tiled": False,
        "nag_scale": 0.0,
        "nag_tau": 2.5,
        "nag_alpha": 0.25,
        "guidance_steps": None,
        "base_steps": None,
    }
    assert pipe.settings(timesteps=[999, 499]).steps == 2
    assert pipe.settings(sampler="lcm").original_inference_steps == 50
    assert pipe.settings(sampler="euler").spacing == "linspace"


def test_a_call_shows_its_arguments() -> None:
    assert (
        inspect.signature(Pipeline.__call__).parameters.keys() == inspect.signature(Pipeline.generate).parameters.keys()
    )
    assert "num_images" in inspect.signature(Pipeline.__call__).parameters


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe, cond: pipe.predict(IMAGES, 1, cond), r"x has shape \(2, 16, 16, 3\), not \(B, h, w, 4\)"),
        (lambda pipe, cond: pipe.predict(np.zeros((1, 8, 8, 4)), 1, cond), "conditioning is of 2 prompts, but x has"),
        (lambda pipe, cond: pipe.predict(np.zeros((2, 8, 8, 4)), [1, 2, 3], cond), r"t has shape \(3,\)"),
        (lambda pipe, cond: pipe.predict(np.zeros((2, 8, 8, 4)), 1, cond, guidance=2), "guidance=2 needs an uncond"),
        (lambda pipe, cond: pipe.decode(IMAGES), r"latents have shape \(2, 16, 16, 3\), not \(B, h, w, 4\)"),
        (lambda pipe, cond: pipe.encode_images(2 * IMAGES), r"images holds values outside 0\.\.1"),
        (lambda pipe, cond: pipe.encode_images(IMAGES[:, :1]), "height=0 must be a positive multiple"),
        (lambda pipe, cond: pipe.encode_prompts([3]), "prompt must be text, not 3"),
        (lambda pipe, cond: pipe.encode_prompts(PROMPTS, ["x"] * 3), "negative_prompt: 3 given for 2 prompts"),
    ],
)
def test_what_does_not_fit_is_named(pipe: Pipeline, call: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(pipe, pipe.encode_prompts(PROMPTS))
