"""Recipes against each other, over seeds: ``python benchmarks/ablation.py benchmarks/ablation/NAME.yaml --resume``.

Trains every recipe of the matrix with every seed (a stage whose whole history two recipes share is trained once),
samples each student on the fixed list of held-out concepts, and writes benchmarks/results/ablation/NAME: one table
(mean and spread over seeds, and which margins are over two pooled standard deviations), one grid of images, and for a
sweep a plot. They are rewritten after each run, so that a look on the way shows what is there. It may be killed at any
moment and resumes with ``--resume``.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import jax

from benchmarks.matrix.output import write_results
from benchmarks.matrix.recipes import Matrix, Recipe, planned, read_matrix, recipe_config, sampled_of
from benchmarks.matrix.scoring import Scorer
from benchmarks.matrix.training import missing_updates, run_folder, train_recipe
from hypersd_jax.compilation import use_compilation_cache
from hypersd_jax.config import Config
from hypersd_jax.errors import UserError


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("matrix", type=Path, help="a YAML file of recipes and seeds")
    parser.add_argument("--resume", action="store_true", help="resume the stages that --output holds")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="in place of the matrix's")
    parser.add_argument("--recipes", nargs="+", metavar="NAME", help="only these; the others' rows are left out")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "ablation", help="stages and scores")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "ablation")
    options = parser.parse_args(arguments)
    try:
        run(options)
    except UserError as error:
        print(f"ablation: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def run(options: argparse.Namespace) -> None:
    matrix = read_matrix(options.matrix)
    seeds = options.seeds or matrix.seeds
    recipes = _chosen(matrix, options.recipes)
    root = options.output.absolute()
    if (root / "runs").exists() and not options.resume:
        raise UserError(f"--output {options.output} holds earlier runs: --resume continues them")
    use_compilation_cache()
    first = recipe_config(matrix, recipes[0], seeds[0], root)
    scorer = Scorer(first, matrix.samples, root)
    jobs = [
        (seed, recipe, _settled(matrix, recipe, seed, root, scorer.base)) for seed, recipe in planned(recipes, seeds)
    ]
    for _, recipe, config in jobs:
        if (config.model, config.data.groups, config.evaluation) != (first.model, first.data.groups, first.evaluation):
            raise UserError(f"recipes.{recipe.name}: model, data.groups and evaluation must be those of all recipes")
    clock = Clock([config for _, _, config in jobs], root, scorer.base)
    title = options.matrix.stem
    settings = _settings(options.matrix, matrix, seeds, options.recipes)
    results: list[dict[str, Any]] = []
    page = ""
    for number, (seed, recipe, config) in enumerate(jobs):
        print(f"[{number + 1}/{len(jobs)}] {recipe.name}, seed {seed}: {clock.tell(number)}", flush=True)
        loras = train_recipe(config, root, scorer.base)
        for row in sampled_of(recipe, config):
            found = scorer.score(loras[row.stage], row)
            names: dict[str, Any] = {"method": recipe.method, "recipe": recipe.name, "stage": row.stage, "seed": seed}
            settings = {"steps": row.steps, "sampler": row.sampler, "eta": row.eta, "timesteps": row.timesteps}
            names["updates"] = _updates(config, row.stage)
            results.append({**names, **settings, **found.values, "images": found.images})
        page = write_results(options.results / title, title, settings, matrix, results, scorer)
        clock.done(number)
    print(page)


class Clock:
    """How long the rest takes, from how long an update has taken so far."""

    def __init__(self, configs: list[Config], root: Path, base: str) -> None:
        promised: set[str] = set()
        self._updates = [missing_updates(config, root, base, promised) for config in configs]
        self._begin, self._trained = time.perf_counter(), 0

    def tell(self, number: int) -> str:
        left = sum(self._updates[number:])
        text = f"{self._updates[number]} updates of {left} left"
        if self._trained:
            minutes = left * (time.perf_counter() - self._begin) / self._trained / 60
            text += f", some {minutes:.0f} minutes"
        return text

    def done(self, number: int) -> None:
        self._trained += self._updates[number]


def _settled(matrix: Matrix, recipe: Recipe, seed: int, root: Path, base: str) -> Config:
    """The run's configuration, in the folder that its history names."""
    folder = run_folder(recipe_config(matrix, recipe, seed, root), root, base)
    return recipe_config(matrix, recipe, seed, folder)


def _chosen(matrix: Matrix, names: list[str] | None) -> list[Recipe]:
    known = {recipe.name: recipe for recipe in matrix.recipes}
    for name in names or ():
        if name not in known:
            raise UserError(f"--recipes: no recipe {name!r}, only {', '.join(known)}")
    return [known[name] for name in names] if names else list(matrix.recipes)


def _updates(config: Config, stage: str) -> int:
    """Updates from the base to this stage's student."""
    names = [each.name for each in config.adapter_stages]
    return sum(each.updates for each in config.adapter_stages[: names.index(stage) + 1])


def _settings(path: Path, matrix: Matrix, seeds: list[int] | tuple[int, ...], recipes: list[str] | None) -> list[str]:
    device = jax.devices()[0].device_kind
    return [
        f"`python benchmarks/ablation.py benchmarks/ablation/{path.name}"
        f"{'' if recipes is None else f' --recipes {shlex.join(recipes)}'}`; base recipe {matrix.base}, seeds "
        f"{', '.join(map(str, seeds))}, {matrix.samples} held-out (prompt, seed) pairs.",
        f"{datetime.date.today()}, jax {jax.__version__}, {jax.device_count()} x {device}, {os.cpu_count()} CPU cores.",
    ]


if __name__ == "__main__":
    main()
