"""What of a run is published: its LoRAs, each with how to sample with it, and its results."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypersd_jax.bases import TextToImage
from hypersd_jax.config import Config, StageConfig
from hypersd_jax.errors import UserError
from hypersd_jax.inspection.run import read_rows
from hypersd_jax.interop.recipe import Recipe, base_name, is_hub_id, make_recipe
from hypersd_jax.training.output import Output
from hypersd_jax.weights.tensors import open_tensors


@dataclass(frozen=True, kw_only=True)
class Exported:
    """One LoRA of a run.

    Attributes:
        stage: its settings.
        file: in the run's folder.
        metadata: its header.
        recipe: how to sample with it.
        parts: files that hold a part of it, such as the LoRA of feedback alone.
    """

    stage: StageConfig
    file: Path
    metadata: Mapping[str, str]
    recipe: Recipe
    parts: Sequence[Path] = ()


@dataclass(frozen=True, kw_only=True)
class Contents:
    """A run as it is published.

    Attributes:
        config: the run's.
        loras: one or more.
        rows: of its results.json.
        grid: its grid of images; None where it has none.
        base: what its base is called.
        base_model: the base's id on the hub; None where it has none.
        left_out: what of the run is not published, in words.
    """

    config: Config
    loras: Sequence[Exported]
    rows: Sequence[Mapping[str, Any]]
    grid: Path | None
    base: str
    base_model: str | None
    left_out: Sequence[str]


def exported_files(folder: Path, config: Config) -> tuple[dict[str, Path], list[str]]:
    """A run's LoRAs by stage, and what is left out; UserError where it has no LoRA yet."""
    output = Output(folder)
    found: dict[str, Path] = {}
    left_out = []
    for stage in config.active_stages:
        student = output.student(stage)
        if not student.exists():
            left_out.append(f"{stage.name}: nothing exported yet")
        elif stage.exports_model:
            left_out.append(f"{stage.name}: a whole model, {student}")
        else:
            found[stage.name] = student
    if not found:
        raise UserError(f"{folder}: holds no LoRA to publish ({'; '.join(left_out) or 'no stage is active'})")
    return found, left_out


def read_contents(
    folder: Path, config: Config, base: TextToImage, *, base_model: str | None, prompts: Sequence[str]
) -> Contents:
    """Read a run, and settle how each of its LoRAs is sampled.

    Args:
        folder: the run's.
        config: its configuration.
        base: its base, of which nothing but its description is read.
        base_model: the base's id on the hub, where the author says it.
        prompts: an example for each LoRA is the first.

    Raises:
        UserError: as `exported_files`; a LoRA cannot be read.
    """
    files, left_out = exported_files(folder, config)
    source = config.model.source
    named = base_model or base_name(source)
    loras = []
    for stage in config.active_stages:
        if stage.name not in files:
            continue
        file = files[stage.name]
        with open_tensors(file) as tensors:
            metadata = tensors.metadata
        recipe = make_recipe(
            file,
            metadata,
            base=named,
            family=base.kohya_family,
            scheduler_config=base.scheduler_config,
            size=(base.image_side, base.image_side),
            prompt=prompts[0],
            embeds_guidance=base.embeds_guidance,
        )
        named_so = file.parent.glob(f"{glob.escape(stage.name)}.*.safetensors")
        parts = sorted(path for path in named_so if path not in files.values())
        loras.append(Exported(stage=stage, file=file, metadata=metadata, recipe=recipe, parts=parts))
    return Contents(
        config=config,
        loras=loras,
        rows=read_rows(folder / "results.json"),
        grid=folder / "grid.png" if (folder / "grid.png").is_file() else None,
        base=named,
        base_model=base_model or (source if is_hub_id(source) else None),
        left_out=left_out,
    )
