"""Draw pictures: ``python sample.py --prompt "red apple, fluent flat style" --steps 4 --output apple.png``."""

import sys

from hypersd_jax.cli import main

if __name__ == "__main__":
    main(["sample", *sys.argv[1:]])
