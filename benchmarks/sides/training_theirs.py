"""The TSCD step with diffusers and PEFT: ``python -m benchmarks.sides.training_theirs MODEL SHAPE REMAT FOLDER``.

One `UNet2DConditionModel`: the teacher is the model with its adapters off, the student one PEFT LoRA and its moving
average a second one. Inputs, draws and the first LoRA are those that this package's side has left in the folder. Eager,
channels last, as diffusers advises for a CPU.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers.utils.logging
import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file

from benchmarks.sides import training

MODULES = [
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
]
STUDENT, TARGET = "student", "target"
Tensors = dict[str, torch.Tensor]


class Networks:
    """The UNet in its three parts, and how often it was called, a sample."""

    def __init__(self, unet: UNet2DConditionModel, dtype: torch.dtype) -> None:
        self.unet, self.dtype, self.calls = unet, dtype, 0

    def predict(self, x: torch.Tensor, t: torch.Tensor, cond: Tensors) -> torch.Tensor:
        """The raw prediction in float32."""
        self.calls += 1
        added = {"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]} if "pooled" in cond else None
        found = self.unet(x.to(self.dtype), t, cond["context"], added_cond_kwargs=added, return_dict=False)[0]
        return found.float()

    def teacher(
        self, x: torch.Tensor, t: torch.Tensor, cond: Tensors, uncond: Tensors, guidance: torch.Tensor
    ) -> torch.Tensor:
        """The bare model with classifier-free guidance, both halves in one call on a doubled batch."""
        self.unet.disable_adapters()
        both = {name: torch.cat([uncond[name], cond[name]]) for name in cond}
        unguided, prompted = self.predict(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        self.unet.enable_adapters()
        self.calls += 1
        return unguided + guidance.reshape(-1, 1, 1, 1) * (prompted - unguided)

    def adapted(self, name: str, x: torch.Tensor, t: torch.Tensor, cond: Tensors) -> torch.Tensor:
        """With one of the LoRAs."""
        self.unet.set_adapter(name)
        return self.predict(x, t, cond)

    def factors(self, name: str) -> list[torch.nn.Parameter]:
        """Factors of one LoRA, in the same order for both."""
        return [value for key, value in self.unet.named_parameters() if ".lora_" in key and f".{name}." in key]


def nchw(array: np.ndarray) -> torch.Tensor:
    """Latents (..., h, w, C) as (..., C, h, w)."""
    return torch.tensor(np.moveaxis(array, -1, -3))


def add_loras(unet: UNet2DConditionModel, file: Path, rank: int) -> None:
    """Two LoRAs with the file's factors, the active one trainable."""
    state = {name.removeprefix("unet."): value for name, value in load_file(file).items()}
    for name in (TARGET, STUDENT):
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=MODULES), name)
        found = set_peft_model_state_dict(unet, state, adapter_name=name)
        missing = [key for key in found.missing_keys if f".{name}." in key]
        if found.unexpected_keys or missing:
            sys.exit(f"{file}: does not fit PEFT's modules: {[*found.unexpected_keys, *missing][:3]}")


def make_update(unet: UNet2DConditionModel, model: Path, given: Tensors, dtype: torch.dtype) -> Callable[[], Any]:
    """One update after another, with the draws in their order."""
    stage, nets = training.CASES[training.COMPARED].stage, Networks(unet, dtype)
    device = given["latents"].device
    levels = DDIMScheduler.from_pretrained(model, subfolder="scheduler").alphas_cumprod.to(device)
    student, average = nets.factors(STUDENT), nets.factors(TARGET)
    optimizer = torch.optim.AdamW(
        student,
        lr=stage["learning_rate"],
        betas=(stage["beta1"], stage["beta2"]),
        weight_decay=stage["weight_decay"],
    )
    cond = {name: given[name] for name in ("context", "pooled", "time_ids") if name in given}
    uncond = {name: given[f"uncond_{name}"] if name != "time_ids" else value for name, value in cond.items()}
    numbers = iter(range(len(given["t_n"])))

    def noisy(t: torch.Tensor, x0: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        level = levels[t].reshape(-1, 1, 1, 1)
        return level.sqrt() * x0 + (1 - level).sqrt() * eps

    def psi(x: torch.Tensor, eps: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        level = levels[t].reshape(-1, 1, 1, 1)
        return noisy(s, (x - (1 - level).sqrt() * eps) / level.sqrt(), eps)

    def update() -> dict[str, float]:
        number = next(numbers)
        nets.calls = 0
        t_n, t_prev, t_end = (given[name][number] for name in ("t_n", "t_prev", "t_end"))
        x = noisy(t_n, given["latents"], given["eps"][number])
        with torch.no_grad():
            before = psi(x, nets.teacher(x, t_n, cond, uncond, given["guidance"][number]), t_n, t_prev)
            if bool((t_end == t_prev).all()):
                target = before
            else:
                target = psi(before, nets.adapted(TARGET, before, t_prev, cond), t_prev, t_end)
        prediction = psi(x, nets.adapted(STUDENT, x, t_n, cond), t_n, t_end)
        loss = torch.nn.functional.mse_loss(prediction, target)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(student, stage["clip_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(average, student, 1 - stage["ema"])
        return {"loss": loss.item(), "grad_norm": norm.item(), "calls": nets.calls}

    return update


def load() -> training.Loaded:
    model, shape_name, remat, folder = sys.argv[1:]
    diffusers.utils.logging.disable_progress_bar()
    on_cpu = not torch.cuda.is_available()
    device, dtype = ("cpu", torch.float32) if on_cpu else ("cuda", torch.bfloat16)
    baseline = training.resident() if on_cpu else 0.0
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet", torch_dtype=dtype, low_cpu_mem_usage=True)
    unet.requires_grad_(False)
    unet.to(device=device, memory_format=torch.channels_last)
    add_loras(unet, Path(folder) / training.ADAPTER, training.SHAPES[shape_name].rank)
    unet.to(device)
    if remat == "remat":
        unet.enable_gradient_checkpointing()
        unet.train()  # checkpointing asks for it; there is no dropout
    with np.load(Path(folder) / training.GIVEN) as arrays:
        given = {name: nchw(a) if name in ("latents", "eps") else torch.tensor(a) for name, a in arrays.items()}
    # Latents, times and guidance stay as they are; what the network alone reads is in its type.
    given = {
        name: value.to(device, dtype if "context" in name or "pooled" in name else None)
        for name, value in given.items()
    }
    update = make_update(unet, Path(model), given, dtype)
    gc.collect()

    return loaded(update, baseline, dtype, on_cpu=on_cpu)


def loaded(
    update: Callable[[], dict[str, float]], baseline: float, dtype: torch.dtype, *, on_cpu: bool
) -> training.Loaded:
    """Say what a side computes on and in, and how its memory is measured."""

    def device_peak() -> float:
        return torch.cuda.max_memory_allocated() / training.GIB

    return training.Loaded(
        update=update,
        baseline=baseline,
        about={"platform": "cpu" if on_cpu else "gpu", "dtype": str(dtype).removeprefix("torch.")},
        peak=training.resident_peak if on_cpu else device_peak,
    )


if __name__ == "__main__":
    training.serve(load)
