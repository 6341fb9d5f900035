"""``hypersd sample``, which ``python sample.py`` is short for."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

from hypersd_jax.commands import checks, parsing
from hypersd_jax.commands.lora_folder import find_loras
from hypersd_jax.config import utf8
from hypersd_jax.errors import UserError
from hypersd_jax.paths import IMAGE_SUFFIXES

DEFAULT_NAME = "sample.png"

_EPILOG = """\
examples:
  python sample.py --steps 4 --prompt "red apple, fluent flat style" --output apple.png
  python sample.py --model PATH/TO/stable-diffusion-v1-5 --lora style.safetensors@0.7 --prompt "a lighthouse at dusk"

Settings that no option gives come from the preset, else the LoRA's header or name, else the model's many-step default.

"""


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "sample",
        help="sample images",
        description="Sample images from a model and any LoRAs.",
        epilog=_EPILOG + parsing.preset_list(),
    )
    group = parser.add_argument_group("what")
    group.add_argument("--prompt", action="append", help="may be given several times")
    group.add_argument(
        "--prompts-file", type=parsing.path, metavar="FILE", help="one prompt a line, or a benchmark's .tsv or .jsonl"
    )
    group.add_argument(
        "--negative-prompt", metavar="TEXT", help="to steer away from; needs --guidance or --nag-scale above 1"
    )
    group.add_argument("--num-images", type=parsing.whole(1), default=1, metavar="N", help="for each prompt")
    group.add_argument("--seed", type=parsing.seed, default=0, metavar="N|random", help="of the noise (default: 0)")
    group.add_argument("--height", type=parsing.whole(1), metavar="PIXELS", help="default: the model's own")
    group.add_argument("--width", type=parsing.whole(1), metavar="PIXELS", help="default: the model's own")
    group.add_argument("--long-prompts", choices=("cut", "chunk"), default="cut", help="what to do beyond 75 tokens")
    group.add_argument(
        "--output",
        type=parsing.source,
        metavar="FILE|FOLDER/",
        help=".png, .jpg or .webp; several images: OUT-000.png, ...; in a folder, and by default, new numbers "
        "(default: sample.png)",
    )
    group.add_argument("--overwrite", action="store_true", help="begin the numbers of new images at 000 again")

    group = parser.add_argument_group("with")
    parsing.add_model(group)
    parsing.add_mesh(group, "one device")
    group.add_argument("--tiled", action="store_true", help="work in tiles: less memory for large images")

    group = parser.add_argument_group("how")
    parsing.add_settings(group)
    group.add_argument(
        "--nag-scale",
        type=parsing.decimal,
        default=0.0,
        metavar="SCALE",
        help="steer attention away from --negative-prompt, without guidance, such as 5; 0 or 1 is off",
    )
    group.add_argument(
        "--nag-tau", type=parsing.decimal, default=2.5, metavar="TAU", help="how far, in norms of the prompt's features"
    )
    group.add_argument(
        "--nag-alpha", type=parsing.decimal, default=0.25, metavar="SHARE", help="how much of it, 0 to 1"
    )
    group.add_argument(
        "--guidance-steps",
        type=parsing.step_range,
        metavar="N|N-M|N-",
        help="the steps that --guidance is for, counted from 1 (default: all)",
    )
    group.add_argument(
        "--base-steps",
        type=parsing.step_range,
        metavar="N|N-M|N-",
        help="the steps that the model takes without its LoRAs (default: none)",
    )
    group.add_argument("--timesteps", metavar="T,T,...", help="explicit timesteps such as 999,500")
    group.add_argument(
        "--latents", type=parsing.path, metavar="FILE.npy", help="(B, h, w, C) of standard normal latents"
    )

    group = parser.add_argument_group("from images")
    group.add_argument("--image", type=parsing.source, metavar="FILE", help="an image to start from")
    group.add_argument("--strength", type=parsing.decimal, help="share of the steps that is walked from --image")
    group.add_argument("--mask", type=parsing.source, metavar="FILE", help="repaint --image where this is white")
    group.add_argument(
        "--controlnet",
        type=parsing.source,
        action="append",
        default=[],
        metavar="SRC",
        help="may be given several times",
    )
    group.add_argument(
        "--control-image",
        type=parsing.source,
        action="append",
        default=[],
        metavar="FILE",
        help="one for each --controlnet",
    )
    group.add_argument(
        "--control-scale",
        action="append",
        type=parsing.decimal,
        default=[],
        metavar="SCALE",
        help="one for all, or one for each",
    )
    group.add_argument("--guess-mode", action="store_true", help="let the ControlNets steer without a prompt")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Sample, save, and print the files."""
    check(options)

    from hypersd_jax.compilation import use_compilation_cache
    from hypersd_jax.sampling_command import run_sample

    use_compilation_cache()
    run_sample(options)


def check(options: argparse.Namespace) -> None:
    """Refuse what is wrong with the options alone; texts are UTF-8 from here on."""
    if options.prompt is not None:
        options.prompt = [utf8(prompt, "--prompt") for prompt in options.prompt]
    if options.negative_prompt is not None:
        options.negative_prompt = utf8(options.negative_prompt, "--negative-prompt")
    _choose_names(options)
    if options.timesteps is not None and not re.fullmatch(r"\s*[0-9]+\s*(,\s*[0-9]+\s*)*", options.timesteps):
        raise UserError(f"--timesteps {options.timesteps}: must be whole numbers separated by commas")
    checks.check_preset(options.preset)
    checks.check_files("--prompts-file", [options.prompts_file])
    checks.check_files("--latents", [options.latents])
    checks.check_files("--image", [options.image])
    checks.check_files("--mask", [options.mask])
    checks.check_files("--control-image", options.control_image)
    checks.check_model(options.model)
    options.lora = find_loras(options.lora, options.lora_dir)
    checks.check_loras(options.lora)
    for source in [*options.controlnet, *([options.vae] if options.vae else [])]:
        checks.check_source(source)
    if options.model != checks.EMBEDDED and not options.prompt and options.prompts_file is None:
        raise UserError("--prompt is missing")


def _choose_names(options: argparse.Namespace) -> None:
    """Settle `output` as a path, and whether its images get `new` numbers, and `bare` names where one is free.

    A file that is named is written, whatever was there: whoever names it asks for that. Images in a folder, and those
    of the default name, overwrite none.
    """
    given = options.output
    in_folder = given is not None and (given.endswith(("/", os.sep)) or os.path.isdir(given))
    options.bare, options.new = not in_folder, (given is None or in_folder) and not options.overwrite
    if in_folder:
        checks.check_target_folder("--output", Path(given))
        options.output = Path(given) / DEFAULT_NAME
    else:
        options.output = Path(given or DEFAULT_NAME)
    if options.output.suffix.lower() not in IMAGE_SUFFIXES:
        raise UserError(f"--output {options.output}: must end in .png, .jpg or .webp")
