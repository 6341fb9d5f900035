"""``train.py`` that splits leaves over ``fsdp`` from 1 kB on and not from 4 MB: a tiny model has no larger ones."""

from hypersd_jax.cli import main
from hypersd_jax.weights import placement

if __name__ == "__main__":
    placement.SHARD_ABOVE_BYTES = 1024
    main(command="train")
