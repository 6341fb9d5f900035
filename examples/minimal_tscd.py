"""Hyper-SD's first stage in one file, to be read from top to bottom: ``python examples/minimal_tscd.py --updates 60``.

Trajectory segmented consistency distillation (arXiv 2404.13686, section 3.1, Eq. 12) of the model that ships inside the
package: a LoRA learns to do in 4 steps what the guided teacher does in 8. Teacher, student and target are the same
frozen weights under different LoRAs. `hypersd train` does the same with sharding, checkpoints and many more losses.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image
from tqdm import tqdm

import hypersd_jax as hs
from hypersd_jax.adapters import init, join, split
from hypersd_jax.conditioning import Conditioning
from hypersd_jax.config import DataConfig
from hypersd_jax.data import open_source, signed
from hypersd_jax.diffusion import guided
from hypersd_jax.distill import consistency_loss, pad_segments
from hypersd_jax.weights import write_lora

SEGMENTS, SOLVER_STEPS = 4, 8  # k and N: the student's steps, and the teacher's
GUIDANCE = (3.0, 5.0)  # the range that the teacher's guidance scale is drawn from
BATCH, RANK, LEARNING_RATE, EMA = 16, 32, 1e-3, 0.9
PROMPTS = ["red apple", "lion, noto style", "panda, blue background", "cat face", "pizza, yellow background", "frog"]


def main() -> None:
    """Train, sample, and write the LoRA and a strip of images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="a Stable Diffusion 1.x or 2.x model")
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--output", type=Path, default=Path("outputs/minimal-tscd"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)

    # The frozen base: a UNet, an autoencoder and a text encoder, each a pure function of its parameters.
    pipe = hs.Pipeline.from_pretrained(options.model)
    base = pipe.base
    unet, vae = dict(base.params["unet"]), dict(base.params["vae"])
    text = {"text_encoder": base.params["text_encoder"]}
    source = open_source(DataConfig(), resolution=pipe.native_size[0], seed=0, batch_size=BATCH)

    @jax.jit
    def encode(images: Any, ids: Any) -> dict[str, Any]:
        """Images (B, H, W, 3) uint8 and token ids as the UNet sees them."""
        mean, _ = base.posterior(vae, signed(images))
        return {"latents": base.scale(mean), "cond": base.encode_prompts(text, ids)}

    empty = encode(jnp.zeros((BATCH, *pipe.native_size, 3), jnp.uint8), base.prompts.tokenize([""] * BATCH))["cond"]

    # The student: LoRA factors of float32 whose product is zero at first, and their fixed scales.
    factors, scales = split(init(jax.random.key(0), base.shapes["unet"], rank=RANK))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(LEARNING_RATE))
    moments = optimizer.init(factors)
    segments = pad_segments(SOLVER_STEPS, SEGMENTS, SOLVER_STEPS)

    def predict(x: jax.Array, t: jax.Array, cond: Conditioning, lora: Any = None) -> jax.Array:
        adapter = None if lora is None else join(lora, scales)
        return base.predict(unet, x, t, cond, adapter=adapter)[0]

    def teacher(x: jax.Array, t: jax.Array, cond: Any, uncond: Any, scale: jax.Array) -> tuple[jax.Array, None]:
        return guided(predict(x, t, uncond), predict(x, t, cond), scale.reshape(-1, 1, 1, 1)), None

    @jax.jit
    def update(factors: Any, average: Any, moments: Any, batch: Any, key: jax.Array) -> Any:
        """One update: x_n -> teacher's solver step -> target by the average, against the student from x_n (Eq. 12)."""

        def loss(factors: Any) -> Any:
            return consistency_loss(
                "tscd",
                lambda x, t, cond: predict(x, t, cond, factors),
                lambda x, t, cond: predict(x, t, cond, average),
                teacher,
                {**batch, "uncond": empty},
                key,
                segments,
                guidance=GUIDANCE,
                schedule=pipe.schedule,
            )

        (value, _), gradient = jax.value_and_grad(loss, has_aux=True)(factors)
        change, moments = optimizer.update(gradient, moments, factors)
        factors = optax.apply_updates(factors, change)
        average = jax.tree.map(lambda old, new: EMA * old + (1 - EMA) * new, average, factors)
        return factors, average, moments, value

    average, losses = factors, []
    for number in tqdm(range(options.updates), desc="updates (the first one compiles)"):
        rows = source.batch(np.arange(BATCH) + number * BATCH)
        batch = encode(rows.images, base.prompts.tokenize_captions(rows.captions))
        factors, average, moments, value = update(factors, average, moments, batch, jax.random.key(number))
        losses.append(float(value))
    tenth = max(1, len(losses) // 10)
    print(f"loss: {np.mean(losses[:tenth]):.4f} -> {np.mean(losses[-tenth:]):.4f}")

    # Base and student from the same noise, then the LoRA as a file that diffusers and ComfyUI load.
    call: dict[str, Any] = {"steps": SEGMENTS, "sampler": "ddim", "guidance": 0.0, "output": "np"}
    before = pipe(PROMPTS, **call)
    lora = join(average, scales)
    pipe.add_lora("student", {"unet": lora})
    strip = np.concatenate([np.concatenate(list(images), axis=1) for images in (before, pipe(PROMPTS, **call))])
    Image.fromarray(np.uint8(255 * strip)).save(options.output / "before-and-after.png")
    write_lora(options.output / "student.safetensors", {"unet": jax.device_get(lora)}, layout="kohya")
    print(f"written: {options.output}/before-and-after.png, student.safetensors")


if __name__ == "__main__":
    main()
