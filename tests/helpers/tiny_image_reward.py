"""A tiny random ImageReward, written without PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hypersd_jax.models.bert import BertConfig
from hypersd_jax.models.blip import blip
from hypersd_jax.models.blip_vision import BlipVisionConfig
from hypersd_jax.weights.keys import to_torch, torch_key
from hypersd_jax.weights.tensors import save_tensors

VISION = BlipVisionConfig(width=64, inner=8, layers=1, heads=1, image_size=8, patch_size=4)
TEXT = BertConfig(vocabulary=110, positions=40, width=128, inner=8, layers=2, heads=2, context_width=64)
WIDTHS = (128, 5, 4, 3, 2, 1)


def tensors() -> dict[str, np.ndarray]:
    """Random weights as the published file names them."""
    found = {f"blip.{torch_key(path)}": to_torch(path, np.asarray(x)) for path, x in blip(VISION, TEXT).init(0).items()}
    for index, before, after in zip((0, 2, 4, 6, 7), WIDTHS, WIDTHS[1:], strict=False):
        # After a norm the state sums to zero, so that equal weights would say nothing of it.
        rng = np.random.default_rng(index)
        found[f"mlp.layers.{index}.weight"] = rng.standard_normal((after, before)).astype(np.float32)
        found[f"mlp.layers.{index}.bias"] = np.ones(after, np.float32)
    return found


def tiny_image_reward(folder: Path, **changes: np.ndarray | None) -> Path:
    """Write it to a folder that is there; a change names a tensor, with __ for points, and None leaves it out."""
    changed = {**tensors(), **{key.replace("__", "."): value for key, value in changes.items()}}
    save_tensors(folder / "model.safetensors", {key: value for key, value in changed.items() if value is not None})
    words = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "app", "##le"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return folder
