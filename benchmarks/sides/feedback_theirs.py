"""The feedback step with diffusers and PEFT: ``python -m benchmarks.sides.feedback_theirs MODEL REWARD EXCHANGE``.

One UNet with two PEFT LoRAs, of which the second is trained; diffusers' decoder with gradient checkpointing; the reward
in plain PyTorch. Inputs, noise and both LoRAs are those that this package's side has left in the folder.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import diffusers.utils.logging
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file

from benchmarks.sides import feedback, rewards_torch, training
from benchmarks.sides.training_theirs import MODULES, loaded, nchw

DISTILLED, SECOND = "distilled", "second"


def load() -> training.Loaded:
    model, reward, exchange = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    diffusers.utils.logging.disable_progress_bar()
    on_cpu = not torch.cuda.is_available()
    device, dtype = ("cpu", torch.float32) if on_cpu else ("cuda", torch.bfloat16)
    baseline = training.resident() if on_cpu else 0.0
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet", torch_dtype=dtype, low_cpu_mem_usage=True)
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae", torch_dtype=dtype, low_cpu_mem_usage=True)
    clip = transformers.CLIPModel.from_pretrained(reward)
    head = rewards_torch.aesthetic_head("linear", clip.config.projection_dim)
    head.load_state_dict(load_file(reward / "aesthetic_head.safetensors"))
    for module in (unet, vae, clip, head):
        module.requires_grad_(False)
        module.to(device)
    for module in (unet, vae):
        module.to(memory_format=torch.channels_last)
        module.enable_gradient_checkpointing()
        module.train()  # checkpointing asks for it; there is no dropout
    for name, file, rank in (
        (DISTILLED, feedback.DISTILLED, feedback.RANK),
        (SECOND, feedback.SECOND, feedback.FEEDBACK_RANK),
    ):
        state = {key.removeprefix("unet."): value for key, value in load_file(exchange / file).items()}
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=MODULES), name)
        found = set_peft_model_state_dict(unet, state, adapter_name=name)
        if found.unexpected_keys:
            sys.exit(f"{file}: does not fit PEFT's modules: {found.unexpected_keys[:3]}")
    unet.set_adapters([DISTILLED, SECOND], [1.0, 1.0])
    unet.to(device)
    factors = []
    for key, value in unet.named_parameters():
        if ".lora_" in key:
            value.requires_grad_(f".{SECOND}." in key)
            factors += [value] if value.requires_grad else []
    optimizer = torch.optim.AdamW(factors, lr=feedback.LEARNING_RATE, weight_decay=0.0)
    level = DDIMScheduler.from_pretrained(model, subfolder="scheduler").alphas_cumprod[feedback.TIME].to(device)
    with np.load(exchange / feedback.GIVEN) as arrays:
        context = torch.tensor(arrays["context"]).to(device, dtype)
        noise = iter([nchw(each).to(device) for each in arrays["noise"]])
    time = torch.full((1,), feedback.TIME, device=device)
    gc.collect()

    def update() -> dict[str, float]:
        x = next(noise)
        predicted = unet(x.to(dtype), time, context, return_dict=False)[0].float()
        x0 = (x - (1 - level).sqrt() * predicted) / level.sqrt()
        images = vae.decode((x0 / vae.config.scaling_factor).to(dtype), return_dict=False)[0].float() * 0.5 + 0.5
        # A value outside 0..1 is not seen, and never pushed further out.
        seen = images.clamp(0.0, 1.0)
        leaf = seen.permute(0, 2, 3, 1).detach().requires_grad_()
        score = rewards_torch.aesthetic_score(clip, head, leaf)
        loss = torch.relu(feedback.MARGIN - score).mean()
        (gradient,) = torch.autograd.grad(loss, leaf)
        gradient = gradient.permute(0, 3, 1, 2)
        outwards = ((images > 1) & (gradient < 0)) | ((images < 0) & (gradient > 0))
        images.backward(torch.where(outwards, torch.zeros_like(gradient), gradient))
        norm = torch.nn.utils.clip_grad_norm_(factors, feedback.CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {"loss": loss.item(), "grad_norm": norm.item(), "reward": score.mean().item()}

    return loaded(update, baseline, dtype, on_cpu=on_cpu)


if __name__ == "__main__":
    training.serve(load)
