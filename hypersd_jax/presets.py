"""Sampling settings by name: one name sets solver, steps, eta, guidance and timesteps.

The recipes of released files are those of their model cards: ByteDance/Hyper-SD, ByteDance/SDXL-Lightning,
latent-consistency/lcm-lora-*, h1t/TCD-*-LoRA and tianweiy/DMD2.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypersd_jax.config import nearest
from hypersd_jax.errors import UserError, short, shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """``None`` leaves the choice to what comes next in line: LoRA header, LoRA file name, then the base's default.

    ``prediction_type`` is what the weights output, where the base's scheduler configuration has another.
    """

    sampler: str | None = None
    steps: int | None = None
    eta: float | None = None
    guidance: float | None = None
    spacing: str | None = None
    timesteps: tuple[int, ...] | None = None
    original_inference_steps: int | None = None
    prediction_type: str | None = None


BASE_SD = Preset(sampler="ddim", steps=25, eta=0.0, guidance=7.5)
BASE_SDXL = replace(BASE_SD, guidance=5.0)

_TRAILING = Preset(sampler="ddim", eta=0.0, guidance=0.0, spacing="trailing")
_UNIFIED = Preset(sampler="tcd", eta=1.0, guidance=0.0)
_LCM = Preset(sampler="lcm", eta=0.0, guidance=0.0)
_LIGHTNING = Preset(sampler="euler", eta=0.0, guidance=0.0, spacing="trailing")

PRESETS: dict[str, Preset] = {
    **{f"hyper-{base}-{n}steps": replace(_TRAILING, steps=n) for base in ("sd15", "sdxl") for n in (2, 4, 8)},
    **{f"hyper-{base}-1step": replace(_UNIFIED, steps=1) for base in ("sd15", "sdxl")},
    # guidance preserved: 5 to 8, within which lie the bases' own
    **{f"hyper-sd15-{n}steps-cfg": replace(_TRAILING, steps=n, guidance=BASE_SD.guidance) for n in (8, 12)},
    **{f"hyper-sdxl-{n}steps-cfg": replace(_TRAILING, steps=n, guidance=BASE_SDXL.guidance) for n in (8, 12)},
    "hyper-sdxl-1step-unet": replace(_LCM, steps=1, timesteps=(800,)),
    **{f"lcm-lora-{base}": replace(_LCM, steps=4) for base in ("sd15", "sdxl")},
    **{f"tcd-lora-{base}": replace(_UNIFIED, steps=4, eta=0.3) for base in ("sd15", "sd21", "sdxl")},
    **{f"sdxl-lightning-{n}steps": replace(_LIGHTNING, steps=n) for n in (2, 4, 8)},
    "sdxl-lightning-1step-unet": replace(_LIGHTNING, steps=1, prediction_type="sample"),
    "dmd2-sdxl-4steps": replace(_LCM, steps=4, timesteps=(999, 749, 499, 249)),
    "dmd2-sdxl-1step-unet": replace(_LCM, steps=1, timesteps=(399,)),
}

# Names of released files and of the repositories whose one file has no name of its own, lower case with hyphens.
_FILES = {
    r"hyper-(sd15|sdxl)-([248])steps-lora": r"hyper-\1-\2steps",
    r"hyper-(sd15|sdxl)-1step-lora": r"hyper-\1-1step",
    r"hyper-(sd15|sdxl)-(8|12)steps-cfg-lora": r"hyper-\1-\2steps-cfg",
    r"hyper-sdxl-1step-unet": r"hyper-sdxl-1step-unet",
    r"lcm-lora-sdv1-5": r"lcm-lora-sd15",
    r"lcm-lora-sdxl": r"lcm-lora-sdxl",
    r"tcd-(sd15|sdxl)-lora": r"tcd-lora-\1",
    r"tcd-sd21-base-lora": r"tcd-lora-sd21",
    r"sdxl-lightning-([248])step(?:-lora|-unet)?": r"sdxl-lightning-\1steps",
    r"sdxl-lightning-1step(?:-unet)?-x0": r"sdxl-lightning-1step-unet",
    r"dmd2-sdxl-4step-(?:lora|unet)": r"dmd2-sdxl-4steps",
    r"dmd2-sdxl-1step-unet": r"dmd2-sdxl-1step-unet",
}
_ENDING = r"(?:[-.](?:fp16|fp32|bf16|comfyui))*"
_UNNAMED = ("pytorch-lora-weights", "diffusion-pytorch-model", "adapter-model")


def name_for_file(file: str | Path) -> str | None:
    """The preset of a released file, recognised by its name; None for any other.

    A file that is called as all of its kind are (``pytorch_lora_weights.safetensors``) goes by the folder that it is
    in, or the repository's in a hub cache (``models--owner--name/snapshots/...``).
    """
    path = Path(file)
    name = re.sub(r"\.(safetensors|bin)$", "", path.name, flags=re.IGNORECASE).lower().replace("_", "-")
    names = [name]
    if re.fullmatch(f"({'|'.join(_UNNAMED)}){_ENDING}", name):
        near = [path.parent, *(parent for parent in path.parents if parent.name.startswith("models--"))]
        names = [parent.name.split("--")[-1].lower().replace("_", "-") for parent in near]
    for candidate in names:
        for pattern, preset in _FILES.items():
            found = re.fullmatch(pattern + _ENDING, candidate)
            if found:
                return found.expand(preset)
    return None


def preset_for_file(file: str | Path) -> Preset:
    """The settings of a released file, recognised by its name; all None for any other file."""
    name = name_for_file(file)
    return Preset() if name is None else PRESETS[name]


def find(name: str) -> Preset:
    """The preset of that name; an unknown one is a `UserError` with the nearest."""
    if name not in PRESETS:
        raise UserError(f"preset={name!r} is not known{nearest(name, PRESETS)}")
    return PRESETS[name]


def from_header(metadata: Mapping[str, str], file: str) -> Preset:
    """Read the sampling settings in a LoRA's safetensors header; keys it lacks stay None.

    Args:
        metadata: the header's, ours (`weights.lora.header.is_ours`).
        file: for the error.

    Raises:
        UserError: a value in the header does not parse; names file and key.
    """
    preset, unreadable = read_header(metadata)
    for key, reason in unreadable.items():
        raise UserError(f"{file}: its header's sampling settings cannot be read ({short(f'{key}: {reason}')})")
    return preset


def read_header(metadata: Mapping[str, str]) -> tuple[Preset, dict[str, str]]:
    """Read the settings of a header: those that can be read, and why the others cannot, by key."""
    values: dict[str, Any] = {}
    unreadable = {}
    for key, read in _READ.items():
        if key in metadata:
            try:
                values[key] = read(metadata[key])
            except (TypeError, ValueError, OverflowError, RecursionError) as error:
                unreadable[key] = str(error)
    return Preset(**values), unreadable


def _sampler(text: str) -> str:
    from hypersd_jax.diffusion import SOLVERS  # with NumPy, for which the list of presets does not wait

    name = text.strip('"')
    if name not in SOLVERS:
        raise ValueError(f"{shown(name)} is no solver{nearest(name, SOLVERS)}")
    return name


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise ValueError(f"{count} is below 1")
    return count


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{number} is not finite")
    return number


def _timesteps(text: str) -> tuple[int, ...]:
    listed = json.loads(text)
    if not isinstance(listed, list) or not listed or not all(type(t) is int for t in listed):
        raise ValueError(f"{shown(text)} is no list of whole numbers")
    return tuple(listed)


_READ: dict[str, Callable[[str], Any]] = {
    "sampler": _sampler,
    "steps": _count,
    "eta": _number,
    "guidance": _number,
    "timesteps": _timesteps,
    "original_inference_steps": _count,
}


def resolve(chain: list[Preset]) -> Preset:
    """The first value that is not None, key by key.

    What belongs together stays together: another step count or a spacing voids a later entry's timesteps, timesteps its
    spacing, and another sampler all three and its eta.
    """
    merged = Preset()
    for preset in chain:
        updates = {
            field.name: getattr(preset, field.name)
            for field in dataclasses.fields(Preset)
            if getattr(merged, field.name) is None and getattr(preset, field.name) is not None
        }
        timesteps = updates.get("timesteps")
        if timesteps is not None and merged.steps not in (None, len(timesteps)):
            del updates["timesteps"]
        if merged.sampler is not None and preset.sampler not in (None, merged.sampler):
            for key in ("timesteps", "eta", "spacing"):
                updates.pop(key, None)
        if merged.timesteps is not None:  # explicit timesteps leave nothing to space
            updates.pop("spacing", None)
        if merged.spacing is not None:
            updates.pop("timesteps", None)
        merged = replace(merged, **updates)
        if merged.timesteps is not None and merged.steps is None:  # a header may list timesteps alone
            merged = replace(merged, steps=len(merged.timesteps))
    return merged
