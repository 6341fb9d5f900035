"""``python -m hypersd_jax`` is the same as ``hypersd``."""

from hypersd_jax.cli import main

main()
