"""This package's side: ``python -m benchmarks.sides.ours MODEL DTYPE SIZE CACHE``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

from benchmarks.sides.protocol import serve

PROMPT = "red apple, fluent flat style"


def load() -> Mapping[str, Callable[[], object]]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    model, dtype, size, cache = sys.argv[1:]
    jax.config.update("jax_compilation_cache_dir", cache)
    from hypersd_jax.compilation import compiler_options
    from hypersd_jax.pipeline import Pipeline

    pipe = Pipeline.from_pretrained(model, dtype=dtype)
    pixels = int(size)
    side = pixels // pipe.base.downscale
    jax.block_until_ready(pipe._params)
    latents = np.random.default_rng(0).standard_normal((1, side, side, 4)).astype(np.float32)

    def image() -> None:
        pipe(PROMPT, steps=1, guidance=0.0, height=pixels, width=pixels, latents=latents, output="np")

    def text() -> None:
        jax.block_until_ready(pipe.encode_prompts(PROMPT, height=pixels, width=pixels))

    call = jax.jit(
        lambda params, x, t, cond: pipe.base.predict(params, x, t, cond)[0],
        compiler_options=compiler_options(pipe.dtype),
    )

    def unet() -> None:
        cond = pipe.encode_prompts(PROMPT, height=pixels, width=pixels)
        call(pipe._params["unet"], latents, jnp.full((1,), 999), cond).block_until_ready()

    def decode() -> None:
        pipe.decode(latents)

    return {"image": image, "text": text, "text+unet": unet, "decode": decode}


if __name__ == "__main__":
    serve(load)
