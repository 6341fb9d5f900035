"""The reference that ships with the package."""

from __future__ import annotations

import numpy as np
import pytest

from hypersd_jax.config import load_config
from hypersd_jax.evaluation import evaluator
from hypersd_jax.evaluation.comparison import embedded_evaluator, embedded_teacher
from hypersd_jax.evaluation.reference import SHIPPED, load_reference, reference_identity
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.recipes import find_recipe
from hypersd_jax.weights.fingerprints import fingerprint


def test_it_is_that_of_the_default_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found by its identity, so that no sample of the teacher is generated for it."""
    monkeypatch.setattr(evaluator, "image_features", lambda images: np.zeros((len(images), 1280), np.float32))
    config, pipe = load_config(find_recipe("emoji")), Pipeline.from_pretrained("embedded")
    measuring = embedded_evaluator(pipe, config.compared_samples, config.data.groups)
    base, guidance = fingerprint(pipe.base.params["unet"]), config.evaluation.guidance
    assert guidance is not None
    teacher = embedded_teacher(pipe, base, guidance, batch_size=16)
    found = load_reference(SHIPPED, reference_identity(teacher, measuring), measuring, "any device")
    assert found is not None
    assert [(each.row["steps"], each.row["guidance"]) for each in found.few] == list(teacher.few)
    assert len(found.samples.images) == config.compared_samples
    assert all("seconds_per_image" not in each.row for each in found.rows)
