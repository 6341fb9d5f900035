"""``hypersd inspect``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from hypersd_jax.commands import checks, parsing
from hypersd_jax.errors import UserError


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "inspect",
        help="what a file or folder is, and how to use it",
        description="Describe a LoRA (layout, base, rank and alpha, and the scale that each known program gives every "
        "module), a model, an image, or a run's folder. Nothing in it is run; a broken or unknown file is refused.",
        epilog="example:\n  hypersd inspect style.safetensors\n",
    )
    parser.add_argument("file", type=parsing.path, metavar="FILE", help="a .safetensors file, a folder or an image")
    parser.add_argument("--json", action="store_true", help="print one JSON object, with every module and key")
    parsing.add_base(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print what a file is."""
    from hypersd_jax.inspection import sort

    if options.base is not None and options.base != checks.EMBEDDED:
        checks.check_source(options.base)
    kind = sort.sort_of(options.file)
    if kind != sort.LORA and (options.base or options.family):
        raise UserError(f"{options.file}: is no LoRA, of which alone --base and --family speak")
    report = _inspected(options, kind)
    if options.json:
        # NaN and Infinity, which a configuration may hold, are no JSON.
        found = json.loads(json.dumps(report.data), parse_constant=lambda _: None)
        print(json.dumps(found, indent=1, allow_nan=False))
        return

    from hypersd_jax.inspection.report import printable

    print("\n".join(map(printable, report.lines)))


def _inspected(options: argparse.Namespace, kind: str) -> Any:
    from hypersd_jax.inspection import sort

    path = options.file
    if kind == sort.LORA:
        from hypersd_jax.inspection.lora import inspect_lora

        return inspect_lora(path, base=options.base, family=options.family)
    if kind == sort.IMAGE:
        from hypersd_jax.inspection.image import inspect_image

        return inspect_image(path)
    if kind in (sort.RUN, sort.CHECKPOINTS):
        from hypersd_jax.inspection import run

        return run.inspect_run(path) if kind == sort.RUN else run.inspect_checkpoints(path)
    from hypersd_jax.inspection.model import inspect_component, inspect_model

    return inspect_component(path) if kind == sort.COMPONENT else inspect_model(path)
