"""What ``python sample.py`` does: load, draw, save."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from hypersd_jax.errors import UserError
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.weights.components import EMBEDDED, assets

EMBEDDED_PROMPTS = (
    "red apple, fluent flat style",
    "cat face, noto style",
    "lion, blob style, yellow background",
    "sunflower, fluent 3d style, green background",
)
EMBEDDED_STEPS = 4
# Pictures drawn in one program; more go in rounds.
ROUND = 32


def run_sample(options: argparse.Namespace) -> None:
    """Draw what the options of ``hypersd sample`` ask for, and save it.

    The embedded model without ``--lora`` takes the LoRA that ships for the step count asked for (4 by default).

    Raises:
        UserError: one line naming the option or file at fault.
    """
    prompts = read_prompts(options.prompt, options.prompts_file, embedded=options.model == EMBEDDED)
    timesteps = _timesteps(options.timesteps)
    latents = _latents(options.latents)
    if options.output.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--output {options.output}: must end in .png, .jpg or .webp")
    loras = [parse_lora(text) for text in options.lora] or _embedded_lora(options)
    pipe = Pipeline.from_pretrained(options.model, dtype=options.dtype)
    if options.vae:
        pipe.load_vae(options.vae)
    for place, source in enumerate(options.controlnet):
        pipe.load_controlnet(source, name=f"{place}: {source}")
    # Named by place: the same file may be given twice, at two scales.
    reports = [pipe.load_lora(file, scale, name=f"{place}: {file}") for place, (file, scale) in enumerate(loras)]

    settings: dict[str, Any] = {
        "steps": options.steps,
        "sampler": options.sampler,
        "spacing": options.spacing,
        "eta": options.eta,
        "guidance": options.guidance,
        "preset": options.preset,
        "timesteps": timesteps,
        "height": options.height,
        "width": options.width,
        "seed": options.seed,
        "image": options.image,
        "strength": options.strength,
        "mask": options.mask,
        "control_image": _single(options.control_image),
        "control_scale": _single(options.control_scale) if options.control_scale else 1.0,
        "guess_mode": options.guess_mode,
        "tiled": options.tiled,
        "long_prompts": options.long_prompts,
    }
    with tqdm(unit="step", desc="sampling", delay=2.0) as bar:

        def progress(step: int, steps: int) -> None:
            bar.total = steps
            bar.update(step - bar.n)

        images: list[Image.Image] = pipe(
            prompts,
            options.negative_prompt,
            num_images=options.num_images,
            latents=latents,
            callback=progress,
            batch_size=min(ROUND, len(prompts) * options.num_images),
            **settings,
        )
    for report in reports:
        print(report, file=sys.stderr)
    for path in save_images(images, options.output, _parameters(prompts, options)):
        print(path)


def read_prompts(given: list[str] | None, file: Path | None, *, embedded: bool) -> list[str]:
    """The prompts of the command line and of a file, one a line; empty lines are left out."""
    prompts = list(given or [])
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts-file {file}: cannot be read ({error})") from None
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise UserError(f"--prompts-file {file}: holds no prompt")
        prompts += found
    if not prompts and embedded:
        return list(EMBEDDED_PROMPTS)
    if not prompts:
        raise UserError("--prompt is missing")
    return prompts


def save_images(images: list[Image.Image], output: Path, texts: list[str]) -> list[Path]:
    """Save one picture as ``output``, several as ``output-000``, ...; each under a temporary name first."""
    paths = []
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        for index, image in enumerate(images):
            path = output if len(images) == 1 else output.with_name(f"{output.stem}-{index:03d}{output.suffix}")
            temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
            if path.suffix.lower() == ".png":
                info = PngInfo()
                info.add_text("prompt", texts[index * len(texts) // len(images)])
                image.save(temporary, pnginfo=info)
            else:
                image.save(temporary)
            temporary.replace(path)
            paths.append(path)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error})") from None
    return paths


def _embedded_lora(options: argparse.Namespace) -> list[tuple[Path, float]]:
    """The LoRA that ships for the embedded model, unless many-step sampling is asked for."""
    if options.model != EMBEDDED or options.preset or (options.guidance or 0.0) > 1.0:
        return []
    steps = options.steps or EMBEDDED_STEPS
    if options.timesteps:
        steps = len(options.timesteps.split(","))
    path = assets() / "loras" / f"tscd-{steps}.safetensors"
    return [(path, 1.0)] if path.exists() else []


def parse_lora(text: str) -> tuple[Path, float]:
    """The file and scale of ``FILE[@SCALE]``; a file whose own name has an @ is taken as it is."""
    name, at, scale = text.rpartition("@")
    if not at or Path(text).exists():
        return Path(text), 1.0
    try:
        return Path(name), float(scale)
    except ValueError:
        raise UserError(f"--lora {text}: the scale {scale!r} is not a number") from None


def _single(values: list[Any]) -> Any:
    """One value for one ControlNet, the list for several, None for none."""
    return values[0] if len(values) == 1 else values or None


def _timesteps(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--timesteps {text}: must be whole numbers separated by commas") from None


def _latents(path: Path | None) -> np.ndarray | None:
    if path is None:
        return None
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"--latents {path}: cannot be read as a .npy file ({error})") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.ndim != 4:
        raise UserError(f"--latents {path}: must hold one float array (B, h, w, C)")
    return array


def _parameters(prompts: list[str], options: argparse.Namespace) -> list[str]:
    """The text that goes into each prompt's pictures."""
    return [f"{prompt}\nSeed: {options.seed}" for prompt in prompts]
