"""``hypersd evaluate``: any model with any LoRAs on a fixed list of prompts, in numbers, pictures and one page."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hypersd_jax.conditioning import warn_of_cuts
from hypersd_jax.config import EMBEDDED_GUIDANCE
from hypersd_jax.diffusion import solver_table
from hypersd_jax.errors import UserError
from hypersd_jax.evaluation import SPECS, features, knows, load_scorer, seen_by
from hypersd_jax.paths import parse_lora
from hypersd_jax.pipeline import Pipeline, Settings
from hypersd_jax.png_text import name_of
from hypersd_jax.rewards import load_clip
from hypersd_jax.stages import evaluate_sources as sources
from hypersd_jax.stages.evaluate_drawing import Drawn, Model, Prompted, draw_list, weights_identity, with_loras
from hypersd_jax.stages.evaluate_output import Origin, write_results
from hypersd_jax.stages.evaluate_rows import Row, Yardsticks, diversity_values, floor_row, picture_row
from hypersd_jax.stages.provenance import typed_command
from hypersd_jax.training import make_mesh
from hypersd_jax.weights.components import EMBEDDED
from hypersd_jax.weights.lora import weights_file

MANY_STEPS = 25
DIVERSE_PROMPTS, DIVERSE_SEEDS = 64, 4
# Seeds of further pictures lie beyond those of any list.
SEED_STRIDE = 2_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluated:
    """A model's name, its pictures of the list, and further ones of the list's beginning from other seeds."""

    name: str
    model: Model
    drawn: Drawn
    others: tuple[Drawn, ...]

    def row(self, yardsticks: Yardsticks, items: Sequence[Prompted]) -> Row:
        """Its row of results.json."""
        settings = self.model.settings
        return {
            "model": self.name,
            "sampler": settings.sampler,
            "steps": settings.steps,
            "guidance": settings.guidance,
            "calls": self.model.calls,
            **picture_row(yardsticks, items, self.drawn),
            **diversity_values(self.drawn.features, [other.features for other in self.others]),
            "seconds_per_image": self.drawn.seconds,
        }


def run_evaluate(options: argparse.Namespace) -> list[Row]:
    """Do what the options of ``hypersd evaluate`` say; returns the rows of results.json.

    Raises:
        UserError: one line naming the option or file at fault.
    """
    begin = time.perf_counter()
    _check(options)
    references = sources.read_references(options.reference or [sources.BASE])
    clip = None if options.clip is None else load_clip(options.clip)
    loras = [parse_lora(text) for text in options.lora]
    own = None if options.prompts_file is None else sources.own_list(options.prompts_file, options.n)
    mesh = make_mesh() if jax.device_count() > 1 else None
    pipe = Pipeline.from_pretrained(options.model, dtype=options.dtype, mesh=mesh)
    listed = own or sources.embedded_list(options.n, options.groups, pipe.native_size[0])
    warn_of_cuts(pipe.prompts.cuts([item.prompt for item in listed.items]))
    run = None if references.run is None else sources.load_run(references.run, pipe.native_size)
    base = _base_model(pipe, options)
    model = _loaded(pipe, options, loras, base.identity)
    real = _real_features(options, references.data, own is None, pipe.native_size)

    names = [name_of(options.model), *(f"{name_of(file)}@{scale:g}" for file, scale in loras)]
    found = _evaluated(" + ".join(names), model, listed.items, options)
    pipe.unload_lora()
    columns = {} if listed.real is None else {"real": listed.real}
    yardsticks = Yardsticks(real=None if real is None else real[0], clip=clip)
    scorer = load_scorer("report")
    if knows(scorer, [item.prompt for item in listed.items]):
        yardsticks = dataclasses.replace(yardsticks, scorer=scorer)
    rows = [] if real is None else [floor_row(*real)]
    if listed.real is not None:
        drawn = Drawn(listed.real, features(listed.real), seen_by(SPECS["report"], listed.real), 0.0, ())
        rows.append({"model": "real pictures of these prompts", **picture_row(yardsticks, listed.items, drawn)})
    if references.base:
        many = _evaluated(f"{names[0]} (reference)", base, listed.items, options)
        yardsticks = dataclasses.replace(yardsticks, reference=(listed.items, many.drawn))
        rows.append(many.row(yardsticks, listed.items))
        columns[f"{MANY_STEPS} steps"] = many.drawn.images
    elif run is not None:
        yardsticks = dataclasses.replace(yardsticks, reference=run)
        rows.append({"model": f"{references.run} (reference)", **picture_row(yardsticks, *run)})
    rows.append(found.row(yardsticks, listed.items))
    columns[found.name] = found.drawn.images
    sources.save_run(options.output, listed.items, found.drawn)
    origin = Origin(
        command=typed_command(options.arguments),
        seconds=time.perf_counter() - begin,
        seeds=[item.seed for item in listed.items],
    )
    write_results(options.output, rows, columns, [item.prompt for item in listed.items], found.model, origin)
    return rows


def _check(options: argparse.Namespace) -> None:
    for name, value in (("--n", options.n), ("--batch-size", options.batch_size)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")
    if options.prompts_file is not None and options.groups:
        raise UserError("--groups chooses among the embedded prompts, but --prompts-file gives others")
    if options.output.exists() and not options.output.is_dir():
        raise UserError(f"--output {options.output}: is a file, expected a folder")


def _base_model(pipe: Pipeline, options: argparse.Namespace) -> Model:
    """The model alone at many steps, with its usual guidance unless another is asked for."""
    guidance = options.reference_guidance
    if guidance is None and options.model == EMBEDDED:
        guidance = EMBEDDED_GUIDANCE
    settings = pipe.settings(steps=MANY_STEPS, sampler="ddim", guidance=guidance)
    _require_sound(pipe, settings)
    return Model(pipe=pipe, identity=weights_identity(pipe), settings=settings)


def _loaded(
    pipe: Pipeline, options: argparse.Namespace, loras: Sequence[tuple[Path, float]], base_identity: str
) -> Model:
    """The model with its LoRAs, which stay loaded, and the settings that the options and their headers make."""
    # Named by place: the same file may be given twice, at two scales.
    reports = [pipe.load_lora(file, scale, name=f"{place}: {file}") for place, (file, scale) in enumerate(loras)]
    hashes = [_content(weights_file(Path(report.file))) for report in reports]
    settings = pipe.settings(
        options.preset,
        steps=options.steps,
        sampler=options.sampler,
        spacing=options.spacing,
        eta=options.eta,
        guidance=options.guidance,
    )
    _require_sound(pipe, settings)
    identity = with_loras(base_identity, [(text, scale) for text, (_, scale) in zip(hashes, loras, strict=True)])
    return Model(pipe=pipe, identity=identity, settings=settings, preset=options.preset)


def _content(file: Path) -> str:
    """The hash of a LoRA's file, with the configuration beside it, where PEFT may keep alpha."""
    beside = file.with_name("adapter_config.json")
    return hashlib.sha256(file.read_bytes() + (beside.read_bytes() if beside.is_file() else b"")).hexdigest()


def _require_sound(pipe: Pipeline, settings: Settings) -> None:
    """Refuse settings that no solver has, before anything is drawn."""
    solver_table(
        str(settings.sampler),
        settings.steps,
        eta=float(settings.eta or 0.0),
        spacing=settings.spacing,
        scheduler_config=dict(pipe.components.scheduler_config),
        timesteps=settings.timesteps,
    )


def _evaluated(name: str, model: Model, items: Sequence[Prompted], options: argparse.Namespace) -> Evaluated:
    """Draw, or read back, the list and the further pictures that diversity is measured on."""
    drawing: dict[str, Any] = {"batch_size": options.batch_size, "cache": options.cache or options.output / "cache"}
    first = draw_list(model, items, title=name, **drawing)
    others = []
    for turn in range(1, DIVERSE_SEEDS):
        again = [item._replace(seed=item.seed + turn * SEED_STRIDE) for item in items[:DIVERSE_PROMPTS]]
        others.append(draw_list(model, again, title=f"{name}, seeds {turn + 1}/{DIVERSE_SEEDS}", **drawing))
    return Evaluated(name=name, model=model, drawn=first, others=tuple(others))


def _real_features(
    options: argparse.Namespace, folder: Path | None, embedded: bool, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Features of two sets of real pictures: of the user's folder, else of the embedded training split."""
    if folder is not None:
        first, second = sources.folder_pictures(folder, options.n, size)
    elif embedded:
        first, second = sources.training_pictures(options.n, options.groups, size[0])
    else:
        return None
    return features(first), features(second)
