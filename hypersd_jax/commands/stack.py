"""``hypersd stack``."""

from __future__ import annotations

import argparse
from typing import Any

from hypersd_jax.commands import checks, parsing
from hypersd_jax.errors import UserError

_EPILOG = """\
example:
  hypersd stack embedded outputs/emoji-style/loras/style.safetensors --output out/stack

FAST may be `embedded`: of the embedded model, the LoRA that ships for each step count.
"""


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "stack",
        help="measure style LoRAs on a few-step LoRA",
        description="Measure how much of a style, and of a few-step LoRA's quality, both together keep.",
        epilog=_EPILOG,
    )
    parser.add_argument("fast", type=parsing.lora, metavar="FAST", help="the few-step LoRA, FILE[@SCALE]")
    parser.add_argument(
        "style", type=parsing.lora, nargs="+", metavar="STYLE", help="the style LoRA, FILE[@SCALE]; several are summed"
    )
    parser.add_argument(
        "--model",
        type=parsing.source,
        default="embedded",
        metavar="SRC",
        help="a folder, a single file or a hub id (default: the embedded model)",
    )
    parser.add_argument("--dtype", default="auto", choices=("auto", *parsing.DTYPES))
    parser.add_argument(
        "--steps", type=parsing.wholes, default=(1, 2, 4, 8), metavar="N,N,...", help="default: 1,2,4,8"
    )
    parser.add_argument(
        "--scales",
        type=parsing.decimals,
        default=(0.8, 1.0, 1.2),
        metavar="S,S,...",
        help="of the styles, times their own (default: 0.8,1,1.2)",
    )
    parser.add_argument(
        "--fast-scales",
        type=parsing.decimals,
        default=(1.0,),
        metavar="S,S,...",
        help="of the few-step LoRA, times its own (default: 1)",
    )
    parser.add_argument(
        "--guidance", type=parsing.decimal, metavar="SCALE", help="of the many steps (default: the model's own)"
    )
    parser.add_argument(
        "--prompts-file",
        type=parsing.path,
        metavar="FILE",
        help="one prompt a line, or a benchmark's .tsv or .jsonl (default: the embedded list)",
    )
    parser.add_argument("--n", type=parsing.whole(4), default=64, help="how many prompts")
    parser.add_argument("--batch-size", type=parsing.whole(1), default=16, metavar="N")
    parser.add_argument("--output", type=parsing.path, required=True, metavar="FOLDER")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure, and print the best scales and the files."""
    check(options)

    from hypersd_jax.compilation import use_compilation_cache
    from hypersd_jax.evaluation.stack import best_lines, run_stack

    use_compilation_cache()
    rows = run_stack(options)
    for line in best_lines(rows):
        print(line)
    for name in ("results.json", "README.md", "grid.png"):
        print(options.output / name)


def check(options: argparse.Namespace) -> None:
    """Refuse what is wrong with the options alone."""
    checks.check_target_folder("--output", options.output)
    checks.check_model(options.model)
    checks.check_files("--prompts-file", [options.prompts_file])
    if options.fast != checks.EMBEDDED:
        checks.check_loras([options.fast])
    elif options.model != checks.EMBEDDED:
        raise UserError("FAST: embedded is of the embedded model; name a file")
    elif max(options.steps) > 8:
        raise UserError(f"--steps {max(options.steps)}: the embedded model's LoRAs are for 1 to 8")
    checks.check_loras(options.style)
