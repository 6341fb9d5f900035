"""The description of a pipeline in one line, and diffusers' names of a call's arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from hypersd_jax.bases import TextToImage
from hypersd_jax.config import nearest
from hypersd_jax.errors import UserError
from hypersd_jax.pipeline.lora_stack import LoadedLora
from hypersd_jax.weights.components import EMBEDDED, assets

# diffusers' arguments of a call and of `from_pretrained`, and what to do instead.
_OTHER_NAMES = {
    "num_inference_steps": "use steps",
    "guidance_scale": "use guidance",
    "num_images_per_prompt": "use num_images",
    "generator": "use seed, a whole number",
    "output_type": 'use output: "pil", "np" or "latent"',
    "return_dict": "the images themselves are returned",
    "callback_on_step_end": "use callback, called as callback(step, steps)",
    "callback_on_step_end_tensor_inputs": "use callback, called as callback(step, steps)",
    "callback_steps": "use callback, which is called after each step",
    "cross_attention_kwargs": "use set_lora_scale for the scale of a LoRA",
    "joint_attention_kwargs": "use set_lora_scale for the scale of a LoRA",
    "controlnet_conditioning_scale": "use control_scale",
    "controlnet_conditioning_image": "use control_image",
    "conditioning_image": "use control_image",
    "mask_image": "use mask",
    "init_image": "use image",
    "scheduler": "use sampler and spacing",
    "num_steps": "use steps",
    "torch_dtype": "use dtype",
    "device_map": "use mesh",
    "revision": "write owner/name@revision",
    "variant": "name the file, owner/name/file.safetensors",
    "use_safetensors": "leave it out, nothing else is read",
    "safety_checker": "leave it out, there is none",
    "requires_safety_checker": "leave it out, there is none",
    "prompt_2": "one prompt is read by both text encoders",
    "negative_prompt_2": "one negative_prompt is read by both text encoders",
    **dict.fromkeys(
        (
            "clip_skip",
            "control_guidance_end",
            "control_guidance_start",
            "crops_coords_top_left",
            "denoising_end",
            "denoising_start",
            "guidance_rescale",
            "ip_adapter_image",
            "ip_adapter_image_embeds",
            "masked_image_latents",
            "negative_crops_coords_top_left",
            "negative_original_size",
            "negative_pooled_prompt_embeds",
            "negative_prompt_embeds",
            "negative_target_size",
            "original_size",
            "padding_mask_crop",
            "pooled_prompt_embeds",
            "prompt_embeds",
            "sigmas",
            "target_size",
        ),
        "there is nothing like it here",
    ),
}


def refuse_unknown(unknown: Mapping[str, Any], function: Callable[..., Any]) -> None:
    """Refuse arguments that ``function`` does not have.

    Raises:
        UserError: one is diffusers'; the line names ours.
        TypeError: nobody's; with the nearest name.
    """
    for name in unknown:
        if name in _OTHER_NAMES:
            raise UserError(f"{name} is diffusers' name: {_OTHER_NAMES[name]}")
    for name in unknown:
        parameters = inspect.signature(function).parameters.values()
        names = [each.name for each in parameters if each.kind is not each.VAR_KEYWORD]
        raise TypeError(f"there is no argument {name!r}{nearest(name, names)}")


def described(base: TextToImage, loras: Mapping[str, LoadedLora], *, fused: bool) -> str:
    """Describe a pipeline in one line: model, LoRAs with their scales, devices, data type."""
    listed = ", ".join(f"{name}@{lora.scale:g}" for name, lora in loras.items()) or "none"
    if (mesh := base.mesh) is not None:
        axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
        devices = f"{mesh.size} x {mesh.devices.flat[0].device_kind} ({axes})"
    else:
        held: jax.Array = next(iter(base.params[base.denoiser].values()))
        devices = ", ".join(sorted(map(str, held.devices())))
    return (
        f"Pipeline(model {model_name(base)}, LoRAs: {listed}{' (fused)' if fused else ''},"
        f" {jnp.dtype(base.dtype).name} on {devices})"
    )


def model_name(base: TextToImage) -> str:
    """The source of the model; ``embedded`` for the one inside the package."""
    return EMBEDDED if base.source == assets() / "teacher" else str(base.source)
