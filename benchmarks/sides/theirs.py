"""The side of diffusers on PyTorch: ``python -m benchmarks.sides.theirs MODEL DTYPE SIZE CACHE``.

Eager, channels last, as diffusers advises for a CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

from benchmarks.sides.protocol import serve

PROMPT = "red apple, fluent flat style"


def load() -> Mapping[str, Callable[[], object]]:
    import torch
    from diffusers import DiffusionPipeline

    model, dtype, size, _ = sys.argv[1:]
    kind = getattr(torch, dtype)
    pixels = int(size)
    pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=kind, low_cpu_mem_usage=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    side = pixels // pipe.vae_scale_factor
    latents = torch.randn((1, 4, side, side), generator=torch.Generator().manual_seed(0), dtype=kind)
    timestep = torch.tensor(999)

    @torch.inference_mode()
    def image() -> None:
        pipe(
            PROMPT,
            num_inference_steps=1,
            guidance_scale=0.0,
            latents=latents,
            height=pixels,
            width=pixels,
            output_type="np",
        )

    def encode() -> tuple[torch.Tensor, ...]:
        return pipe.encode_prompt(
            prompt=PROMPT, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )

    @torch.inference_mode()
    def text() -> None:
        encode()

    @torch.inference_mode()
    def unet() -> None:
        found = encode()
        added = None
        if len(found) == 4:
            ids = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]], dtype=kind)
            added = {"text_embeds": found[2], "time_ids": ids}
        pipe.unet(latents, timestep, encoder_hidden_states=found[0], added_cond_kwargs=added, return_dict=False)

    @torch.inference_mode()
    def decode() -> None:
        image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
        pipe.image_processor.postprocess(image, output_type="np")

    return {"image": image, "text": text, "text+unet": unet, "decode": decode}


if __name__ == "__main__":
    serve(load)
