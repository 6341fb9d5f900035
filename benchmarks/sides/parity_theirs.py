"""The side of diffusers and PEFT on PyTorch: ``python -m benchmarks.sides.parity_theirs FAMILY MODEL FOLDER``.

One component is in memory at a time. The adapter that it makes is left in the folder for the other side to read.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import diffusers.utils.logging
import torch
import transformers.utils.logging
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from benchmarks.sides import parity

PIPELINES = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


def nchw(array: Any) -> torch.Tensor:
    return torch.tensor(array).permute(0, 3, 1, 2).contiguous()


def nhwc(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().permute(0, 2, 3, 1)


def factor(tensor: torch.Tensor) -> torch.Tensor:
    """A LoRA factor in this package's layout."""
    tensor = tensor.detach()
    if tensor.ndim == 2:
        return tensor.T
    kernel = tensor.permute(2, 3, 1, 0)
    return kernel[0, 0] if kernel.shape[:2] == (1, 1) else kernel


@torch.no_grad()
def text(family: str, model: Path, given: dict[str, Any], record: parity.Record) -> dict[str, torch.Tensor]:
    """Every text encoder's outputs; what the pipeline makes of the first prompt is returned."""
    pipe = DiffusionPipeline.from_pretrained(model, unet=None, vae=None)
    for name in ("text_encoder", "text_encoder_2"):
        encoder = getattr(pipe, name, None)
        if encoder is None:
            continue
        tokenizer = getattr(pipe, name.replace("text_encoder", "tokenizer"))
        tokenizer.model_max_length = parity.TOKENS  # of a real model; that of the folder has been cut for a smaller one
        ids = tokenizer(parity.PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
        ids = torch.cat([ids, torch.tensor(given["ids"], dtype=ids.dtype)])
        found = encoder(ids, output_hidden_states=True)
        record.keep(f"{name}.ids", ids.to(torch.int32))
        record.keep(f"{name}.last", found.last_hidden_state)
        record.keep(f"{name}.penultimate", found.hidden_states[-2])
        record.keep(f"{name}.pooled", found.text_embeds if hasattr(found, "text_embeds") else found.pooler_output)
    encoded = pipe.encode_prompt(
        prompt=parity.PROMPTS[0], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    pooled = {"pooled_prompt_embeds": encoded[2]} if family == "sdxl" else {}
    return {"prompt_embeds": encoded[0], **pooled}


def autoencoder(model: Path, given: dict[str, Any], record: parity.Record) -> None:
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae").requires_grad_(False)
    with torch.no_grad():
        posterior = vae.encode(nchw(given["image"])).latent_dist
    record.keep("vae.mean", nhwc(posterior.mean))
    record.keep("vae.logvar", nhwc(posterior.logvar))
    latents = nchw(given["latents"]).requires_grad_()
    decoded = vae.decode(latents).sample
    (decoded * nchw(given["image_weights"])).sum().backward()
    record.keep("vae.decoded", nhwc(decoded))
    record.keep("vae.decoded: d latents", nhwc(latents.grad))


def add_adapter(unet: UNet2DConditionModel, folder: Path) -> None:
    """A LoRA that is nowhere zero, and its file as diffusers writes PEFT's."""
    unet.add_adapter(LoraConfig(r=parity.RANK, lora_alpha=parity.ALPHA, target_modules=list(parity.MODULES)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if ".lora_" in name:
                fan_in = parameter[0].numel()
                parameter.normal_(std=fan_in**-0.5, generator=generator)
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
        weight_name="adapter.safetensors",
    )


def denoiser(unet: UNet2DConditionModel, given: dict[str, Any], folder: Path, record: parity.Record) -> None:
    """The bare UNet's value, then value and gradients with the adapter, which stays on."""
    leaves = {"latents": nchw(given["latents"])}
    leaves |= {name: torch.tensor(given[name]) for name in ("context", "pooled") if name in given}

    def call() -> torch.Tensor:
        added = None
        if "pooled" in leaves:
            added = {"text_embeds": leaves["pooled"], "time_ids": torch.tensor(given["time_ids"])}
        return unet(leaves["latents"], parity.TIMESTEP, leaves["context"], added_cond_kwargs=added).sample

    with torch.no_grad():
        record.keep("unet", nhwc(call()))
    add_adapter(unet, folder)
    unet.enable_gradient_checkpointing()
    unet.train()  # checkpointing asks for it; there is no dropout
    for leaf in leaves.values():
        leaf.requires_grad_()
    output = call()
    (output * nchw(given["weights"])).sum().backward()
    unet.eval()
    record.keep("unet+lora", nhwc(output))
    for name, leaf in leaves.items():
        record.keep(f"unet+lora: d {name}", nhwc(leaf.grad) if leaf.ndim == 4 else leaf.grad)
    for name, parameter in unet.named_parameters():
        module, found, rest = name.partition(".lora_")
        if found:
            record.keep(f"unet+lora: d {module}.{'down' if rest.startswith('A') else 'up'}", factor(parameter.grad))


@torch.no_grad()
def pipeline_images(
    family: str, model: Path, unet: Any, cond: dict[str, torch.Tensor], given: dict[str, Any], record: parity.Record
) -> None:
    """Whole pipelines from the text embeddings on, with the adapter: the text encoders have left the memory."""
    absent = ["text_encoder", "tokenizer", *(["text_encoder_2", "tokenizer_2"] if family == "sdxl" else [])]
    pipe = PIPELINES[family].from_pretrained(model, unet=unet, **dict.fromkeys(absent))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    for steps in parity.STEPS:
        kept: dict[str, torch.Tensor] = {}

        def keep(_pipe: Any, _step: int, _time: Any, tensors: dict[str, Any], kept: Any = kept) -> dict[str, Any]:
            kept.update(tensors)
            return tensors

        image = pipe(
            **cond,
            num_inference_steps=steps,
            guidance_scale=0.0,
            latents=nchw(given["latents"]),
            height=parity.PIXELS,
            width=parity.PIXELS,
            output_type="np",
            callback_on_step_end=keep,
        ).images
        record.keep(f"{steps}-step pipeline: latents", nhwc(kept["latents"]))
        record.keep(f"{steps}-step pipeline: image", 2 * image - 1)


def main() -> None:
    family, model, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    given, record = parity.inputs(family), parity.Record("theirs", folder)
    with record.part("text"):
        cond = text(family, model, given, record)
    gc.collect()
    with record.part("vae"):
        autoencoder(model, given, record)
    gc.collect()
    with record.part("unet"):
        unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet", low_cpu_mem_usage=True)
        unet.requires_grad_(False)
        denoiser(unet, given, folder, record)
    with record.part("images"):
        pipeline_images(family, model, unet, cond, given, record)
    record.write()


if __name__ == "__main__":
    main()
