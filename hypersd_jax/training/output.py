"""The output folder of a run: its layout, and whether the run may resume in it."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import yaml

from hypersd_jax.config import Config, StageConfig, first_difference, save_config, to_dict
from hypersd_jax.errors import UserError
from hypersd_jax.training.checkpoints import newest_step
from hypersd_jax.training.first_process import on_first

# May change between a stopped run and its continuation: they do not reach the student.
FREE_KEYS = ("output_dir", "reuse", "mesh", "distributed", "log", "evaluation")


@dataclasses.dataclass(frozen=True)
class Output:
    """``root`` holds config.yaml, metrics.jsonl, checkpoints/, loras/, samples/, results.json, grid.png, ...."""

    root: Path

    @property
    def loras(self) -> Path:
        """Folder with one LoRA file a stage."""
        return self.root / "loras"

    @property
    def models(self) -> Path:
        """Folder with one model folder for each stage of full fine-tuning."""
        return self.root / "models"

    @property
    def samples(self) -> Path:
        """Folder with images sampled while training."""
        return self.root / "samples"

    def checkpoints(self, stage: str) -> Path:
        """Return the folder of a stage's checkpoints."""
        return self.root / "checkpoints" / stage

    def student(self, stage: StageConfig) -> Path:
        """Return the path of a stage's student: a LoRA file, or a model folder."""
        return self.models / stage.name if stage.exports_model else self.loras / f"{stage.name}.safetensors"

    def part(self, stage: str, name: str) -> Path:
        """Return the path of a part of a stage's student, beside the LoRA file that has all of it."""
        return self.loras / f"{stage}.{name}.safetensors"

    def made_by(self, stage: str) -> list[Path]:
        """List the existing files of a stage: its checkpoints and its student."""
        paths = (self.checkpoints(stage), self.loras / f"{stage}.safetensors", self.models / stage)
        return [path for path in paths if path.exists()]


def open_output(config: Config) -> Output:
    """Check the run's folder, which may hold the same run or one with other numbers of updates; write nothing.

    A stage may become longer, or shorter than it was to be but not than it is, while no stage after it has begun.

    Raises:
        UserError: the folder holds a run of another configuration, or cannot be read.
    """
    output = Output(Path(config.output_dir))
    saved = output.root / "config.yaml"
    try:
        if saved.exists():
            _check_same(output, saved, config)
    except OSError as error:
        raise UserError(f"output_dir: {saved} cannot be read ({error.strerror})") from None
    return output


def create_output(output: Output, config: Config) -> None:
    """Make the folder and record the configuration, once all of it has been checked, since the record binds reruns.

    Of several processes the first one does.

    Raises:
        UserError: the folder cannot be written.
    """
    on_first(lambda: _create(output, config))


def _create(output: Output, config: Config) -> None:
    saved = output.root / "config.yaml"
    try:
        for folder in (output.root, output.loras, output.samples):
            folder.mkdir(parents=True, exist_ok=True)
        save_config(config, saved)
    except OSError as error:
        saved.with_name(f"{saved.name}.tmp").unlink(missing_ok=True)
        raise UserError(f"output_dir: {output.root} cannot be written ({error.strerror})") from None


def set_aside(output: Output, student: Path, stage: str) -> None:
    """Move the student of a stage that is to be trained further to earlier/, where its number of updates names it."""
    done = newest_step(output.checkpoints(stage)) or 0
    if student.exists() and jax.process_index() == 0:
        earlier = output.root / "earlier" / f"{stage}-{done}{student.suffix if student.is_file() else ''}"
        try:
            earlier.parent.mkdir(exist_ok=True)
            if earlier.is_dir():
                shutil.rmtree(earlier)
            student.replace(earlier)
        except OSError as error:
            raise UserError(f"{student}: cannot be moved to {earlier} ({error.strerror})") from None


def _check_same(output: Output, saved: Path, config: Config) -> None:
    try:
        found = yaml.safe_load(saved.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{saved}: not a configuration; choose another output_dir or delete the folder")
    was, wanted = _of_any_length(found), _of_any_length(to_dict(config))
    was, wanted = ({k: v for k, v in tree.items() if k not in FREE_KEYS} for tree in (was, wanted))
    difference = first_difference(was, wanted)
    if difference:
        raise UserError(
            f"output_dir: {saved.parent} holds a run of another configuration, "
            f"{difference}; choose another output_dir or delete the folder"
        )
    _check_lengths(output, {stage["name"]: stage.get("updates") for stage in found["stages"]}, config)


def _of_any_length(tree: dict[str, Any]) -> dict[str, Any]:
    """Remove the stages' updates, which may change, from a plain configuration."""
    stages = tree.get("stages")
    if not isinstance(stages, list):
        return tree
    cut = [{k: v for k, v in s.items() if k != "updates"} if isinstance(s, dict) else s for s in stages]
    return {**tree, "stages": cut}


def _check_lengths(output: Output, was: Mapping[str, int | None], config: Config) -> None:
    """Check that the stages' updates may be what they are now, after ``was``.

    Raises:
        UserError: a stage has done more already, or later stages were trained on it as it was.
    """
    stages = config.active_stages
    for index, stage in enumerate(stages):
        key, done = f"stages.{stage.name}.updates", newest_step(output.checkpoints(stage.name)) or 0
        if stage.updates < done:
            raise UserError(
                f"{key}={stage.updates}: {done} are done in {output.root}; set at least {done}, or choose another "
                f"output_dir"
            )
        later = [path for each in stages[index + 1 :] for path in output.made_by(each.name)]
        if later and was.get(stage.name) != stage.updates:
            named = ", ".join(str(path) for path in later)
            raise UserError(
                f"{key}={stage.updates}: it was {was.get(stage.name)} when the stages after it were trained; to train "
                f"them again, delete {named}; or choose another output_dir"
            )
