"""The command line: ``hypersd train | sample | convert | cache | evaluate | doctor``.

Exit status 0 on success, 2 on bad usage or bad input with a one-line reason on standard error, 1 on anything else.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from hypersd_jax.errors import Interrupted, UserError

DEFAULT_PROMPT = "red apple, fluent flat style"
DEFAULT_CONFIG = "emoji/hyper"
DTYPES = ("float32", "bfloat16", "float16")
LORA_LAYOUTS = ("kohya", "kohya-sgm", "peft")


class _Parser(argparse.ArgumentParser):
    """Reports bad usage in one line."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; ``arguments`` default to the process's own."""
    options = _parser().parse_args(arguments)
    warnings.showwarning = _one_line_warning
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is absent is as it should be
    try:
        options.run(options)
    except UserError as error:
        print(f"hypersd: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        print(f"hypersd: {error if isinstance(error, Interrupted) else 'stopped'}", file=sys.stderr)
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="hypersd", description="Few-step Stable Diffusion: train, sample and convert LoRAs in JAX.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    train = commands.add_parser("train", help="distil a model into few-step LoRAs")
    train.add_argument(
        "--config", default=None, help="a recipe (default: the embedded model's, configs/emoji/hyper.yaml)"
    )
    train.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings in place of the recipe's")
    train.set_defaults(run=_train)

    sample = commands.add_parser("sample", help="draw pictures")
    sample.add_argument(
        "--model",
        default="embedded",
        help="a folder, a single file or a hub id (default: the embedded model)",
    )
    sample.add_argument("--prompt", action="append", help="what to draw; may be given several times")
    sample.add_argument("--prompts-file", type=Path, help="a text file, one prompt a line")
    sample.add_argument("--negative-prompt", help="what to steer away from; needs --guidance above 1")
    sample.add_argument("--preset", help="sampling settings by name")
    sample.add_argument("--steps", type=int)
    sample.add_argument("--sampler", help="ddim, tcd, lcm, euler, euler_a or dpmpp_2m")
    sample.add_argument("--spacing", help="trailing, leading or linspace")
    sample.add_argument("--eta", type=float)
    sample.add_argument("--guidance", type=float, help="classifier-free guidance scale; 0 or 1 is off")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--num-images", type=int, default=1, help="pictures for each prompt")
    sample.add_argument("--height", type=int)
    sample.add_argument("--width", type=int)
    sample.add_argument(
        "--lora", action="append", default=[], metavar="FILE[@SCALE]", help="may be given several times"
    )
    sample.add_argument("--image", help="a picture to start from")
    sample.add_argument("--strength", type=float, help="share of the steps that is walked from --image")
    sample.add_argument("--mask", help="repaint --image where this picture is white")
    sample.add_argument("--controlnet", action="append", default=[], metavar="SRC", help="may be given several times")
    sample.add_argument("--control-image", action="append", default=[], help="one for each --controlnet")
    sample.add_argument("--control-scale", action="append", type=float, default=[], help="one for all, or one for each")
    sample.add_argument("--guess-mode", action="store_true", help="let the ControlNets steer without a prompt")
    sample.add_argument("--vae", metavar="SRC", help="another autoencoder, such as a tiny one")
    sample.add_argument("--tiled", action="store_true", help="work in tiles: less memory for large pictures")
    sample.add_argument("--long-prompts", choices=("cut", "chunk"), default="cut", help="what to do beyond 75 tokens")
    sample.add_argument("--latents", type=Path, help="a .npy file (B, h, w, C) of standard normal latents")
    sample.add_argument("--timesteps", help="explicit timesteps such as 999,500")
    sample.add_argument("--dtype", default="auto", choices=("auto", *DTYPES))
    sample.add_argument("--output", type=Path, default=Path("sample.png"), help="several pictures: OUT-000.png, ...")
    sample.set_defaults(run=_sample)

    convert = commands.add_parser("convert", help="translate files").add_subparsers(
        required=True, metavar="KIND", parser_class=_Parser
    )
    _add_conversions(convert)

    cache = commands.add_parser("cache", help="encode a data set once, for training to read")
    cache.add_argument("--config", default=None, help="the recipe that will read it: its model and data are encoded")
    cache.add_argument("--output", type=Path, required=True, help="the cache's folder; goes on with an interrupted one")
    cache.add_argument("--batch-size", type=int, default=32)
    cache.add_argument("--shard-rows", type=int, default=1024, help="rows a file")
    cache.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings in place of the recipe's")
    cache.set_defaults(run=_cache)

    _add_evaluate(commands)

    doctor = commands.add_parser("doctor", help="what this machine offers")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser("evaluate", help="measure a model on a fixed list of prompts")
    evaluate.add_argument("--model", default="embedded", help="a folder, a single file or a hub id")
    evaluate.add_argument(
        "--lora", action="append", default=[], metavar="FILE[@SCALE]", help="may be given several times"
    )
    evaluate.add_argument("--preset", help="sampling settings by name")
    evaluate.add_argument("--steps", type=int)
    evaluate.add_argument("--sampler", help="ddim, tcd, lcm, euler, euler_a or dpmpp_2m")
    evaluate.add_argument("--spacing", help="trailing, leading or linspace")
    evaluate.add_argument("--eta", type=float)
    evaluate.add_argument("--guidance", type=float, help="classifier-free guidance scale; 0 or 1 is off")
    evaluate.add_argument("--prompts-file", type=Path, help="one prompt a line (default: the embedded list)")
    evaluate.add_argument("--n", type=int, default=1000, help="how many prompts of the list")
    evaluate.add_argument("--groups", action="append", metavar="GROUP", help="embedded prompts of this group alone")
    evaluate.add_argument(
        "--reference",
        action="append",
        metavar="base|none|FOLDER",
        help="the model itself at 25 steps (default), an earlier evaluation, and/or a folder of real pictures",
    )
    evaluate.add_argument("--reference-guidance", type=float, help="of the 25 steps (default: the model's own)")
    evaluate.add_argument("--clip", type=Path, metavar="PATH", help="CLIP weights to score with as well")
    evaluate.add_argument("--batch-size", type=int, default=16)
    evaluate.add_argument("--dtype", default="auto", choices=("auto", *DTYPES))
    evaluate.add_argument("--cache", type=Path, help="where pictures are kept between runs (default: OUTPUT/cache)")
    evaluate.add_argument("--output", type=Path, required=True, help="a folder")
    evaluate.set_defaults(run=_evaluate)


def _add_conversions(convert: Any) -> None:
    lora = convert.add_parser("lora", help="a LoRA file into another layout")
    lora.add_argument("source", metavar="IN")
    lora.add_argument("destination", metavar="OUT")
    lora.add_argument("--to", required=True, choices=LORA_LAYOUTS)
    _add_base(lora)
    lora.set_defaults(run=_convert_lora)

    model = convert.add_parser("model", help="a model into a diffusers folder or a single file")
    model.add_argument("source", metavar="IN", help="a diffusers folder, a single .safetensors file, or a hub id")
    model.add_argument("destination", metavar="OUT")
    model.add_argument("--to", required=True, choices=("diffusers", "single-file"))
    model.add_argument("--lora", action="append", default=[], metavar="FILE[@SCALE]", help="merged into the weights")
    model.add_argument("--dtype", choices=DTYPES, help="type to write (default: the stored one)")
    model.set_defaults(run=_convert_model)

    merge = convert.add_parser("merge", help="several LoRA files as one")
    merge.add_argument("destination", metavar="OUT")
    merge.add_argument("loras", nargs="+", metavar="FILE[@SCALE]")
    merge.add_argument("--rank", type=int, help="compress to this rank (default: the exact sum, of the summed rank)")
    merge.add_argument("--to", default="kohya", choices=LORA_LAYOUTS)
    _add_base(merge)
    merge.set_defaults(run=_convert_merge)

    extract = convert.add_parser("extract", help="the difference of two models as a LoRA")
    extract.add_argument("base", metavar="BASE")
    extract.add_argument("tuned", metavar="TUNED")
    extract.add_argument("destination", metavar="OUT")
    extract.add_argument("--rank", type=int, required=True)
    extract.add_argument("--to", default="kohya", choices=LORA_LAYOUTS)
    extract.set_defaults(run=_convert_extract)


def _add_base(parser: argparse.ArgumentParser) -> None:
    base = parser.add_mutually_exclusive_group()
    base.add_argument("--base", help="the model that the LoRA is for, where its family is not a known one")
    base.add_argument("--family", choices=("sd15", "sd21", "sdxl"), help="what the LoRA is for (default: what it fits)")


def _train(options: argparse.Namespace) -> None:
    from hypersd_jax.config import load_config
    from hypersd_jax.recipes import find_recipe
    from hypersd_jax.stages import train

    folder = train(load_config(find_recipe(options.config or DEFAULT_CONFIG), options.overrides), alone=True)
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


def _sample(options: argparse.Namespace) -> None:
    from hypersd_jax.compilation import use_compilation_cache
    from hypersd_jax.sampling_command import run_sample

    use_compilation_cache()
    run_sample(options)


def _cache(options: argparse.Namespace) -> None:
    from hypersd_jax.config import load_config
    from hypersd_jax.recipes import find_recipe
    from hypersd_jax.stages.caching import write_cache

    for name in ("batch_size", "shard_rows"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(options, name)}")
    config = load_config(find_recipe(options.config or DEFAULT_CONFIG), options.overrides)
    sizes = {"batch_size": options.batch_size, "shard_rows": options.shard_rows}
    rows = write_cache(config, options.output, **sizes, alone=True)
    print(f"{rows} rows: {options.output}; train with data.cache={options.output}")


def _evaluate(options: argparse.Namespace) -> None:
    from hypersd_jax.compilation import use_compilation_cache
    from hypersd_jax.stages.evaluate import run_evaluate

    use_compilation_cache()
    run_evaluate(options)
    for name in ("results.json", "results.md", "grid.png", "report.html"):
        print(options.output / name)


def _convert_lora(options: argparse.Namespace) -> None:
    from hypersd_jax.weights.lora_convert import convert_lora

    convert_lora(options.source, options.destination, options.to, base=options.base, family=options.family)
    print(options.destination)


def _convert_model(options: argparse.Namespace) -> None:
    from hypersd_jax.pipeline import parse_dtype
    from hypersd_jax.sampling_command import parse_lora
    from hypersd_jax.weights.convert_model import convert_model

    dtype = None if options.dtype is None else parse_dtype(options.dtype)
    loras = [parse_lora(text) for text in options.lora]
    convert_model(options.source, options.destination, options.to, loras=loras, dtype=dtype)
    print(options.destination)


def _convert_merge(options: argparse.Namespace) -> None:
    from hypersd_jax.sampling_command import parse_lora
    from hypersd_jax.weights.lora_merge import merge_loras

    loras = [parse_lora(text) for text in options.loras]
    settings = {"rank": options.rank, "to": options.to, "base": options.base, "family": options.family}
    print(merge_loras(loras, options.destination, **settings))


def _convert_extract(options: argparse.Namespace) -> None:
    from hypersd_jax.weights.lora_extract import extract_lora

    print(extract_lora(options.base, options.tuned, options.destination, rank=options.rank, to=options.to))


def _doctor(_options: argparse.Namespace) -> None:
    import platform

    import flax
    import jax

    devices: list[Any] = jax.devices()
    print(f"python {platform.python_version()}, jax {jax.__version__}, flax {flax.__version__}")
    print(f"{jax.default_backend()}: {len(devices)} x {devices[0].device_kind}, {os.cpu_count()} CPU cores")
    stats = devices[0].memory_stats() if jax.default_backend() != "cpu" else None
    if stats and "bytes_limit" in stats:
        print(f"memory of a device: {stats['bytes_limit'] / 2**30:.1f} GiB")


def _one_line_warning(message: Any, *_rest: Any, **_more: Any) -> None:
    print(f"hypersd: warning: {message}", file=sys.stderr)
