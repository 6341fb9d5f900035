"""``hypersd convert lora | model | merge | extract | reward``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hypersd_jax.commands import checks, parsing
from hypersd_jax.commands.parsing import DTYPES, Names, Parser, lora_layouts
from hypersd_jax.paths import parse_lora

_EPILOG = """\
examples:
  hypersd convert lora IN.safetensors OUT.safetensors --to peft
  hypersd convert model SRC OUT --to diffusers
"""


def add_parser(commands: Any) -> None:
    """Declare the command and its five kinds."""
    parser = commands.add_parser(
        "convert", help="translate files", description="Translate files from one layout into another.", epilog=_EPILOG
    )
    kinds = parser.add_subparsers(metavar="KIND", parser_class=Parser)
    _add_lora(kinds)
    _add_model(kinds)
    _add_merge(kinds)
    _add_extract(kinds)
    _add_reward(kinds)


def _add_lora(kinds: Any) -> None:
    parser = kinds.add_parser(
        "lora",
        help="a LoRA file into another layout",
        description="Write a LoRA file in another layout; its effect stays the same.",
        epilog="example:\n  hypersd convert lora IN.safetensors OUT.safetensors --to kohya\n",
    )
    parser.add_argument("source", type=parsing.source, metavar="IN", help="a file, a PEFT folder, or a hub id")
    parser.add_argument("destination", type=parsing.source, metavar="OUT", help="a .safetensors file")
    _add_layout(parser, required=True)
    parsing.add_base(parser)
    parser.set_defaults(run=_lora)


def _add_model(kinds: Any) -> None:
    parser = kinds.add_parser(
        "model",
        help="a model into a diffusers folder or a single file",
        description="Write a model as a diffusers folder or a single file, LoRAs merged on the way.",
        epilog="example:\n  hypersd convert model SRC OUT.safetensors --to single-file --lora style.safetensors@0.7\n",
    )
    parser.add_argument("source", type=parsing.source, metavar="IN", help="a diffusers folder, a file, or a hub id")
    parser.add_argument("destination", type=parsing.source, metavar="OUT", help="a new folder, or a .safetensors file")
    parser.add_argument("--to", required=True, choices=("diffusers", "single-file"), help="the layout to write")
    parser.add_argument(
        "--lora",
        type=parsing.lora,
        action="append",
        default=[],
        metavar="FILE[@SCALE]",
        help="merged into the weights; may be given several times",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="type to write (default: the stored one)")
    parser.set_defaults(run=_model)


def _add_merge(kinds: Any) -> None:
    parser = kinds.add_parser(
        "merge",
        help="several LoRA files as one",
        description="Write the sum of LoRA files, each times its scale, as one file.",
        epilog="example:\n  hypersd convert merge OUT.safetensors A.safetensors@0.8 B.safetensors@0.5 --rank 64\n",
    )
    parser.add_argument("destination", type=parsing.source, metavar="OUT", help="a .safetensors file")
    parser.add_argument("loras", type=parsing.lora, nargs="+", metavar="FILE[@SCALE]")
    parser.add_argument(
        "--rank", type=parsing.whole(), help="compress to this rank (default: the exact sum, of the summed rank)"
    )
    _add_layout(parser, default="kohya")
    parsing.add_base(parser)
    parser.set_defaults(run=_merge)


def _add_extract(kinds: Any) -> None:
    parser = kinds.add_parser(
        "extract",
        help="the difference of two models as a LoRA",
        description="Write the difference between two models as a LoRA.",
        epilog="example:\n  hypersd convert extract BASE TUNED OUT.safetensors --rank 64\n",
    )
    parser.add_argument("base", type=parsing.source, metavar="BASE", help="a folder, a file, or a hub id")
    parser.add_argument("tuned", type=parsing.source, metavar="TUNED", help="a model of the same shapes")
    parser.add_argument("destination", type=parsing.source, metavar="OUT", help="a .safetensors file")
    parser.add_argument("--rank", type=parsing.whole(), required=True, help="of every module")
    _add_layout(parser, default="kohya")
    parser.set_defaults(run=_extract)


def _add_reward(kinds: Any) -> None:
    parser = kinds.add_parser(
        "reward",
        help="a reward's PyTorch file as safetensors",
        description="Write the weights of a PyTorch file (.pt, .pth, .bin) as safetensors. Takes torch; no code in the "
        "file is run.",
        epilog="example:\n  hypersd convert reward HPS_v2.1_compressed.pt HPS_v2.1_compressed.safetensors\n",
    )
    parser.add_argument("source", type=parsing.path, metavar="IN", help="a PyTorch file")
    parser.add_argument("destination", type=parsing.path, metavar="OUT", help="a .safetensors file")
    parser.set_defaults(run=_reward)


def _add_layout(parser: argparse.ArgumentParser, **more: Any) -> None:
    parser.add_argument(
        "--to", choices=Names(lora_layouts), metavar="LAYOUT", help="the layout to write: %(choices)s", **more
    )


def _lora(options: argparse.Namespace) -> None:
    checks.check_source(options.source)
    _check_base(options)

    from hypersd_jax.weights.lora.convert import convert_lora

    convert_lora(options.source, options.destination, options.to, base=options.base, family=options.family)
    print(options.destination)


def _model(options: argparse.Namespace) -> None:
    checks.check_model(options.source)
    checks.check_loras(options.lora)
    if options.to == "single-file":
        checks.check_target_file(options.destination)

    from hypersd_jax.pipeline import parse_dtype
    from hypersd_jax.weights.conversion import convert_model

    dtype = None if options.dtype is None else parse_dtype(options.dtype)
    loras = [parse_lora(text) for text in options.lora]
    convert_model(options.source, options.destination, options.to, loras=loras, dtype=dtype)
    print(options.destination)


def _merge(options: argparse.Namespace) -> None:
    checks.check_loras(options.loras)
    _check_base(options)

    from hypersd_jax.weights.lora.merge import merge_loras

    loras = [parse_lora(text) for text in options.loras]
    settings = {"rank": options.rank, "to": options.to, "base": options.base, "family": options.family}
    print(merge_loras(loras, options.destination, **settings))


def _extract(options: argparse.Namespace) -> None:
    checks.check_model(options.base)
    checks.check_model(options.tuned)
    checks.check_target_file(options.destination)

    from hypersd_jax.weights.lora.extract import extract_lora

    print(extract_lora(options.base, options.tuned, options.destination, rank=options.rank, to=options.to))


def _reward(options: argparse.Namespace) -> None:
    checks.check_files("convert reward", [options.source])
    checks.check_target_file(options.destination)

    from hypersd_jax.rewards.conversion import convert_reward

    convert_reward(options.source, options.destination)
    print(options.destination)


def _check_base(options: argparse.Namespace) -> None:
    checks.check_target_file(options.destination)
    if options.base is not None and options.base != checks.EMBEDDED:
        checks.check_source(Path(options.base))
