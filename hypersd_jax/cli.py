"""The command line: ``hypersd COMMAND``; `hypersd --help` lists the commands.

Exit status 0 on success, 2 on bad usage or bad input with a one-line reason on standard error, 1 on anything else.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import metadata

from hypersd_jax.commands import (
    benchmark,
    cache,
    convert,
    doctor,
    evaluate,
    inspect,
    process,
    publish,
    sample,
    serve,
    stack,
    train,
)
from hypersd_jax.commands.parsing import Parser

_EPILOG = """\
examples:
  hypersd train --config configs/emoji.yaml
  hypersd sample --steps 4 --prompt "red apple, fluent flat style" --output apple.png

`hypersd COMMAND --help` lists a command's options; `python train.py` and `python sample.py` are short for two of them.
"""


def main(arguments: Sequence[str] | None = None, *, command: str | None = None) -> None:
    """Run one command.

    Args:
        arguments: what stands behind ``hypersd``; None takes the process's own, behind ``command``.
        command: the command that a script is short for.
    """
    if arguments is None:
        process.require_utf8()
        arguments = [*([command] if command else []), *sys.argv[1:]]
    process.settle_environment()
    with process.exit_status():
        options, rest = _parser().parse_known_args(arguments)
        if rest:
            options.unknown(options, rest, arguments)
        if options.run is None:
            options.parser.print_help(sys.stderr)
            sys.exit(2)
        options.arguments = arguments
        options.run(options)


def _parser() -> Parser:
    parser = Parser(
        prog="hypersd",
        description="Few-step Stable Diffusion: train, sample and convert LoRAs in JAX.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"hypersd_jax {metadata.version('hypersd_jax')}")
    parser.set_defaults(unknown=lambda options, rest, _arguments: options.parser.error_unknown(rest))
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=Parser)
    for each in (train, sample, convert, cache, evaluate, stack, benchmark, serve, doctor, inspect, publish):
        each.add_parser(commands)
    return parser
