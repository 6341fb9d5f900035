"""Train the toy for 12 steps with a checkpoint at each, resuming what is there; run, and killed, by test_kill.py."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np

from hypersd_jax import training
from tests.helpers import toy_training as toy

STEPS = 12

jax.config.update("jax_platforms", "cpu")


def main(folder: Path) -> None:
    run = toy.Run()
    metadata = {"stage": "toy", "config": "sha256:0"}
    with training.Checkpointer(folder / "checkpoints") as checkpointer:
        if checkpointer.latest() is not None:
            training.check_metadata(checkpointer.metadata(), metadata)
            run.state, _ = checkpointer.restore(None, training.abstract(run.mesh, run.state))
        start = int(run.state.step)
        print(f"start {start}", flush=True)
        with training.MetricsLog(folder, STEPS, "toy", start, tensorboard=False) as log:
            for step in range(start + 1, STEPS + 1):
                batch = training.put_batch(toy.batch(step - 1), training.batch_sharding(run.mesh, axis=1))
                run.state, metrics = run.step(run.state, run.frozen, batch, run.key, run.settings)
                log.write(step, metrics)
                log.flush()
                checkpointer.save(step, run.state, metadata)
                print(f"step {step}", flush=True)
    leaves = jax.tree_util.tree_leaves_with_path(run.state)
    np.savez(folder / "final.npz", **{jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
