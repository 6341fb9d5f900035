"""Take a finished run's LoRAs into the package, in float16.

python train.py --config emoji/unified && python scripts/ship_loras.py outputs/emoji-unified unified
python train.py --config configs/emoji.yaml && python scripts/ship_loras.py outputs/emoji-tscd
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from hypersd_jax.weights.components import assets, load_components
from hypersd_jax.weights.lora import read_lora, write_lora


def main(folder: Path, names: list[str]) -> None:
    """Rewrite these LoRAs of ``folder``, or all of them, under assets/loras, header and all."""
    shapes = load_components("embedded", dtype=jnp.float32).shapes
    for path in sorted((folder / "loras").glob("*.safetensors")):
        if names and path.stem not in names:
            continue
        file = read_lora(path, shapes)
        target = assets() / "loras" / path.name
        write_lora(target, file.adapters, layout="kohya", metadata=file.metadata, dtype=np.float16)
        print(target, target.stat().st_size)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
