"""Sampling settings by name: one name sets solver, steps, eta, guidance and timesteps.

The released Hyper-SD files' recipes are those of their model card (ByteDance/Hyper-SD).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

from hypersd_jax.config import nearest
from hypersd_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """``None`` leaves the choice to what comes next in line: LoRA header, then the base's default."""

    sampler: str | None = None
    steps: int | None = None
    eta: float | None = None
    guidance: float | None = None
    spacing: str | None = None
    timesteps: tuple[int, ...] | None = None
    original_inference_steps: int | None = None


BASE_SD = Preset(sampler="ddim", steps=25, eta=0.0, guidance=7.5)
BASE_SDXL = dataclasses.replace(BASE_SD, guidance=5.0)


def _trailing(steps: int) -> Preset:
    return Preset(sampler="ddim", steps=steps, eta=0.0, guidance=0.0, spacing="trailing")


_UNIFIED = Preset(sampler="tcd", eta=1.0, guidance=0.0)

PRESETS: dict[str, Preset] = {
    **{f"hyper-{family}-{n}steps": _trailing(n) for family in ("sd15", "sdxl") for n in (2, 4, 8)},
    **{f"hyper-{family}-1step": dataclasses.replace(_UNIFIED, steps=1) for family in ("sd15", "sdxl")},
    "hyper-sdxl-1step-unet": Preset(sampler="lcm", steps=1, eta=0.0, guidance=0.0, timesteps=(800,)),
}


def find(name: str) -> Preset:
    """The preset of that name; an unknown one is a `UserError` with the nearest."""
    if name not in PRESETS:
        raise UserError(f"preset={name!r} is not known{nearest(name, PRESETS)}")
    return PRESETS[name]


def from_header(metadata: Mapping[str, str], file: str) -> Preset:
    """What a LoRA's safetensors header says of its own sampling; keys it lacks stay None.

    Raises:
        UserError: a value in the header does not parse; names file and key.
    """

    def read(key: str) -> object:
        text = metadata.get(key)
        if text is None:
            return None
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text

    try:
        steps, eta, guidance = read("steps"), read("eta"), read("guidance")
        timesteps, sampler, origin = read("timesteps"), read("sampler"), read("original_inference_steps")
        return Preset(
            sampler=None if sampler is None else str(sampler),
            steps=None if steps is None else int(str(steps)),
            eta=None if eta is None else float(str(eta)),
            guidance=None if guidance is None else float(str(guidance)),
            timesteps=None if timesteps is None else tuple(int(t) for t in timesteps),  # type: ignore[attr-defined]
            original_inference_steps=None if origin is None else int(str(origin)),
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: its header's sampling settings cannot be read ({error})") from None


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
        merged = dataclasses.replace(merged, **updates)
    return merged
