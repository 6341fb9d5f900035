"""Whole pipelines against diffusers': the same prompts, latents and noise, the same images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from hypersd_jax.pipeline import Pipeline
from tests.helpers.tiny_pipelines import tiny_sd, tiny_sdxl
from tests.helpers.torch_weights import relative_error

PROMPTS = ["red apple, fluent flat style", "a cat face, noto style, blue background"]
NEGATIVE = "blob style"
STEPS = (1, 2, 3, 4, 6, 8, 12)
TOLERANCE = 1e-4
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "tcd": "TCDScheduler",
    "lcm": "LCMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Pipeline]]:
    made = {}
    for name, make, cls in (
        ("sd", tiny_sd, diffusers.StableDiffusionPipeline),
        ("sd-v", lambda folder: tiny_sd(folder, "v_prediction"), diffusers.StableDiffusionPipeline),
        ("sd-lcm", lambda folder: tiny_sd(folder, guidance_embedding=16), diffusers.StableDiffusionPipeline),
        ("sdxl", tiny_sdxl, diffusers.StableDiffusionXLPipeline),
    ):
        folder = make(tmp_path_factory.mktemp(name))
        theirs = cls.from_pretrained(folder)
        theirs.set_progress_bar_config(disable=True)
        made[name] = (theirs, Pipeline.from_pretrained(folder))
    return made


def sample_theirs(
    pipe: Any, latents: np.ndarray, noise: np.ndarray, sampler: str, eta: float, **call: Any
) -> np.ndarray:
    """Run diffusers' pipeline with its scheduler's noise taken from ``noise``."""
    extra = {"timestep_spacing": {"ddim": "trailing"}.get(sampler, "leading")}
    cls = getattr(diffusers, SCHEDULERS[sampler])
    pipe.scheduler = cls.from_config(pipe.scheduler.config, **extra)
    rows = iter(torch.from_numpy(noise).permute(0, 1, 4, 2, 3))
    module = __import__(cls.__module__, fromlist=["randn_tensor"])
    original = module.randn_tensor
    module.randn_tensor = lambda *args, **kwargs: next(rows).clone()
    try:
        found = pipe(latents=torch.from_numpy(latents).permute(0, 3, 1, 2), output_type="np", eta=eta, **call)
    finally:
        module.randn_tensor = original
    return found.images


def check(pipelines: Any, family: str, sampler: str, eta: float, steps: int, guidance: float, negative: Any) -> None:
    theirs, ours = pipelines[family]
    rng = np.random.default_rng(steps)
    latents = rng.standard_normal((2, 8, 8, 4)).astype(np.float32)
    noise = rng.standard_normal((steps, 2, 8, 8, 4)).astype(np.float32)
    expected = sample_theirs(
        theirs,
        latents,
        noise,
        sampler,
        eta,
        prompt=PROMPTS,
        negative_prompt=None if negative is None else [negative] * 2,
        num_inference_steps=steps,
        guidance_scale=guidance,
    )
    found = ours(
        PROMPTS,
        negative,
        steps=steps,
        sampler=sampler,
        eta=eta,
        guidance=guidance,
        latents=latents,
        noise=noise,
        output="np",
        stepwise=True,  # one compilation for all step counts; `test_the_scan_samples_the_same` ties it to the scan
    )
    assert relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 0.0), ("tcd", 0.3), ("lcm", 0.0)])
@pytest.mark.parametrize("guidance", [0.0, 5.0])
def test_sd(pipelines: Any, sampler: str, eta: float, steps: int, guidance: float) -> None:
    check(pipelines, "sd", sampler, eta, steps, guidance, None)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("family", ["sd-v", "sdxl"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_other_families(pipelines: Any, family: str, steps: int, guidance: float) -> None:
    check(pipelines, family, "ddim", 0.0, steps, guidance, None)
    check(pipelines, family, "tcd", 1.0, steps, guidance, None)
    check(pipelines, family, "lcm", 0.0, steps, guidance, None)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 8.5])
def test_a_unet_that_reads_the_guidance_scale(pipelines: Any, guidance: float) -> None:
    check(pipelines, "sd-lcm", "lcm", 0.0, 4, guidance, None)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("negative", [NEGATIVE, ""])
def test_negative_prompts(pipelines: Any, family: str, negative: str) -> None:
    check(pipelines, family, "ddim", 0.0, 4, 5.0, negative)


@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 0.0), ("tcd", 0.3)])
def test_the_scan_samples_the_same(pipelines: Any, sampler: str, eta: float) -> None:
    ours = pipelines["sd"][1]
    call = {"steps": 4, "sampler": sampler, "eta": eta, "guidance": 5.0, "seed": 3, "output": "latent"}
    assert relative_error(ours(PROMPTS, **call), ours(PROMPTS, **call, stepwise=True)) < 1e-6


def test_the_embedded_teacher() -> None:
    """The real small teacher, six guided steps: rounding grows more in a trained network than in a random one."""
    ours = Pipeline.from_pretrained("embedded")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(str(ours.base.source), torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((1, 16, 16, 4)).astype(np.float32)
    noise = np.zeros((4, 1, 16, 16, 4), np.float32)
    expected = sample_theirs(
        theirs, latents, noise, "ddim", 0.0, prompt=PROMPTS[:1], num_inference_steps=4, guidance_scale=4.0
    )
    found = ours(PROMPTS[:1], steps=4, sampler="ddim", guidance=4.0, latents=latents, output="np", stepwise=True)
    assert relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize("sampler", ["euler", "euler_a", "dpmpp_2m"])
@pytest.mark.parametrize("family", ["sd", "sd-v", "sdxl"])
def test_level_solvers(pipelines: Any, family: str, sampler: str) -> None:
    for steps in (1, 4, 8):
        check(pipelines, family, sampler, 0.0, steps, 5.0, None)
