"""This package's side: ``python -m benchmarks.sides.ours MODEL DTYPE SIZE CACHE``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.sides.protocol import Work, serve

PROMPT = "red apple, fluent flat style"


def work(pipe: Any, pixels: int, batch: int = 1, *, stepwise: bool = False) -> Work:
    """Return the pieces of sampling square images with a `Pipeline`; each waits until its result is there.

    Args:
        pipe: the pipeline.
        pixels: side of the images.
        batch: images at a time.
        stepwise: compile one step for all step counts.
    """
    import jax
    import numpy as np

    side = pixels // pipe.base.downscale
    latents = np.random.default_rng(0).standard_normal((batch, side, side, 4)).astype(np.float32)
    on_device = jax.device_put(latents)
    prompts = [PROMPT] * batch

    def image(steps: int = 1) -> Any:
        return pipe(
            prompts,
            steps=steps,
            guidance=0.0,
            height=pixels,
            width=pixels,
            latents=latents,
            output="np",
            stepwise=stepwise,
        )

    def text() -> Any:
        return jax.block_until_ready(pipe.encode_prompts(prompts, height=pixels, width=pixels))

    def unet(cond: Any) -> Any:
        return pipe.predict(on_device, 999, cond).block_until_ready()

    def decode() -> Any:
        return pipe.decode(on_device)

    return Work(image=image, text=text, unet=unet, decode=decode)


def load() -> Mapping[str, Callable[[], object]]:
    import jax

    model, dtype, size, cache = sys.argv[1:]
    jax.config.update("jax_compilation_cache_dir", cache)
    from hypersd_jax.pipeline import Pipeline

    pipe = Pipeline.from_pretrained(model, dtype=dtype)
    jax.block_until_ready(pipe.base.params)
    return work(pipe, int(size)).parts()


if __name__ == "__main__":
    serve(load)
