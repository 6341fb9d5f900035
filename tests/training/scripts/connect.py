"""One of two processes that connect; run by test_processes.py. Prints a line when they have, and then works."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hypersd_jax.training import Agreement, make_mesh
from hypersd_jax.training.processes import connect
from hypersd_jax.weights.placement import BATCH_AXES, host, put


def main(process: int, port: int, data: int, fsdp: int) -> None:
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process)
    mesh = make_mesh(data, fsdp)
    connect(mesh)
    print("connected", flush=True)
    multihost_utils.sync_global_devices("test")
    agreement = Agreement()
    for number in range(3):
        agreement.largest(number)
    weights = put(np.ones((8, 4), np.float32), NamedSharding(mesh, P("fsdp")))
    batch = put(np.ones((4, 8), np.float32), NamedSharding(mesh, P(BATCH_AXES)))
    gradient = jax.jit(
        jax.grad(lambda weights, batch: jnp.mean((batch @ weights) ** 2)), out_shardings=weights.sharding
    )
    for _ in range(2):
        weights = weights - 0.1 * gradient(weights, batch)
    print("weight", host(weights)[0, 0], flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
