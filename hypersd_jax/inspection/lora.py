"""A LoRA file: its layout and base, the scale of each module in each known loader, and how to sample with it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypersd_jax import presets
from hypersd_jax.errors import UserError
from hypersd_jax.inspection.lora_text import OURS, remarks, report_lines, scale_of
from hypersd_jax.inspection.report import Report, command, counted
from hypersd_jax.interop.loaders import LOADERS, Contents, Effect, Module, Reading
from hypersd_jax.interop.recipe import KNOWN_BASES, stated_preset
from hypersd_jax.presets import Preset
from hypersd_jax.weights.components import EMBEDDED
from hypersd_jax.weights.families import FAMILIES
from hypersd_jax.weights.lora import header
from hypersd_jax.weights.lora.convert import base_shapes, family_shapes
from hypersd_jax.weights.lora.file import strength_of, weights_file
from hypersd_jax.weights.lora.kinds import rank_of
from hypersd_jax.weights.lora.layout import COMPONENTS, Shapes
from hypersd_jax.weights.lora.match import listing
from hypersd_jax.weights.lora.sgm import SDXL_ONLY
from hypersd_jax.weights.lora.survey import Survey, survey, survey_alone
from hypersd_jax.weights.tensors import TensorFile, open_tensors

_KOHYA_FAMILIES = {"sd15": "sd_v1", "sd21": "sd_v2", "sdxl": "sdxl_base_v1-0"}


@dataclass(frozen=True, kw_only=True)
class Held:
    """A file held against the base that it fits best.

    Attributes:
        base: a family, "embedded", or the model that was named; None where it fits none that is known.
        found: the survey.
        is_xl: whether that base is SDXL; None where it is not known.
        fits: all known bases of which every key is found.
    """

    base: str | None
    found: Survey
    is_xl: bool | None = None
    fits: tuple[str, ...] = ()


def inspect_lora(path: Path, *, base: str | None = None, family: str | None = None) -> Report:
    """Describe a LoRA.

    Args:
        path: a file, or a PEFT or diffusers LoRA folder.
        base: the model that it is for; None: the known one that it fits best.
        family: "sd15", "sd21" or "sdxl" instead.

    Raises:
        UserError: the file cannot be read, or holds no LoRA of any kind that is read here.
    """
    file = weights_file(path)
    with open_tensors(file) as tensors:
        held = _held(tensors, base, family)
        if not held.found.slots:
            reason, keys = next(iter(held.found.not_matching.items()), ("holds no module", []))
            _refuse(file, reason, keys)
        modules = _modules(tensors, held.found)
        keys, metadata = tensors.keys(), tensors.metadata
        dtypes = Counter(tensors.dtype(key).name for key in keys if not key.endswith(".alpha"))
    contents = Contents(modules=modules, keys=keys, metadata=metadata, is_xl=held.is_xl)
    readings = {OURS: _ours(modules, held), **{name: read(contents) for name, read in LOADERS.items()}}
    preset, source = _stated(file, metadata)
    data = {
        "file": str(path),
        "what": "LoRA",
        "bytes": file.stat().st_size,
        "layout": "+".join(sorted({module.layout for module in modules})),
        "dtypes": dict(dtypes),
        "base": {
            "family": held.base,
            "fits": list(held.fits),
            "stated": metadata.get("ss_base_model_version"),
            "keys_matching": held.found.matched,
            "keys_not_matching": held.found.unmatched,
            "not_matching": dict(held.found.not_matching),
        },
        "left_out": held.found.left_out,
        "modules": [_module_data(module, index, readings) for index, module in enumerate(modules)],
        "loaders": {name: _loader_data(reading) for name, reading in readings.items()},
        "remarks": remarks(modules, readings, held.found, is_xl=held.is_xl),
        "settings": {"source": source, **_settings(preset)},
        "metadata": metadata,
        "call": _call(path, held.base, base, preset),
    }
    return Report(data=data, lines=report_lines(data, modules, readings))


def _refuse(file: Path, reason: str, keys: Sequence[str]) -> None:
    """Refuse a file of which no module is read."""
    named = f" ({listing(list(keys))})" if keys else ""
    raise UserError(f"{file}: no module of it is read here: {reason}{named}")


def _held(tensors: TensorFile, base: str | None, family: str | None) -> Held:
    if base is not None or family is not None:
        return _against(tensors, base or str(family), base_shapes(base) if base else family_shapes(str(family)))
    tried = [
        _against(tensors, name, base_shapes(EMBEDDED) if name == EMBEDDED else family_shapes(name))
        for name in (*FAMILIES, EMBEDDED)
    ]
    fitting = [held for held in tried if not held.found.unmatched]
    if fitting:
        # A LoRA of few modules fits several families, and then its header knows.
        said = tensors.metadata.get("ss_base_model_version", "")
        stated = [held for held in fitting if said and _KOHYA_FAMILIES.get(held.base or "", "?")[:5] == said[:5]]
        chosen = (stated or fitting)[0]
        return dataclasses.replace(chosen, fits=tuple(str(held.base) for held in fitting))
    best = max(tried, key=lambda held: held.found.matched)
    if best.found.matched > best.found.unmatched:
        return best
    return Held(base=None, found=survey_alone(tensors))


def _against(tensors: TensorFile, name: str, shapes: Shapes) -> Held:
    return Held(base=name, found=survey(tensors, shapes), is_xl=SDXL_ONLY in shapes.get("unet", {}))


def _modules(tensors: TensorFile, found: Survey) -> list[Module]:
    layouts = {slot.layout.name: slot.layout for slot in found.slots.values()}
    metadata = tensors.metadata
    strengths = {name: each.strengths(tensors.path, metadata) for name, each in layouts.items() if each.strengths}
    modules = []
    in_order = sorted(found.slots.items(), key=lambda item: COMPONENTS.index(item[0][0]))
    for (component, path), slot in in_order:
        rank = rank_of(slot.shapes(tensors))
        scale, alpha = strength_of(tensors, slot, rank, strengths.get(slot.layout.name))
        modules.append(
            Module(
                component=component,
                path=path,
                key=next(iter(slot.keys.values())),
                layout=slot.first.layout,
                kind=slot.kind,
                roles=frozenset(slot.keys),
                rank=rank,
                alpha=alpha,
                scale=scale,
            )
        )
    return modules


def _ours(modules: Sequence[Module], held: Held) -> Reading:
    refused = None
    if held.base is not None and held.found.unmatched:
        refused = f"it refuses a file of which {counted(held.found.unmatched, 'key')} would be left out"
    if held.base is None:
        refused = "it fits no base that is known here; name one with --base"
    return Reading(effects=[Effect(module.scale) for module in modules], refused=refused)


def _module_data(module: Module, index: int, readings: Mapping[str, Reading]) -> dict[str, Any]:
    return {
        "component": module.component,
        "module": module.path,
        "key": module.key,
        "layout": module.layout,
        "kind": str(module.kind),
        "rank": module.rank,
        "alpha": module.alpha,
        "scales": {name: scale_of(reading, index) for name, reading in readings.items()},
    }


def _loader_data(reading: Reading) -> dict[str, Any]:
    notes = Counter(effect.note for effect in reading.effects if effect.note)
    applied = 0 if reading.refused is not None else sum(effect.scale is not None for effect in reading.effects)
    return {"refused": reading.refused, "modules_applied": applied, "notes": dict(notes)}


def _stated(file: Path, metadata: Mapping[str, str]) -> tuple[Preset, str | None]:
    """The settings that a LoRA states, and where: "header", or the preset of a released file's name."""
    preset = stated_preset(file, metadata)
    if header.stated(metadata):
        return preset, "header"
    return preset, presets.name_for_file(file)


def _settings(preset: Preset) -> dict[str, Any]:
    names = ("sampler", "steps", "eta", "guidance", "spacing", "timesteps", "original_inference_steps")
    found = {name: getattr(preset, name) for name in names}
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in found.items() if value is not None
    }


def _call(path: Path, found: str | None, base: str | None, preset: Preset) -> str:
    """The command that samples with the LoRA as it says itself."""
    words = ["hypersd", "sample"]
    if base is not None:
        words += ["--model", base]
    elif found != EMBEDDED:
        words += ["--model", KNOWN_BASES[_KOHYA_FAMILIES[found]][0] if found in _KOHYA_FAMILIES else "MODEL"]
    words += ["--lora", str(path)]
    for option, value in (("sampler", preset.sampler), ("steps", preset.steps), ("eta", preset.eta)):
        words += [] if value is None else [f"--{option}", f"{value:g}" if isinstance(value, float) else str(value)]
    words += [] if preset.guidance is None else ["--guidance", f"{preset.guidance:g}"]
    words += [] if preset.spacing is None else ["--spacing", preset.spacing]
    words += [] if preset.timesteps is None else ["--timesteps", ",".join(map(str, preset.timesteps))]
    prompt = "red apple, fluent flat style" if found == EMBEDDED else "a lighthouse at dusk"
    return command(*words, "--prompt", prompt)
