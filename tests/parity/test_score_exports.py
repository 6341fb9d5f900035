"""Exports of score distillation and feedback, sampled by diffusers: a one-step UNet's folder, and LoRAs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

from hypersd_jax import adapters
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.stages import feedback
from hypersd_jax.stages import run as stage_run
from hypersd_jax.stages.export import export_student
from hypersd_jax.stages.kinds import STUDENT
from tests.helpers.score_runs import open_stage, randomised, recipe
from tests.helpers.short_runs import sample_cheaply
from tests.helpers.tiny_model import smaller, tiny_model
from tests.helpers.torch_weights import relative_error

PROMPTS = ["red apple, fluent flat style", "a cat face, noto style, blue background"]
TOLERANCE = 1e-5
"""Relative L2 error of float32 images in 0..1."""
ANOTHER = 1e-2
"""The least relative L2 difference of images that must not be the same."""
# As in the torch-free tests, whose compiled program this session then has already.
UNET = """
  - {name: unet, kind: dmd, student: unet, times: [800], updates: 2, batch_size: 4, learning_rate: 1.0e-3,
     fake_updates: 1, guidance: 1.0}
"""
UNIFIED = "  - {name: unified, kind: dmd, updates: 1, batch_size: 4, steps: [1, 2, 4]}"
FEEDBACK = """
  - {name: liked, kind: feedback, updates: 1, batch_size: 4, rank: 2, merge_weight: 0.5, guidance: 1.0, anchor: null,
     feedback: {rewards: [{name: "embedded:reward", margin: 9.0}], guards: null}}
"""
INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with the index that diffusers asks for."""
    folder = smaller(tiny_model(tmp_path_factory.mktemp("model")))
    (folder / "model_index.json").write_text(json.dumps(INDEX))
    return folder


@pytest.fixture(scope="module")
def latents() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)


def theirs(folder: Path, scheduler: str, **settings: Any) -> Any:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **settings)
    return pipe


def sample_theirs(pipe: Any, latents: np.ndarray, **call: Any) -> np.ndarray:
    given = torch.from_numpy(latents).permute(0, 3, 1, 2)
    return pipe(prompt=PROMPTS, latents=given, guidance_scale=0.0, output_type="np", **call).images


def test_the_one_step_unet(tmp_path: Path, model: Path, latents: np.ndarray) -> None:
    """LCMScheduler at t = 800 alone, as Hyper-SD's one-step UNet is sampled."""
    opened = open_stage(recipe(tmp_path, model, UNET), "before")
    stage_run.run_stage(opened.run, 0, opened.stage)
    folder = opened.run.output.models / "unet"
    expected = sample_theirs(theirs(folder, "LCMScheduler"), latents, num_inference_steps=1, timesteps=[800])
    call: dict[str, Any] = {"sampler": "lcm", "timesteps": [800], "guidance": 0.0, "output": "np", "stepwise": True}
    found, base = (Pipeline.from_pretrained(each)(PROMPTS, latents=latents, **call) for each in (folder, model))
    assert relative_error(found, expected) < TOLERANCE
    assert relative_error(base, expected) > ANOTHER


@pytest.fixture(scope="module")
def unified(tmp_path_factory: pytest.TempPathFactory, model: Path) -> tuple[Pipeline, Any, Path]:
    """Both pipelines, and a student's factors as a stage writes them."""
    opened = open_stage(recipe(tmp_path_factory.mktemp("unified"), model, UNIFIED), "unified")
    run = opened.run
    adapter = adapters.join(opened.start, run.scales)
    path = run.output.loras / "unified.safetensors"
    export_student(path, adapter, opened.stage, run.base, base_fingerprint=run.base_fingerprint)
    return Pipeline(run.base), theirs(model, "TCDScheduler"), path


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_unified_lora(unified: tuple[Pipeline, Any, Path], latents: np.ndarray, steps: int) -> None:
    """TCDScheduler at eta 0; our pipeline reads sampler, eta and guidance from the file."""
    ours, pipe, file = unified
    ours.unload_lora()
    pipe.unload_lora_weights()
    call: dict[str, Any] = {"steps": steps, "latents": latents, "output": "np", "stepwise": True}
    base = ours(PROMPTS, sampler="tcd", eta=0.0, guidance=0.0, **call)
    ours.load_lora(file)
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    plan = ours.settings(steps=steps)
    assert (plan.sampler, plan.eta, plan.guidance, plan.original_inference_steps) == ("tcd", 0.0, 0.0, 50)
    expected = sample_theirs(pipe, latents, num_inference_steps=steps, eta=0.0)
    assert relative_error(ours(PROMPTS, **call), expected) < TOLERANCE
    assert relative_error(base, expected) > ANOTHER


def test_feedback_is_one_file_or_two_or_merged_by_hand(
    tmp_path: Path, model: Path, latents: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both LoRAs as one file, as two at scales of their own, and in the weights: one image, here and in diffusers."""
    sample_cheaply(monkeypatch)
    opened = open_stage(recipe(tmp_path, model, FEEDBACK), "distilled")
    run, stage = opened.run, opened.stage
    first = adapters.join(run.student, run.scales)
    second = randomised(opened.kind.trainable(run, 0, stage)[STUDENT], 3, scale=0.2)
    folder = run.output.loras
    export_student(folder / "first.safetensors", first, stage, run.base, base_fingerprint=run.base_fingerprint)
    feedback.finish(run, stage, second, trained=True)
    one, two = ["liked"], ["first", "liked.feedback"]

    ours, pipe = Pipeline(run.base), theirs(model, "TCDScheduler")
    call: dict[str, Any] = {"steps": 2, "latents": latents, "output": "np", "stepwise": True}
    call |= {"sampler": "tcd", "eta": 0.0, "guidance": 0.0}
    distilled_alone = _of_files(ours, pipe, folder, ["first"], [1.0], latents, call)[0]
    images = [*_of_files(ours, pipe, folder, one, [1.0], latents, call)]
    images += _of_files(ours, pipe, folder, two, [1.0, stage.merge_weight], latents, call)
    both = adapters.concatenate([first, adapters.scaled(adapters.join(second, _ones(second)), stage.merge_weight)])
    merged = run.base.with_weights({"unet": adapters.merge(dict(run.base.params["unet"]), both)})
    expected = Pipeline(merged)(PROMPTS, **call)
    assert [relative_error(image, expected) < TOLERANCE for image in images] == [True] * 4
    assert relative_error(distilled_alone, expected) > ANOTHER


def _ones(factors: Any) -> dict[str, Any]:
    return {path: np.ones(entry["down"].shape[-1], np.float32) for path, entry in factors.items()}


def _of_files(
    ours: Pipeline, pipe: Any, folder: Path, names: list[str], scales: list[float], latents: np.ndarray, call: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Images of these files at these scales, ours and diffusers'."""
    ours.unload_lora()
    pipe.unload_lora_weights()
    keys = [name.replace(".", "_") for name in names]
    for name, key, scale in zip(names, keys, scales, strict=True):
        ours.load_lora(folder / f"{name}.safetensors", name=key, scale=scale)
        pipe.load_lora_weights(folder, weight_name=f"{name}.safetensors", adapter_name=key)
    pipe.set_adapters(keys, scales)
    return ours(PROMPTS, **call), sample_theirs(pipe, latents, num_inference_steps=call["steps"], eta=0.0)
