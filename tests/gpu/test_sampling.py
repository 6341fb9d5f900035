"""A pipeline on a GPU samples the same image every time, and about the one that a CPU samples."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np
import pytest

from benchmarks.gpu.models import stored_model
from hypersd_jax.bases import StableDiffusion
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.weights.assembly import load

pytestmark = pytest.mark.gpu

PROMPTS = ["red apple", "blue square"]
TOLERANCE = 1e-3
"""Of pixels in 0..1, float32 after two steps."""


def pipeline() -> Pipeline:
    return Pipeline(StableDiffusion(components=load(stored_model("sd15", tiny=True), dtype="float32"), dtype="float32"))


def sample(pipe: Pipeline, prompts: list[str], **how: object) -> np.ndarray:
    return pipe(prompts, steps=2, sampler="tcd", eta=0.3, guidance=2.0, seed=1, output="np", **how)


@pytest.fixture(scope="module")
def on_gpu(gpu: jax.Device) -> Iterator[Pipeline]:
    with jax.default_device(gpu):
        yield pipeline()


def test_it_is_deterministic(on_gpu: Pipeline) -> None:
    first = sample(on_gpu, PROMPTS)
    assert first.std() > 0.01
    for _ in range(3):
        np.testing.assert_array_equal(sample(on_gpu, PROMPTS), first)


def test_it_does_not_depend_on_the_batch(on_gpu: Pipeline) -> None:
    alone = sample(on_gpu, PROMPTS, batch_size=1)
    np.testing.assert_allclose(alone, sample(on_gpu, PROMPTS), atol=TOLERANCE)


def test_it_is_the_cpus_image(on_gpu: Pipeline, cpu: jax.Device) -> None:
    with jax.default_device(cpu):
        expected = sample(pipeline(), PROMPTS)
    np.testing.assert_allclose(sample(on_gpu, PROMPTS), expected, atol=TOLERANCE)
