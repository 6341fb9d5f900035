"""The side of diffusers on PyTorch: ``python -m benchmarks.sides.theirs MODEL DTYPE SIZE CACHE``.

Eager, channels last, as diffusers advises for a CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.sides.protocol import Work, serve

PROMPT = "red apple, fluent flat style"


def work(pipe: Any, pixels: int, batch: int = 1) -> Work:
    """Return the pieces of sampling square images with a diffusers pipeline, on the device that it is on.

    On a GPU the caller waits for it; only ``image`` and ``decode`` return NumPy arrays, and so have waited.
    """
    import torch

    side = pixels // pipe.vae_scale_factor
    device, kind = pipe.device, pipe.unet.dtype
    random = torch.Generator().manual_seed(0)
    latents = torch.randn((batch, 4, side, side), generator=random, dtype=kind, device="cpu").to(device)
    timestep = torch.tensor(999, device=device)
    sizes = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]] * batch, dtype=kind, device=device)
    prompts = [PROMPT] * batch

    @torch.no_grad()
    def image(steps: int = 1) -> Any:
        return pipe(
            prompts,
            num_inference_steps=steps,
            guidance_scale=0.0,
            latents=latents,
            height=pixels,
            width=pixels,
            output_type="np",
        ).images

    @torch.no_grad()
    def text() -> Any:
        return pipe.encode_prompt(
            prompt=prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )

    @torch.no_grad()
    def unet(found: Any) -> Any:
        added = {"text_embeds": found[2], "time_ids": sizes} if len(found) == 4 else None
        return pipe.unet(
            latents,
            timestep,
            encoder_hidden_states=found[0],
            timestep_cond=None,  # as the pipeline says it: a compiled UNet would be compiled again without
            cross_attention_kwargs=None,
            added_cond_kwargs=added,
            return_dict=False,
        )

    @torch.no_grad()
    def decode() -> Any:
        image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
        return pipe.image_processor.postprocess(image, output_type="np")

    return Work(image=image, text=text, unet=unet, decode=decode)


def load() -> Mapping[str, Callable[[], object]]:
    import torch
    from diffusers import DiffusionPipeline

    model, dtype, size, _ = sys.argv[1:]
    pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=getattr(torch, dtype), low_cpu_mem_usage=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    return work(pipe, int(size)).parts()


if __name__ == "__main__":
    serve(load)
