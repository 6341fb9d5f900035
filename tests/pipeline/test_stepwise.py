"""A call with a callback runs single steps from the host, one without a scan: the same images."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from hypersd_jax.models import ControlNetConfig, controlnet
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.weights.diffusers.component import save_params
from tests.helpers.tiny_model import UNET, tiny_model

PROMPT = "red apple, fluent flat style"
SIDE = 16
IMAGES = np.random.default_rng(0).random((2, SIDE, SIDE, 3)).astype(np.float32)
MASK = np.zeros((SIDE, SIDE), np.float32)
MASK[:, : SIDE // 2] = 1
CONTROL: dict[str, Any] = {
    **{key: UNET[key] for key in UNET if key not in ("_class_name", "sample_size", "up_block_types")},
    "conditioning_embedding_out_channels": [4, 6],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a ControlNet beside it."""
    root = tmp_path_factory.mktemp("models")
    network = controlnet(ControlNetConfig.from_dict(CONTROL))
    save_params(root / "control", network.init(0), config=CONTROL, component_kind="unet")
    return tiny_model(root / "model").parent


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(folder / "model")


STEPWISE: dict[str, dict[str, Any]] = {
    "ddim, guided": {"sampler": "ddim", "guidance": 4.0},
    "tcd": {"sampler": "tcd", "eta": 0.5},
    "lcm": {"sampler": "lcm", "timesteps": [999, 499, 99], "steps": None},
    "dpmpp_2m": {"sampler": "dpmpp_2m", "steps": 4, "guidance": 2.0},
    "euler_a": {"sampler": "euler_a"},
    "image, tiled": {"image": IMAGES[0], "strength": 0.7, "steps": 4, "tiled": True},
    "mask": {"image": IMAGES[0], "mask": MASK, "sampler": "lcm"},
    "controlnet": {"control_image": IMAGES[1], "guidance": 3.0},
    "rounds": {"num_images": 3, "batch_size": 2},
}


@pytest.mark.parametrize("name", STEPWISE)
def test_a_callback_changes_no_image(pipe: Pipeline, folder: Path, name: str) -> None:
    """With one the steps are single programs, without one a scan: the same to the bit on a CPU."""
    call = {"steps": 3, "guidance": 0.0, "output": "np", **STEPWISE[name]}
    if "control_image" in call:
        pipe.load_controlnet(folder / "control")
    seen: list[tuple[int, int]] = []
    stepped = pipe(PROMPT, callback=lambda step, total: seen.append((step, total)), **call)
    np.testing.assert_array_equal(stepped, pipe(PROMPT, **call))
    total = seen[-1][1]
    assert seen == [(step + 1, total) for step in range(total)]
    pipe.unload_controlnet()


def test_what_a_callback_raises_ends_the_call(pipe: Pipeline) -> None:
    def stop(step: int, _total: int) -> None:
        if step == 2:
            raise InterruptedError("enough")

    with pytest.raises(InterruptedError, match="enough"):
        pipe(PROMPT, callback=stop, steps=4, guidance=0.0)
    seen: list[int] = []
    pipe(PROMPT, callback=lambda step, _total: seen.append(step), steps=2, guidance=0.0)
    assert seen == [1, 2]


def test_the_decoder_is_compiled_beside_the_steps(folder: Path) -> None:
    """Once for each shape, in a thread of its own; the call finds it compiled."""
    threads: list[threading.Thread] = []

    def note(name: str, _seconds: float, **about: Any) -> None:
        if name == "/jax/core/compile/backend_compile_duration" and about["fun_name"] == "jit(decode)":
            threads.append(threading.current_thread())

    jax.monitoring.register_event_duration_secs_listener(note)
    pipe = Pipeline.from_pretrained(folder / "model")
    for _ in range(2):
        pipe(PROMPT, steps=2, guidance=0.0)
        assert len(threads) == 1
    pipe(PROMPT, steps=2, guidance=0.0, num_images=2)
    pipe(PROMPT, steps=2, guidance=0.0, output="latent", num_images=3)
    assert len(threads) == 2
    assert threading.main_thread() not in threads
