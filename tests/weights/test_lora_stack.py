"""Names of the LoRAs on one model."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hypersd_jax.weights.families import adaptable_shapes
from hypersd_jax.weights.lora import write_lora
from hypersd_jax.weights.lora_stack import LoraStack
from tests.helpers.configs import TINY
from tests.helpers.lora_files import random_adapter


def test_files_of_one_name_in_two_folders_are_both_kept(tmp_path: Path) -> None:
    shapes = adaptable_shapes(TINY)
    files = [tmp_path / folder / "pytorch_lora_weights.safetensors" for folder in "ab"]
    for seed, file in enumerate(files):
        write_lora(file, {"unet": random_adapter(shapes["unet"], seed)}, layout="kohya", dtype=np.float32)
    stack = LoraStack(shapes)
    for file in (*files, files[0]):  # the third is the first again, which it replaces
        stack.load(file, 1.0, None)
    path, entry = next(iter(stack.adapters()["unet"].items()))
    rank = random_adapter(shapes["unet"], 0)[path]["scale"].shape[0]
    assert np.count_nonzero(np.asarray(entry["scale"])) == 2 * rank
    stack.remove("pytorch_lora_weights-2")
    stack.set_scale("pytorch_lora_weights", 0.5)
