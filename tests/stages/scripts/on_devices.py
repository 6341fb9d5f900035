"""Train a tiny model for two updates on a mesh of fake devices; a process of its own, since it fixes their number."""

from __future__ import annotations

import json
import sys

import jax

devices, data, fsdp = (int(argument) for argument in sys.argv[2:5])
jax.config.update("jax_num_cpu_devices", devices)
jax.config.update("jax_numpy_rank_promotion", "raise")

from hypersd_jax.config import load_config
from hypersd_jax.stages import consistency, train
from hypersd_jax.weights import placement

placement.SHARD_ABOVE_BYTES = 4096  # so that even a tiny base is split


def main() -> None:
    """Print how the base and the state are laid out, after a whole run."""
    config = load_config(sys.argv[1], [f"mesh.data={data}", f"mesh.fsdp={fsdp}", f"output_dir={sys.argv[5]}"])
    seen = {}
    original = consistency.finish

    def spy(run, stage, student, *, trained):
        kernel = run.base.params["unet"]["down_blocks.0.resnets.0.conv1.kernel"]
        seen["base"] = str(kernel.sharding.spec)
        seen["split"] = sum("fsdp" in str(leaf.sharding.spec) for leaf in jax.tree.leaves(student))
        seen["devices"] = len(kernel.sharding.device_set)
        original(run, stage, student, trained=trained)

    consistency.finish = spy
    train(config)
    print(json.dumps(seen))


main()
