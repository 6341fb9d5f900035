"""`Pipeline.prepare`: the same images by transformed kernels, of whatever the weights are at that moment."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hypersd_jax.models import prepared, winograd
from hypersd_jax.models.functional import WINOGRAD
from hypersd_jax.pipeline import Pipeline
from tests.helpers.lora_files import random_adapter
from tests.helpers.tiny_model import tiny_model

CALL: dict[str, Any] = {"steps": 2, "sampler": "ddim", "output": "np", "guidance": 0.0}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return Pipeline.from_pretrained(tiny_model(tmp_path_factory.mktemp("prepare") / "model"))


@pytest.fixture(autouse=True)
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the rule choose Winograd for the tiny model too."""
    monkeypatch.setattr(prepared, "CHANNELS", 1)
    monkeypatch.setattr(prepared, "SIDES", (1, 128))
    monkeypatch.setattr(winograd, "FEWEST_TILES", 1)


def transformed(pipe: Pipeline, component: str = "unet") -> dict[str, Any]:
    return {path: leaf for path, leaf in pipe.active().params[component].items() if path.endswith(WINOGRAD)}


def test_images_stay_and_weights_are_left_alone(pipe: Pipeline) -> None:
    own = set(pipe.base.params["unet"])
    assert not transformed(pipe)
    direct = pipe("a red apple", **CALL)
    pipe.prepare(2**30)
    assert transformed(pipe)
    assert transformed(pipe, "vae")
    images = pipe("a red apple", **CALL)
    assert not np.array_equal(images, direct)
    np.testing.assert_allclose(images, direct, rtol=0, atol=1e-4)
    assert set(pipe.base.params["unet"]) == own
    assert pipe.active().params is pipe.active().params  # made once
    pipe.prepare(0)
    assert not transformed(pipe)
    assert np.array_equal(pipe("a red apple", **CALL), direct)


def test_fused_weights_are_transformed_anew(pipe: Pipeline) -> None:
    pipe.prepare(2**30)
    before = transformed(pipe)
    pipe.add_lora("style", {"unet": random_adapter(pipe.base.shapes["unet"], 0)})
    beside = pipe("a red apple", **CALL)
    pipe.fuse_lora()
    fused = transformed(pipe)
    assert any(not np.array_equal(fused[path], before[path]) for path in before)
    np.testing.assert_allclose(pipe("a red apple", **CALL), beside, rtol=0, atol=1e-3)
    pipe.unfuse_lora()
    pipe.unload_lora()
    assert all(np.array_equal(leaf, before[path]) for path, leaf in transformed(pipe).items())
