"""A batch that the devices of a mesh do not divide: every device has its share, and the images are those of one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hypersd_jax.models import ControlNetConfig, controlnet
from hypersd_jax.pipeline.plan import batches
from hypersd_jax.weights.diffusers.component import save_params
from tests.helpers.tiny_model import UNET, tiny_model

ROOT = Path(__file__).parents[2]
CONTROL: dict[str, Any] = {
    **{key: UNET[key] for key in UNET if key not in ("_class_name", "sample_size", "up_block_types")},
    "conditioning_embedding_out_channels": [4, 6],
}
CALLS = ("plain", "guided", "noise in single steps", "image", "mask", "tiled", "rounds", "controlnet")
# 12 images are two on each of eight devices, as 16 are; rounds of five are one on each.
LESS = {name: 5.0 if name == "rounds" else 6.0 for name in CALLS}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("models")
    network = controlnet(ControlNetConfig.from_dict(CONTROL))
    save_params(root / "control", network.init(0), config=CONTROL, component_kind="unet")
    done = subprocess.run(
        [sys.executable, "-m", "tests.pipeline.scripts.on_devices", str(tiny_model(root / "model").parent)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.devices
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("shape", ["8x1", "2x4"])
def test_twelve_images_on_eight_devices(seen: dict[str, Any], shape: str, name: str) -> None:
    """Each program computes a device's share of the images, to a tenth, wherever parameters lie."""
    found = seen[shape][name]
    assert found["difference"] < 1e-6
    programs = {"encode_prompts", "scan", "decode"} | ({"encode_images"} if name in ("image", "mask") else set())
    assert found["less"].keys() == programs
    for program, less in found["less"].items():
        # Images are encoded one at a time on one device, and on each of eight.
        assert less == pytest.approx(1.0 if program == "encode_images" else LESS[name], rel=0.1)


@pytest.mark.devices
@pytest.mark.parametrize("shape", ["8x1", "2x4"])
def test_three_samples_through_single_parts(seen: dict[str, Any], shape: str) -> None:
    assert max(seen[shape]["parts"]) < 5e-6  # latents and contexts, which are larger than images


@pytest.mark.devices
@pytest.mark.parametrize("shape", ["8x1", "2x4"])
def test_the_decoder_is_compiled_once(seen: dict[str, Any], shape: str) -> None:
    assert seen[shape]["decoder compiled"] == 1


def test_rounds_are_filled_up_to_the_devices() -> None:
    """With images that are wanted where there are more, else with the last one."""
    assert [(list(indices), count) for _, indices, count in batches([None] * 5, 3, 2)] == [
        ([0, 1, 2, 3], 4),
        ([4, 4, 4, 4], 1),
    ]
    by_windows = batches([1, 2, 1, 1], None, 2)
    assert [(number, list(indices), count) for number, indices, count in by_windows] == [
        (1, [0, 2, 3, 3], 3),
        (2, [1, 1], 1),
    ]
    assert [list(indices) for _, indices, _ in batches([None] * 3, None)] == [[0, 1, 2]]
