"""One model folder in diffusers' pipeline and in ours, sampling the same prompts from the same latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from hypersd_jax.pipeline import Pipeline

PROMPTS = ["red apple, fluent flat style", "a cat face, noto style, blue background"]
STEPS = 4
TOLERANCE = 1e-4
"""Relative L2 error of float32 images in 0..1."""
ANOTHER = 1e-2
"""The least relative L2 difference of images that must not be the same: a hundred times the tolerance."""


class Both:
    """The two pipelines, with DDIM and trailing timesteps."""

    def __init__(self, folder: Path) -> None:
        self.theirs = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
        self.theirs.set_progress_bar_config(disable=True)
        self.theirs.scheduler = diffusers.DDIMScheduler.from_config(
            self.theirs.scheduler.config, timestep_spacing="trailing"
        )
        self.ours = Pipeline.from_pretrained(folder)
        parts = self.ours.base.components
        height, width = (side // parts.vae_config.downscale for side in self.ours.native_size)
        self.size = {"height": self.ours.native_size[0], "width": self.ours.native_size[1]}
        shape = (len(PROMPTS), height, width, parts.unet_config.in_channels)
        self.latents = np.random.default_rng(0).standard_normal(shape).astype(np.float32)

    def sample_theirs(self, guidance: float) -> np.ndarray:
        """With what their pipeline has loaded."""
        latents = torch.from_numpy(self.latents).permute(0, 3, 1, 2)
        call = {"num_inference_steps": STEPS, "guidance_scale": guidance, "output_type": "np", **self.size}
        return self.theirs(prompt=PROMPTS, latents=latents, **call).images

    def sample_ours(self, guidance: float | None, **call: Any) -> np.ndarray:
        """With what our pipeline has loaded."""
        call = {"steps": STEPS, "sampler": "ddim", "eta": 0.0, "spacing": "trailing", "stepwise": True, **call}
        return self.ours(PROMPTS, latents=self.latents, guidance=guidance, output="np", **call)

    def load_theirs(self, file: Path, name: str) -> None:
        """One LoRA file into theirs, under a name for `set_adapters`."""
        self.theirs.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)

    def unload(self) -> None:
        """All LoRAs out of both."""
        self.theirs.unload_lora_weights()
        self.ours.unload_lora()
