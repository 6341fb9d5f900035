"""A matrix of recipes and seeds, read from YAML."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import yaml

from hypersd_jax.config import Config, build, load_config
from hypersd_jax.errors import UserError
from hypersd_jax.recipes import find_recipe

# What no recipe of a matrix decides: the comparison is made here, and TensorBoard would have nobody to look at it.
FIXED = ("evaluation.samples=0", "log.tensorboard=false", "log.sample_every=0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampled:
    """A stage's student at a number of steps; ``sampler`` and ``eta``: null takes the stage's own.

    ``timesteps``: null takes those that the stage has for this number of steps, if it has and the sampler is its own;
    ``guidance`` is always the stage's.
    """

    stage: str
    steps: int
    sampler: str | None = None
    eta: float | None = None
    timesteps: tuple[int, ...] | None = None
    guidance: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Changes to the base recipe: whole ``stages``, if given, then ``overrides``; and which students are measured.

    ``draw: []`` measures each stage's student at its own numbers of steps. Recipes of one ``label`` (default: the name)
    are one method in the table, each measured at other numbers of steps. ``seeds``: of the matrix's, only these.
    """

    name: str
    label: str | None = None
    seeds: tuple[int, ...] = ()
    stages: tuple[dict, ...] = ()
    overrides: tuple[str, ...] = ()
    draw: tuple[Sampled, ...] = ()

    @property
    def method(self) -> str:
        return self.label or self.name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """A recipe's position on an axis of the plot."""

    recipe: str
    at: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """One axis of a sweep."""

    title: str
    points: tuple[Point, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matrix:
    """``against`` names the method whose margins over the others are reported; ``panels`` make a plot; ``grid_steps``
    are the numbers of steps that the grid of images shows, all where it is empty."""

    base: str
    against: str
    seeds: tuple[int, ...]
    recipes: tuple[Recipe, ...]
    overrides: tuple[str, ...] = ()
    samples: int = 256
    panels: tuple[Panel, ...] = ()
    grid_steps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        names = [recipe.name for recipe in self.recipes]
        if not names or not self.seeds or len({*names}) != len(names) or len({*self.seeds}) != len(self.seeds):
            raise ValueError("recipes and seeds must be there, each once")
        if self.samples < 3:
            raise ValueError(f"samples must be at least 3, which KID needs, not {self.samples}")
        if self.against not in {recipe.method for recipe in self.recipes}:
            raise ValueError(f"against={self.against!r} is no recipe's label")
        for recipe in self.recipes:
            if not {*recipe.seeds} <= {*self.seeds}:
                raise ValueError(f"recipes.{recipe.name}: seeds must be among the matrix's, not {list(recipe.seeds)}")
        for point in (point for panel in self.panels for point in panel.points):
            if point.recipe not in names:
                raise ValueError(f"panels: no recipe {point.recipe!r}")


def read_matrix(path: Path) -> Matrix:
    """Read and check a matrix.

    Raises:
        UserError: naming the file and the key.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML ({str(error).splitlines()[0]})") from None
    try:
        matrix = build(Matrix, tree)
        for recipe in matrix.recipes:
            sampled_of(recipe, recipe_config(matrix, recipe, matrix.seeds[0], path.parent))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return matrix


def recipe_config(matrix: Matrix, recipe: Recipe, seed: int, output: Path) -> Config:
    """The whole configuration of one run."""
    stages = [f"stages={json.dumps(recipe.stages)}"] if recipe.stages else []
    fixed = [*FIXED, f"seed={seed}", f"output_dir={output}"]
    try:
        return load_config(find_recipe(matrix.base), [*stages, *matrix.overrides, *recipe.overrides, *fixed])
    except UserError as error:
        raise UserError(f"recipes.{recipe.name}: {error}") from None


def planned(recipes: Iterable[Recipe], seeds: Iterable[int]) -> list[tuple[int, Recipe]]:
    """Every run: all recipes of a seed before the next seed, so that a look on the way compares like with like."""
    every = tuple(recipes)
    return [(seed, recipe) for seed in seeds for recipe in every if not recipe.seeds or seed in recipe.seeds]


def sampled_of(recipe: Recipe, config: Config) -> list[Sampled]:
    """Return the samplings that are measured of a run, with nothing left open."""
    stages = {stage.name: stage for stage in config.adapter_stages}
    rows = recipe.draw or tuple(
        Sampled(stage=stage.name, steps=sampling["steps"])
        for stage in config.adapter_stages
        for sampling in stage.samplings
    )
    settled = []
    for row in rows:
        if row.stage not in stages:
            raise UserError(f"recipes.{recipe.name}.draw: no stage {row.stage!r}, only {', '.join(stages)}")
        stage = stages[row.stage]
        eta = stage.eta if row.eta is None else row.eta
        if stage.exports_model:
            raise UserError(
                f"recipes.{recipe.name}: stage {row.stage!r} makes a whole UNet, which is not measured here"
            )
        own = {sampling["steps"]: sampling["timesteps"] for sampling in stage.samplings}
        guidance = stage.samplings[0]["guidance"]
        times = row.timesteps
        if times is None and row.sampler in (None, stage.sampler):
            times = own.get(row.steps)
        if times is not None and len(times) != row.steps:
            raise UserError(f"recipes.{recipe.name}.draw: {len(times)} timesteps for {row.steps} steps")
        settled.append(
            dataclasses.replace(row, sampler=row.sampler or stage.sampler, eta=eta, timesteps=times, guidance=guidance)
        )
    return settled
