"""Image to image and inpainting: the last steps of a schedule by diffusers' pipelines' own rules."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from hypersd_jax.diffusion import Known, solver_table
from hypersd_jax.errors import UserError

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from tests.helpers.solver_runs import CONFIGS, SCHEDULERS, SHAPE, error, inputs, make_scheduler, ours, theirs

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers

STRENGTHS = (0.07, 0.3, 0.5, 0.58, 0.75, 0.9999, 1.0)  # 0.58 * 50 is 28.999... in floating point
ETA = {"ddim": 0.3, "tcd": 0.3}
CLEAN = np.random.default_rng(7).normal(size=SHAPE).astype(np.float32)
MASK = (np.random.default_rng(8).random((*SHAPE[:3], 1)) > 0.5).astype(np.float32)


def scheduler_of(name, config, steps, custom=None):
    scheduler = make_scheduler(name, config, **({"timestep_spacing": "trailing"} if name == "ddim" else {}))
    scheduler.set_timesteps(**({"num_inference_steps": steps} if custom is None else {"timesteps": custom}))
    return scheduler


def left_by_strength(scheduler, steps, strength):
    """The timesteps that StableDiffusionImg2ImgPipeline keeps; it also sets the scheduler's first index."""
    pipeline = SimpleNamespace(scheduler=scheduler)
    return diffusers.StableDiffusionImg2ImgPipeline.get_timesteps(pipeline, steps, strength, None)[0]


def compare(name, config, steps, strength, monkeypatch, *, known=False, custom=None):
    config = {"prediction_type": "epsilon", **config}
    scheduler = scheduler_of(name, config, steps, custom)
    left = left_by_strength(scheduler, steps, strength)
    if len(left) == 0:
        with pytest.raises(UserError, match=f"strength={strength} of {steps} steps"):
            solver_table(name, steps, scheduler_config=config, timesteps=custom, strength=strength)
        return
    eta = ETA.get(name, 0.0)
    table = solver_table(name, steps, eta=eta, scheduler_config=config, timesteps=custom, strength=strength)
    np.testing.assert_allclose(table["timesteps"], left.numpy(), rtol=0, atol=2e-3)
    latents, noise = inputs(len(left))
    kept = Known(MASK, CLEAN, latents) if known else None
    reference = theirs(scheduler, latents, noise, monkeypatch, ETA.get(name), timesteps=left, clean=CLEAN, known=kept)
    result = error(ours(table, latents, noise, "epsilon", CLEAN, kept), reference[-1])
    assert result < 1e-5, f"{name} {steps} {strength}: {result:.2e}"


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("config", ["sd15", "sdxl"])
def test_from_an_image(name, config, monkeypatch):
    for steps, strength in itertools.product((1, 2, 4, 8, 25, 50), STRENGTHS):
        compare(name, CONFIGS[config], steps, strength, monkeypatch)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_kept_region(name, monkeypatch):
    for steps, strength in itertools.product((1, 4, 8), (0.5, 1.0)):
        compare(name, CONFIGS["sdxl"], steps, strength, monkeypatch, known=True)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
@pytest.mark.parametrize("how", ["use_karras_sigmas", "use_exponential_sigmas"])
def test_respaced_levels(name, how, monkeypatch):
    for steps, strength in itertools.product((4, 25), (0.3, 0.75)):
        compare(name, {**CONFIGS["sdxl"], how: True}, steps, strength, monkeypatch, known=True)


@pytest.mark.parametrize("name", ["tcd", "lcm", "euler", "dpmpp_2m"])
def test_custom_timesteps(name, monkeypatch):
    for strength in (0.5, 0.75, 1.0):
        compare(name, CONFIGS["sdxl"], 4, strength, monkeypatch, custom=[900, 700, 301, 10])


def test_inpainting_from_noise_alone(monkeypatch):
    """At strength 1 the inpainting pipelines start from noise, and still put the image back."""
    for name in SCHEDULERS:
        config = {"prediction_type": "epsilon", **CONFIGS["sdxl"]}
        scheduler = scheduler_of(name, config, 8)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        latents, noise = inputs(8)
        known = Known(MASK, CLEAN, latents)
        table = solver_table(name, 8, eta=ETA.get(name, 0.0), scheduler_config=config)
        reference = theirs(scheduler, latents, noise, monkeypatch, ETA.get(name), known=known)
        assert error(ours(table, latents, noise, "epsilon", None, known), reference[-1]) < 1e-5
        np.testing.assert_array_equal(table["known_x0"][-1], 1)
        np.testing.assert_array_equal(table["known_noise"][-1], 0)
