"""Train a few-step student: ``python train.py [--config configs/NAME.yaml] [key.path=value ...]``."""

import sys

from hypersd_jax.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
