"""The output folder of a run: its layout, and whether it may be gone on with."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import yaml

from hypersd_jax.config import Config, first_difference, save_config, to_dict
from hypersd_jax.errors import UserError

# May change between a stopped run and its continuation: they do not reach the student.
FREE_KEYS = ("output_dir", "reuse", "mesh", "log", "evaluation")


@dataclasses.dataclass(frozen=True)
class Output:
    """``root`` holds config.yaml, metrics.jsonl, checkpoints/, loras/, samples/, results.json, grid.png, ...."""

    root: Path

    @property
    def loras(self) -> Path:
        """One LoRA file a stage."""
        return self.root / "loras"

    @property
    def models(self) -> Path:
        """One model folder for each stage that trains a whole UNet."""
        return self.root / "models"

    @property
    def samples(self) -> Path:
        """Grids drawn while training."""
        return self.root / "samples"

    def checkpoints(self, stage: str) -> Path:
        """A stage's checkpoints."""
        return self.root / "checkpoints" / stage


def open_output(config: Config) -> Output:
    """The run's folder, which may hold the same run already; nothing is written yet.

    Raises:
        UserError: the folder holds a run of another configuration, or cannot be read.
    """
    output = Output(Path(config.output_dir))
    saved = output.root / "config.yaml"
    try:
        if saved.exists():
            _check_same(saved, config)
    except OSError as error:
        raise UserError(f"output_dir: {saved} cannot be read ({error.strerror})") from None
    return output


def create_output(output: Output, config: Config) -> None:
    """Make the folder and record the configuration: once all of it has been checked, since the record binds reruns.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        for folder in (output.root, output.loras, output.samples):
            folder.mkdir(parents=True, exist_ok=True)
        save_config(config, output.root / "config.yaml")
    except OSError as error:
        raise UserError(f"output_dir: {output.root} cannot be written ({error.strerror})") from None


def _check_same(saved: Path, config: Config) -> None:
    try:
        found = yaml.safe_load(saved.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{saved}: not a configuration; choose another output_dir or delete the folder")
    wanted = to_dict(config)
    difference = first_difference(
        {key: value for key, value in found.items() if key not in FREE_KEYS},
        {key: value for key, value in wanted.items() if key not in FREE_KEYS},
    )
    if difference:
        raise UserError(
            f"output_dir: {saved.parent} holds a run of another configuration, "
            f"{difference}; choose another output_dir or delete the folder"
        )
