"""``hypersd cache``."""

from __future__ import annotations

import argparse
from typing import Any

from hypersd_jax.commands import checks, parsing
from hypersd_jax.commands.train import read_config, take_unknown

_EPILOG = """\
example:
  hypersd cache --config configs/sd15.yaml --output cache model=PATH/TO/stable-diffusion-v1-5 data=PATH/TO/images
"""


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "cache",
        help="encode a dataset once, for training to read",
        description="Encode the images and captions of a recipe's dataset once; training reads them with data.cache.",
        epilog=_EPILOG,
    )
    parsing.add_overrides(parser)
    parser.add_argument(
        "--output", type=parsing.path, required=True, metavar="FOLDER", help="new, or an interrupted one to resume"
    )
    parser.add_argument("--batch-size", type=parsing.whole(1), default=32, metavar="N", help="images encoded at a time")
    parser.add_argument("--shard-rows", type=parsing.whole(1), default=1024, metavar="N", help="examples a file")
    parser.set_defaults(run=run, unknown=take_unknown)


def run(options: argparse.Namespace) -> None:
    """Encode, and print how training reads what was written."""
    checks.check_target_folder("--output", options.output)
    config = read_config(options)

    from hypersd_jax.inputs.caching import write_cache

    sizes = {"batch_size": options.batch_size, "shard_rows": options.shard_rows}
    rows = write_cache(config, options.output, **sizes, alone=True)
    print(f"{rows} rows: {options.output}; train with data.cache={options.output}")
