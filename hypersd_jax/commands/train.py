"""``hypersd train``, which ``python train.py`` is short for."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from hypersd_jax.commands import checks, dry_run
from hypersd_jax.commands.parsing import Parser, add_overrides
from hypersd_jax.config import Config, key_paths, load_config
from hypersd_jax.recipes import find_recipe, recipe_titles

DEFAULT_CONFIG = "emoji/hyper"
_EPILOG = """\
examples:
  python train.py
  python train.py --config configs/sd15.yaml model=PATH/TO/stable-diffusion-v1-5 data=PATH/TO/images
  python train.py --config emoji stages.*.updates=20 output_dir=outputs/try
  python train.py --dry-run --device v5e --devices 8 --config configs/sd15.yaml data=PATH/TO/images

A value is read as its key asks: text as it is written, numbers in decimal digits, true or false, [a, b] or a,b for
lists. null leaves a key that may be empty so. A stopped run resumes when the same command is given again.

recipes:
"""


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "train",
        help="distil a model into few-step LoRAs",
        description="Distil a model into few-step LoRAs, as a recipe says.",
        epilog=_EPILOG + recipe_list(),
    )
    add_overrides(parser)
    dry_run.add_options(parser)
    parser.set_defaults(run=run, unknown=take_unknown)


def recipe_list() -> str:
    """The shipped recipes with what they make, for the end of a help text."""
    titles = recipe_titles()
    width = max(map(len, titles), default=0) + 4
    return "\n".join(
        textwrap.fill(title, 112, initial_indent=f"  {name}".ljust(width), subsequent_indent=" " * width)
        for name, title in titles.items()
    )


def run(options: argparse.Namespace) -> None:
    """Train, and print where the results are, of several processes in the first one; or print the plan alone."""
    config = read_config(options)
    if options.dry_run:
        dry_run.print_plan(options, config)
        return
    dry_run.require_dry_run(options)

    import jax

    from hypersd_jax.evaluation import COMPACT, printed_table
    from hypersd_jax.evaluation.provenance import typed_command
    from hypersd_jax.stages import train

    folder = train(config, command=typed_command(options.arguments), alone=True)
    if jax.process_index() != 0:
        return
    if config.adapter_stages and config.compared_samples:
        print(printed_table(folder / "results.json", COMPACT, sys.stdout.encoding))
    for name, what in (
        ("model", "model"),
        ("loras", "LoRA files"),
        ("results.json", "results"),
        ("grid.png", "grid"),
        ("report.html", "report"),
    ):
        path = folder / name
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            print(f"{what + ':':11s} {path}")


def read_config(options: argparse.Namespace) -> Config:
    """The configuration that a command's recipe and overrides make, its local files looked for."""
    config = load_config(find_recipe(options.config or DEFAULT_CONFIG), options.overrides)
    checks.check_config(config)
    return config


def take_unknown(options: argparse.Namespace, rest: Sequence[str], arguments: Sequence[str]) -> None:
    """Take overrides that stand behind an option; refuse options, naming the override that does what they say."""
    parser: Parser = options.parser
    for index, argument in enumerate(rest):
        if argument.startswith("-"):
            _refuse_option(parser, argument, rest[index:], arguments)
        options.overrides.append(argument)


def _refuse_option(parser: Parser, argument: str, rest: Sequence[str], arguments: Sequence[str]) -> NoReturn:
    word, equals, value = argument.lstrip("-").partition("=")
    if word == "resume":
        parser.error(f"{argument} is not needed: a stopped run resumes when the same command is given again")
    keys = [word] if "." in word else key_paths(Config, word)
    if not keys:
        parser.error_unknown(rest)
    if not equals:
        behind = list(arguments)[list(arguments).index(argument) + 1 :]
        value = behind[0] if behind and not behind[0].startswith("--") else "..."
    parser.error(f"{argument} is no option; settings are given as {' or '.join(f'{key}={value}' for key in keys)}")
