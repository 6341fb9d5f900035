"""``hypersd evaluate``: any model with any LoRAs on a fixed list of prompts, in numbers, images and one page."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from hypersd_jax.conditioning import warn_of_cuts
from hypersd_jax.config import EMBEDDED_GUIDANCE
from hypersd_jax.errors import UserError
from hypersd_jax.evaluation import generator, sources
from hypersd_jax.evaluation.columns import column_notes
from hypersd_jax.evaluation.evaluator import CLIP, Evaluator, Row, known_scorer
from hypersd_jax.evaluation.files import write_results, write_rows
from hypersd_jax.evaluation.generator import Model, further_items, make_model, with_loras
from hypersd_jax.evaluation.grid import GRID_ROWS, image_grid
from hypersd_jax.evaluation.hyper_sd import paper_table, require_family
from hypersd_jax.evaluation.provenance import device_line, duration, made_line, typed_command
from hypersd_jax.evaluation.quality import Series
from hypersd_jax.evaluation.report import Report
from hypersd_jax.evaluation.reported_rewards import ReportedReward, load_reported
from hypersd_jax.evaluation.samples import generate, load_run, save_run, with_features
from hypersd_jax.evaluation.scorer import load_card
from hypersd_jax.evaluation.tables import write_markdown
from hypersd_jax.paths import parse_lora
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.png_text import name_of
from hypersd_jax.rewards import contents_digest, load_clip
from hypersd_jax.weights.components import EMBEDDED
from hypersd_jax.weights.lora import weights_file
from hypersd_jax.weights.mesh import make_mesh, mesh_of_option

TITLE = "Evaluation"
PAPER_FILE = "paper.json"
"""The rows of a protocol's paper with one's own, in the paper's units."""


def run_evaluate(options: argparse.Namespace) -> list[Row]:
    """Do what the options of ``hypersd evaluate`` say; returns the rows of results.json.

    Raises:
        UserError: one line naming the option or file at fault.
    """
    begin = time.perf_counter()
    _check(options)
    references = sources.read_references(options.reference or [sources.BASE])
    clip = None if options.clip is None else _load_clip(options.clip)
    rewards = load_reported(options.reward)
    loras = [parse_lora(text) for text in options.lora]
    embedded = options.prompts_file is None
    listed = None if embedded else sources.file_items(options.prompts_file, options.n)
    pipe = Pipeline.from_pretrained(options.model, dtype=options.dtype, mesh=_mesh(options))
    family = None if options.protocol is None else require_family(pipe)
    items = listed or sources.embedded_items(options.n, options.groups)
    prompts = [item.prompt for item in items]
    warn_of_cuts(pipe.base.prompts.cuts(prompts))
    run = None if references.run is None else load_run(references.run, pipe.native_size)
    base = _base_model(pipe, options)
    model = _model(pipe, options, loras, base.identity)
    real = _real_images(options, references.data, embedded, pipe.native_size)

    cache = options.cache or options.output / "cache"
    evaluator = Evaluator(
        items=items,
        further=further_items(items),
        size=pipe.native_size,
        scorer=known_scorer(items),
        clip=clip,
        rewards=rewards,
        cache=cache,
    )
    evaluator = evaluator if real is None else evaluator.with_real(real)
    keeping: dict[str, Any] = {"batch_size": options.batch_size, "cache": cache, "progress": True}
    samples = generate(model, items, evaluator.further, **keeping)
    pipe.unload_lora()
    many = None
    if references.base:
        many = generate(base, items, evaluator.further, **keeping)
        evaluator = evaluator.with_reference(many, dataclasses.asdict(base.settings))
    elif run is not None:
        evaluator = evaluator.with_reference(run, hashlib.sha256(run.images.data).hexdigest())
    rows, columns = [], {}
    if real is not None:
        rows.append(evaluator.floor(real.second))
    if embedded:
        true = sources.embedded_images(options.n, options.groups, pipe.native_size[0])
        alone = dataclasses.replace(evaluator, reference=None)  # they come from no latents
        rows.append(alone.evaluate(with_features(items, true), name="real images of these prompts").row)
        columns["real"] = true
    if many is not None:
        rows.append(evaluator.evaluate(many, base).row)
        columns[f"{generator.MANY_STEPS} steps"] = many.images
    elif run is not None:
        earlier = dataclasses.replace(evaluator, items=run.items, further=())
        rows.append(earlier.evaluate(run, name=f"{references.run} (reference)").row)
    rows.append(evaluator.evaluate(samples, model).row)
    columns[model.name] = samples.images
    save_run(options.output, samples)
    shown = {title: images[:GRID_ROWS] for title, images in columns.items()}
    notes = column_notes([key for row in rows for key in row])
    tables = [] if family is None else [paper_table(family, rows)]
    report = Report(
        title=TITLE,
        made=made_line(),
        summary=[_summary(rows[-1])],
        details=_details(model, [item.seed for item in items], time.perf_counter() - begin),
        command=typed_command(options.arguments),
        rows=rows,
        notes=notes,
        tables=tables,
        quality=([Series(name=row["model"], rows=(row,)) for row in rows if "steps" in row], None),
        prompts=prompts[:GRID_ROWS],
        grids={"The same latents along each row, except the real image's": image_grid(shown, prompts[:GRID_ROWS])},
    )
    write_results(options.output, report)
    write_markdown(options.output / "results.md", TITLE, rows, notes, tables)
    for table in tables:
        write_rows(options.output / PAPER_FILE, table.rows)
    return rows


def _check(options: argparse.Namespace) -> None:
    for name, value in (("--n", options.n), ("--batch-size", options.batch_size)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")
    if options.prompts_file is not None and options.groups:
        raise UserError("--groups chooses among the embedded prompts, but --prompts-file gives others")
    if options.output.exists() and not options.output.is_dir():
        raise UserError(f"--output {options.output}: is a file, expected a folder")


def _mesh(options: argparse.Namespace) -> Mesh | None:
    if options.mesh is not None:
        return mesh_of_option(*options.mesh)
    return make_mesh() if jax.device_count() > 1 else None


def _load_clip(path: Path) -> ReportedReward:
    return ReportedReward(name=CLIP, reward=load_clip(path), digest=contents_digest(path))


def _base_model(pipe: Pipeline, options: argparse.Namespace) -> Model:
    """The model alone at many steps, with its usual guidance unless another is asked for."""
    guidance = options.reference_guidance
    if guidance is None and options.model == EMBEDDED:
        guidance = EMBEDDED_GUIDANCE
    name = f"{name_of(options.model)} (reference)"
    settings: dict[str, Any] = {"steps": generator.MANY_STEPS, "sampler": "ddim", "guidance": guidance}
    return make_model(name, pipe, identity=pipe.base.identity(), **settings)


def _model(
    pipe: Pipeline, options: argparse.Namespace, loras: Sequence[tuple[Path, float]], base_identity: str
) -> Model:
    """The model with its LoRAs, which stay loaded, and the settings that the options and their headers make."""
    # Named by number: the same file may be given twice, at two scales.
    reports = [pipe.load_lora(file, scale, name=f"{number}: {file}") for number, (file, scale) in enumerate(loras)]
    hashes = [_content(weights_file(Path(report.file))) for report in reports]
    return make_model(
        " + ".join([name_of(options.model), *(f"{name_of(file)}@{scale:g}" for file, scale in loras)]),
        pipe,
        preset=options.preset,
        identity=with_loras(base_identity, [(text, scale) for text, (_, scale) in zip(hashes, loras, strict=True)]),
        steps=options.steps,
        sampler=options.sampler,
        spacing=options.spacing,
        eta=options.eta,
        guidance=options.guidance,
    )


def _content(file: Path) -> str:
    """The hash of a LoRA's file, with the configuration next to it, where PEFT may keep alpha."""
    config = file.with_name("adapter_config.json")
    return hashlib.sha256(file.read_bytes() + (config.read_bytes() if config.is_file() else b"")).hexdigest()


def _real_images(
    options: argparse.Namespace, folder: Path | None, embedded: bool, size: tuple[int, int]
) -> sources.RealImages | None:
    """Load the real images of the user's folder, else of the embedded training split."""
    if folder is not None:
        return sources.folder_images(folder, options.n, size)
    return sources.training_images(options.n, options.groups, size[0]) if embedded else None


def _summary(row: Mapping[str, Any]) -> str:
    parts = [f"{row['model']}: {row['n']} images at {row['steps']} steps, guidance {row['guidance']:g}"]
    if "clip_gain" in row:
        parts.append(f"their text match is {row['clip_gain']:.2f} ± {row['clip_gain_se']:.2f} above chance")
    if row.get("distance"):
        parts.append(f"they lie {row['distance']:.4f} ± {row['distance_se']:.4f} from the reference's")
    return "; ".join(parts) + "."


def _details(model: Model, seeds: Sequence[int], seconds: float) -> dict[str, Any]:
    card = load_card("report")
    settings = {key: value for key, value in dataclasses.asdict(model.settings).items() if value is not None}
    return {
        **settings,
        "weights": model.identity[:16],
        "devices": device_line(),
        "jax": jax.__version__,
        "seeds of the samples": f"{min(seeds)} to {max(seeds)}",
        "time": f"{duration(seconds)}; what the cache held was not generated again",
        "reporting scorer": f"R@1 {card['unseen_styles']['r1']:.2f}, AUC {card['unseen_styles']['auc']:.3f}",
    }
