"""``hypersd evaluate``."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from hypersd_jax.commands import checks, parsing
from hypersd_jax.config import utf8
from hypersd_jax.errors import UserError

_EPILOG = """\
example:
  hypersd evaluate --lora outputs/emoji/loras/tscd-2.safetensors --n 256 --output out/two

"""


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "evaluate",
        help="measure a model on a fixed list of prompts",
        description="Measure a model with any LoRAs on a list of prompts, in numbers and images.",
        epilog=_EPILOG + parsing.preset_list(),
    )
    group = parser.add_argument_group("what")
    group.add_argument(
        "--model",
        type=parsing.source,
        default="embedded",
        metavar="SRC",
        help="a folder, a single file or a hub id (default: the embedded model)",
    )
    group.add_argument(
        "--lora",
        type=parsing.lora,
        action="append",
        default=[],
        metavar="FILE[@SCALE]",
        help="may be given several times",
    )
    group.add_argument("--dtype", default="auto", choices=("auto", *parsing.DTYPES))
    parsing.add_settings(parser.add_argument_group("how it samples"))

    group = parser.add_argument_group("on what")
    group.add_argument(
        "--prompts-file", type=parsing.path, metavar="FILE", help="one prompt a line (default: the embedded list)"
    )
    group.add_argument("--n", type=parsing.whole(), default=1000, help="how many prompts of the list")
    group.add_argument("--groups", action="append", metavar="GROUP", help="embedded prompts of this group alone")
    group.add_argument("--batch-size", type=parsing.whole(), default=16, metavar="N")

    group = parser.add_argument_group("against what")
    group.add_argument(
        "--reference",
        type=parsing.source,
        action="append",
        metavar="base|none|FOLDER",
        help="the model itself at 25 steps (default), an earlier evaluation, and/or a folder of real images",
    )
    group.add_argument(
        "--reference-guidance",
        type=parsing.decimal,
        metavar="SCALE",
        help="of the 25 steps (default: the model's own)",
    )
    group.add_argument("--clip", type=parsing.path, metavar="PATH", help="CLIP weights to score with as well")

    group = parser.add_argument_group("where")
    group.add_argument("--output", type=parsing.path, required=True, metavar="FOLDER")
    group.add_argument(
        "--cache", type=parsing.path, metavar="FOLDER", help="keeps images between runs (default: OUTPUT/cache)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure, and print the files."""
    check(options)

    from hypersd_jax.compilation import use_compilation_cache
    from hypersd_jax.evaluation import printed_table
    from hypersd_jax.evaluation.evaluate import run_evaluate

    use_compilation_cache()
    run_evaluate(options)
    print(printed_table(options.output / "results.json", None, sys.stdout.encoding))
    for name in ("results.json", "results.md", "grid.png", "report.html"):
        print(options.output / name)


def check(options: argparse.Namespace) -> None:
    """Refuse what is wrong with the options alone."""
    checks.check_target_folder("--output", options.output)
    checks.check_preset(options.preset)
    checks.check_model(options.model)
    checks.check_loras(options.lora)
    checks.check_files("--prompts-file", [options.prompts_file])
    if options.clip is not None and not os.path.exists(options.clip):
        raise UserError(f"--clip {options.clip}: no such file or folder")
    for folder in options.reference or ():
        utf8(folder, "--reference")  # its name goes into the table
        if folder not in ("base", "none") and not os.path.isdir(folder):
            raise UserError(f"--reference {folder}: is neither base, none nor a folder")
