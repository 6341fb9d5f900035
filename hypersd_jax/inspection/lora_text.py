"""A LoRA's report in lines: the table of scales, and what a reader must know about them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from hypersd_jax.inspection.report import aligned, counted, labelled, metadata_lines, size_text
from hypersd_jax.interop.loaders import Module, Reading
from hypersd_jax.weights.components import EMBEDDED
from hypersd_jax.weights.lora.match import listing
from hypersd_jax.weights.lora.survey import Survey

OURS = "hypersd"
"""What this package is called among the loaders."""

FAMILY_NAMES = {"sd15": "SD 1.x", "sd21": "SD 2.x", "sdxl": "SDXL", EMBEDDED: "the embedded model"}
_LAYOUTS = {
    "kohya": "kohya's, diffusers' block names",
    "kohya-sgm": "kohya's, sgm's block names",
    "PEFT": "PEFT's, as diffusers saves it",
    "diffusers": "diffusers' of 2023",
    "ComfyUI": "ComfyUI's own",
    "OneTrainer": "OneTrainer's",
}
_PEFT_ALPHA = 8
"""PEFT's default alpha, which exporters lose: see docs/lora_formats.md."""


def scale_of(reading: Reading, index: int) -> float | None:
    """The scale that a loader gives a module; None where it leaves it out."""
    return None if reading.refused is not None else reading.effects[index].scale


def remarks(
    modules: Sequence[Module], readings: Mapping[str, Reading], found: Survey, *, is_xl: bool | None
) -> list[str]:
    """What a reader must know: where loaders differ from alpha / rank, and what alpha leaves open."""
    told = []
    differs = False
    for name, reading in readings.items():
        if reading.refused is not None:
            told.append(f"{name} refuses it: {reading.refused}")
            continue
        for note, count in Counter(effect.note for effect in reading.effects if effect.note).items():
            lost = any(effect.note == note and effect.scale is None for effect in reading.effects)
            verb = "leaves out" if lost else "applies, but"
            told.append(f"{name} {verb} {count:,} of {counted(len(modules), 'module')}: {note}")
        other = Counter(
            (module.scale, effect.scale)
            for module, effect in zip(modules, reading.effects, strict=True)
            if effect.scale is not None and abs(effect.scale - module.scale) > 1e-6 * abs(module.scale)
        )
        differs = differs or bool(other)
        for (stated, applied), count in other.items():
            factor = f", {applied / stated:.4g} times as strong" if stated and applied is not None else ""
            told.append(f"{name} applies {counted(count, 'module')} at {applied:g}, not at {stated:g}{factor}")
    strong = Counter(
        (module.alpha, module.rank) for module in modules if module.alpha is not None and module.scale != 1
    )
    for (alpha, rank), count in strong.items():
        if alpha and rank is not None:
            ignored = f"a loader that ignores alpha makes it {rank / alpha:.4g} times as strong"
            told.append(f"alpha {alpha:g} at rank {rank} ({counted(count, 'module')}): {ignored}")
    silent = [module for module in modules if module.alpha is None and module.rank is not None]
    if silent and any(module.layout in ("PEFT", "diffusers") for module in silent):
        ranks = sorted({module.rank for module in silent if module.rank})
        meant = ", ".join(f"{_PEFT_ALPHA / rank:g} at rank {rank}" for rank in ranks if rank > _PEFT_ALPHA)
        if meant:
            told.append(f"no alpha is stated, so all take 1; if it was trained at PEFT's default alpha 8: {meant}")
    if found.left_out:
        many = "it is" if len(found.left_out) == 1 else "they are"
        listed = listing(found.left_out)
        told.append(f"{counted(len(found.left_out), 'embedding')} came with it, and {many} not used: {listed}")
    plain = all(module.kind.is_adapter and not module.kind.bias for module in modules)
    # SDXL's under sgm's names lose nothing anywhere, see docs/lora_formats.md.
    best = "kohya-sgm" if is_xl else "kohya"
    written = {module.layout for module in modules} == {best} and not differs
    if plain and is_xl is not None and not found.unmatched and not written and (differs or _loses(readings)):
        told.append(f"`hypersd convert lora IN OUT --to {best}` makes a file that all of them read alike")
    return told


def _loses(readings: Mapping[str, Reading]) -> bool:
    """Whether any loader leaves out a module."""
    return any(reading.refused or any(each.scale is None for each in reading.effects) for reading in readings.values())


def report_lines(data: Mapping[str, Any], modules: Sequence[Module], readings: Mapping[str, Reading]) -> list[str]:
    """The report of `lora.inspect_lora` for a reader."""
    base = data["base"]
    layouts = ", ".join(_LAYOUTS.get(name, name) for name in data["layout"].split("+"))
    lines = [
        f"{data['file']}: LoRA, {size_text(data['bytes'])}, {'/'.join(data['dtypes'])}",
        labelled("layout", layouts),
    ]
    stated = f"; its header says {base['stated']}" if base["stated"] else ""
    if base["family"] is None:
        lines.append(labelled("base", f"fits none that is known here{stated}; name it with --base MODEL"))
    else:
        fits = "every key fits" if not base["keys_not_matching"] else f"{base['keys_matching']:,} keys fit"
        others = [FAMILY_NAMES[name] for name in base["fits"] if name != base["family"]]
        fits += f", and of {', '.join(others)} too" if others else ""
        lines.append(labelled("base", f"{FAMILY_NAMES.get(base['family'], base['family'])}: {fits}{stated}"))
    for reason, keys in base["not_matching"].items():
        lines.append(labelled("not fitting", f"{counted(len(keys), 'key')}, {reason}: {listing(keys)}"))
    counts = Counter(module.component for module in modules)
    lines.append(labelled("modules", ", ".join(f"{count:,} {name}" for name, count in counts.items())))
    lines += ["", *_table(modules, readings), ""]
    lines += [f"  * {remark}" for remark in data["remarks"]] or ["  * all of them apply every module alike"]
    lines.append("")
    settings = data["settings"]
    if settings["source"] is not None:
        told = ", ".join(f"{key} {_plain(value)}" for key, value in settings.items() if key != "source")
        where = "its header" if settings["source"] == "header" else f"preset {settings['source']}"
        lines.append(labelled("sampling", f"{told} ({where})"))
    else:
        lines.append(labelled("sampling", "it states nothing, so the model's own many steps"))
    lines += metadata_lines({key: value for key, value in data["metadata"].items() if key not in settings})
    return [*lines, labelled("try", data["call"])]


def _plain(value: Any) -> str:
    return (
        ",".join(map(str, value))
        if isinstance(value, list)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def _table(modules: Sequence[Module], readings: Mapping[str, Reading]) -> list[str]:
    """Modules that are alike in rank, alpha and all scales, a row each, with the scale in each program."""

    def row(index: int) -> tuple[Any, ...]:
        module = modules[index]
        scales = tuple(scale_of(reading, index) for reading in readings.values())
        return (module.component, module.layout, str(module.kind), module.rank, module.alpha, *scales)

    order = sorted(range(len(modules)), key=lambda index: [str(cell) for cell in row(index)])
    rows = [["modules", "e.g.", "rank", "alpha", *readings]]
    several = len({module.layout for module in modules}) > 1
    for (component, layout, kind, rank, alpha, *scales), group in itertools.groupby(order, row):
        members = list(group)
        named = f"{len(members):,} {component}, {kind}" + (f", {layout}" if several else "")
        cells = ["-" if rank is None else str(rank), "none" if alpha is None else f"{alpha:g}"]
        cells += ["-" if scale is None else f"{scale:.4g}" for scale in scales]
        rows.append([named, _tail(modules[members[0]].path), *cells])
    return aligned(rows)


def _tail(path: str) -> str:
    return path if len(path) <= 32 else f"...{path[-29:]}"
