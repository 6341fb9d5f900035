"""``hypersd benchmark sampling``."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from hypersd_jax.benchmarking import APIS
from hypersd_jax.commands import checks, parsing
from hypersd_jax.commands.parsing import Parser

_EPILOG = """\
examples:
  hypersd benchmark sampling
  hypersd benchmark sampling --model SRC --lora few-steps.safetensors --steps 1,4 --batch-sizes 8,16 --output out/speed
"""


def add_parser(commands: Any) -> None:
    """Declare the command and what it measures."""
    parser = commands.add_parser(
        "benchmark", help="measure speed", description="Measure speed on the devices of this machine.", epilog=_EPILOG
    )
    kinds = parser.add_subparsers(metavar="KIND", parser_class=Parser)
    _add_sampling(kinds)


def _add_sampling(kinds: Any) -> None:
    parser = kinds.add_parser(
        "sampling",
        help="images per second, by pmap, jit and shard_map",
        description="Measure images per second on all local devices by three APIs of JAX, side by side.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "--model",
        type=parsing.source,
        default=checks.EMBEDDED,
        metavar="SRC",
        help="a folder, a single file or a hub id (default: the embedded model with its unified LoRA)",
    )
    parser.add_argument(
        "--lora",
        type=parsing.lora,
        action="append",
        default=[],
        metavar="FILE[@SCALE]",
        help="may be given several times",
    )
    parser.add_argument("--dtype", default="auto", choices=("auto", *parsing.DTYPES))
    parser.add_argument("--steps", type=parsing.wholes, default="1,4", metavar="N,N,...", help="sampling steps")
    parser.add_argument(
        "--batch-sizes",
        type=parsing.wholes,
        metavar="N,N,...",
        help="images over all devices, multiples of their number (default: 8, or the next multiple)",
    )
    parser.add_argument("--size", type=_size, metavar="HxW|native", help="pixels (default: native, the model's own)")
    parser.add_argument("--sampler", choices=parsing.Names(parsing.samplers), metavar="NAME", help="%(choices)s")
    parser.add_argument("--guidance", type=parsing.decimal, metavar="SCALE", help="classifier-free guidance")
    parser.add_argument("--repeats", type=parsing.whole(1), default=10, metavar="N", help="timed calls of each API")
    parser.add_argument("--apis", type=_apis, default=",".join(APIS), metavar="NAME,...", help="some of %(default)s")
    parser.add_argument(
        "--output",
        type=parsing.path,
        default=Path("outputs/benchmark-sampling"),
        metavar="FOLDER",
        help="for the files",
    )
    parser.set_defaults(run=_run_sampling)


def _run_sampling(options: argparse.Namespace) -> None:
    """Measure, print the table, and print the files."""
    checks.check_target_folder("--output", options.output)
    checks.check_model(options.model)
    checks.check_loras(options.lora)

    from hypersd_jax.benchmarking.measure import ImagesDiffer
    from hypersd_jax.benchmarking.report import table
    from hypersd_jax.benchmarking.sampling import run_sampling
    from hypersd_jax.compilation import without_compilation_cache

    try:
        with without_compilation_cache():
            rows = run_sampling(options)
    except ImagesDiffer as error:
        sys.exit(f"hypersd: {error}")
    print("\n".join(table(rows)), file=sys.stderr)
    for name in ("results.json", "results.md", "results.png"):
        print(options.output / name)


def _size(text: str) -> tuple[int, int] | None:
    """The type of ``HxW`` or ``native``."""
    if text == "native":
        return None
    found = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"must be native or HEIGHTxWIDTH in pixels, such as 512x512, not {text!r}")
    return int(found[1]), int(found[2])


def _apis(text: str) -> tuple[str, ...]:
    """The type of a list of APIs."""
    names = tuple(text.split(","))
    for name in names:
        if name not in APIS or names.count(name) > 1:
            raise argparse.ArgumentTypeError(f"must be some of {','.join(APIS)}, each once, not {text!r}")
    return names
