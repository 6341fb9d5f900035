"""Train a few-step student: ``python train.py [--config configs/NAME.yaml] [key.path=value ...]``."""

from hypersd_jax.cli import main

if __name__ == "__main__":
    main(command="train")
