"""A folder of images in which one can see their instances, its annotations in COCO's format, and a tiny SOLOv2."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hypersd_jax.models.solov2 import SoloV2Config, solov2
from hypersd_jax.weights.keys import to_torch, torch_key
from hypersd_jax.weights.tensors import save_tensors

NETWORK = SoloV2Config(
    blocks=(1, 1, 1, 1),
    width=2,
    pyramid_width=4,
    head_width=4,
    head_layers=1,
    mask_width=4,
    kernel_width=4,
    groups=2,
    classes=3,
    grids=(6, 5, 4, 3, 2),
    scale_ranges=((1, 16), (8, 24), (16, 48), (24, 96), (48, 2048)),
)
Box = tuple[int, int, int, int]
"""Top, left, height and width."""


def tiny_solo(folder: Path) -> Path:
    """Write random weights, and the sizes as config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    params = {key: np.asarray(value) for key, value in solov2(NETWORK).init(0, gain=2.0).items()}
    params |= {key: np.ones_like(value) for key, value in params.items() if key.endswith("running_var")}
    save_tensors(folder / "model.safetensors", {torch_key(k): to_torch(k, value) for k, value in params.items()})
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(NETWORK)))
    return folder


def polygon(box: Box) -> list[list[float]]:
    top, left, height, width = box
    return [[left, top, left + width, top, left + width, top + height, left, top + height]]


def content(size: tuple[int, int], boxes: Sequence[Sequence[Box]]) -> dict[str, Any]:
    """Annotations of images 0.png, 1.png, ... of one size (height, width), whose i-th box has category 10 (i + 1)."""
    images = [
        {"id": number + 5, "file_name": f"{number}.png", "height": size[0], "width": size[1]}
        for number in range(len(boxes))
    ]
    annotations = [
        {"image_id": number + 5, "category_id": 10 * (index + 1), "iscrowd": 0, "segmentation": polygon(box)}
        for number, each in enumerate(boxes)
        for index, box in enumerate(each)
    ]
    categories = [{"id": 10 * (index + 1), "name": f"c{index}"} for index in reversed(range(3))]
    return {"images": images, "annotations": annotations, "categories": categories}


def annotated_folder(folder: Path, size: tuple[int, int], boxes: Sequence[Sequence[Box]]) -> Path:
    """Write images that are red inside their first box and green inside their second, and instances.json beside."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number, each in enumerate(boxes):
        pixels = np.zeros((*size, 3), np.uint8)
        for channel, (top, left, height, width) in enumerate(each):
            pixels[top : top + height, left : left + width, channel] = 255
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        (folder / "images" / f"{number}.txt").write_text(f"image {number}\n", encoding="utf-8")
    (folder / "instances.json").write_text(json.dumps(content(size, boxes)))
    return folder
