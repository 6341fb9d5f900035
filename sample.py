"""Sample images: ``python sample.py --prompt "red apple, fluent flat style" --steps 4 --output apple.png``."""

from hypersd_jax.cli import main

if __name__ == "__main__":
    main(command="sample")
