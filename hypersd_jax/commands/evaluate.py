"""``hypersd evaluate``."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from typing import Any

from hypersd_jax.commands import checks, parsing
from hypersd_jax.commands.lora_folder import find_loras
from hypersd_jax.config import utf8
from hypersd_jax.errors import UserError

_EPILOG = """\
example:
  hypersd evaluate --lora outputs/emoji/loras/tscd-2.safetensors --n 256 --output out/two

"""

HYPER_SD = "hyper-sd"
# How many prompts are measured where --n does not say.
PROMPTS = {None: 1000, HYPER_SD: 5000}
PROTOCOL_REWARDS = ("aesthetic", "imagereward", "pickscore")


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
    parsing.add_loras(group)
    group.add_argument("--dtype", default="auto", choices=("auto", *parsing.DTYPES))
    parsing.add_mesh(group, "all devices, with all weights on each")
    parsing.add_settings(parser.add_argument_group("how it samples"))

    group = parser.add_argument_group("on what")
    group.add_argument(
        "--prompts-file",
        type=parsing.path,
        metavar="FILE",
        help="one prompt a line, or a benchmark's .tsv or .jsonl (default: the embedded list)",
    )
    group.add_argument(
        "--n",
        type=parsing.whole(),
        help=f"how many prompts of the list (default: {PROMPTS[None]}; of a protocol {PROMPTS[HYPER_SD]})",
    )
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
    group.add_argument(
        "--reward",
        type=parsing.reward,
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="a reward and its weights (docs/rewards.md), which gets a column; may be given several times",
    )
    group.add_argument(
        "--protocol",
        choices=(HYPER_SD,),
        help="put the results beside a paper's, by its protocol; hyper-sd: arXiv 2404.13686, Table 2, of SD 1.5 or "
        f"SDXL with --clip and --reward {', '.join(PROTOCOL_REWARDS)}, on --prompts-file, captions of COCO 2017",
    )

    group = parser.add_argument_group("where")
    group.add_argument("--output", type=parsing.path, required=True, metavar="FOLDER")
    group.add_argument(
        "--cache", type=parsing.path, metavar="FOLDER", help="keeps images between runs (default: OUTPUT/cache)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure, and print the files."""
    check(options)
    options.n = PROMPTS[options.protocol] if options.n is None else options.n

    from hypersd_jax.compilation import use_compilation_cache
    from hypersd_jax.evaluation import printed_table
    from hypersd_jax.evaluation.evaluate import PAPER_FILE, run_evaluate

    use_compilation_cache()
    run_evaluate(options)
    print(printed_table(options.output / "results.json", None, sys.stdout.encoding))
    files = ["results.json", "results.md", "grid.png", "report.html"]
    if options.protocol is not None:
        from hypersd_jax.evaluation.hyper_sd import DIFFERENCES

        print(printed_table(options.output / PAPER_FILE, None, sys.stdout.encoding))
        print(textwrap.fill(DIFFERENCES, 120) + "\n")
        files.append(PAPER_FILE)
    for name in files:
        print(options.output / name)


def check(options: argparse.Namespace) -> None:
    """Refuse what is wrong with the options alone."""
    checks.check_target_folder("--output", options.output)
    checks.check_preset(options.preset)
    checks.check_model(options.model)
    options.lora = find_loras(options.lora, options.lora_dir)
    checks.check_loras(options.lora)
    checks.check_files("--prompts-file", [options.prompts_file])
    if options.clip is not None and not os.path.exists(options.clip):
        raise UserError(f"--clip {options.clip}: no such file or folder")
    for name, path in options.reward:
        if not os.path.exists(path):
            raise UserError(f"--reward {name}={path}: no such file or folder")
    if options.protocol is not None:
        _check_protocol(options)
    for folder in options.reference or ():
        utf8(folder, "--reference")  # its name goes into the table
        if folder not in ("base", "none") and not os.path.isdir(folder):
            raise UserError(f"--reference {folder}: is neither base, none nor a folder")


def _check_protocol(options: argparse.Namespace) -> None:
    """Name all that the protocol needs and that is not given."""
    if options.model == checks.EMBEDDED:
        raise UserError(
            f"--protocol {options.protocol} measures SD 1.5 or SDXL, and the embedded model is neither; name --model"
        )
    given = {name for name, _ in options.reward}
    missing = [] if options.prompts_file else ["--prompts-file FILE"]
    missing += [] if options.clip else ["--clip PATH"]
    missing += [f"--reward {name}=PATH" for name in PROTOCOL_REWARDS if name not in given]
    if missing:
        raise UserError(f"--protocol {options.protocol} also needs {', '.join(missing)}")
