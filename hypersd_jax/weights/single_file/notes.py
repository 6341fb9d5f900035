"""The settings of a model that a single file cannot carry to other programs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from hypersd_jax.errors import UserError
from hypersd_jax.weights import families
from hypersd_jax.weights.assembly import Description, Structure, parse
from hypersd_jax.weights.single_file.configs import Generation, Sizes, component_configs

# The settings of each part that change an image and are in no tensor.
_TEXT = ("num_attention_heads", "hidden_act", "layer_norm_eps")
_FIELDS = {
    "unet": ("heads", "groups", "norm_eps", "act_fn", "downsample_padding", "flip_sin_to_cos", "freq_shift"),
    "vae": ("scaling_factor", "shift_factor", "groups", "act_fn"),
    "text_encoder": _TEXT,
    "text_encoder_2": _TEXT,
}
_SCHEDULE = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")


def settings_lost(
    sizes: Sizes, description: Description, structure: Structure, kind: Generation, file: Path
) -> list[str]:
    """Settings that other programs will take to be the family's, and which are not, as ``part.setting``."""
    prediction = str(description.scheduler_config.get("prediction_type", "epsilon"))
    found = []
    for name in structure.components:
        others = {other: config for other, config in description.configs.items() if other != name}
        try:
            configs = component_configs(sizes, kind, file, prediction=prediction, given=others)
            derived = _part(parse(dataclasses.replace(description, configs=configs)), name)
        except UserError:  # no model of the family has such a part: nothing can be derived
            found.append(f"{name}.config")
            continue
        own = _part(structure, name)
        found += [f"{name}.{field}" for field in _FIELDS[name] if getattr(own, field) != getattr(derived, field)]
    if structure.unet.time_cond_proj_dim:
        found.append("unet.time_cond_proj_dim")
    usual = families.SCHEDULERS[kind]
    found += [
        f"scheduler.{key}" for key in _SCHEDULE if description.scheduler_config.get(key, usual[key]) != usual[key]
    ]
    # diffusers takes an SD 2.x file for 768-v unless it inpaints, and no mark says that a model predicts the image.
    inpaints = structure.unet.in_channels != structure.unet.out_channels
    if prediction == "sample" or (kind == "sd2" and prediction == ("v_prediction" if inpaints else "epsilon")):
        found.append("scheduler.prediction_type")
    return found


def _part(structure: Structure, name: str) -> Any:
    return structure.text[name] if name in structure.text else getattr(structure, name)
