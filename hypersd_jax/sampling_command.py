"""What ``python sample.py`` does: load, draw, save."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from hypersd_jax.errors import UserError
from hypersd_jax.files import decoded, lines_of
from hypersd_jax.pipeline import Pipeline, arguments
from hypersd_jax.png_text import SUFFIXES, UsedLora, lora_hash, name_of, parameters_text, save_pictures
from hypersd_jax.weights.components import EMBEDDED, assets
from hypersd_jax.weights.hub import parse_id
from hypersd_jax.weights.lora import LoraReport, weights_file

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
    if options.output.suffix.lower() not in SUFFIXES:
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
    texts = picture_texts(pipe, options, prompts, images, used_loras(loras, reports))
    for path in save_pictures(images, options.output, texts):
        print(path)


def read_prompts(given: list[str] | None, file: Path | None, *, embedded: bool) -> list[str]:
    """The prompts of the command line and of a file, one a line; empty lines are left out."""
    prompts = list(given or [])
    if file is not None:
        try:
            lines = lines_of(decoded(file.read_bytes()))
        except (OSError, ValueError) as error:
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


def used_loras(loras: Sequence[tuple[Path, float]], reports: Sequence[LoraReport]) -> list[UsedLora]:
    """What the pictures' texts say of LoRAs: as they were asked for, and where they were found."""
    return [
        UsedLora(name=name_of(file), scale=scale, hash=lora_hash(weights_file(Path(report.file))))
        for (file, scale), report in zip(loras, reports, strict=True)
    ]


def picture_texts(
    pipe: Pipeline,
    options: argparse.Namespace,
    prompts: Sequence[str],
    images: Sequence[Image.Image],
    loras: Sequence[UsedLora],
) -> list[str]:
    """What each picture was drawn with, by the settings that the pipeline resolved; for `save_pictures`.

    ``Image: i.j`` is its place, picture j of prompt i, both from 0: with the seed, what its noise was drawn from.
    """
    timesteps = _timesteps(options.timesteps)
    settings = pipe.settings(
        options.preset,
        steps=len(timesteps) if timesteps is not None and options.steps is None else options.steps,
        sampler=options.sampler,
        eta=options.eta,
        guidance=options.guidance,
        spacing=options.spacing,
        timesteps=None if timesteps is None else tuple(timesteps),
    )
    embeds_guidance = bool(pipe.components.unet_config.time_cond_proj_dim)
    guided = (settings.guidance or 0.0) > 1.0 and not embeds_guidance
    strength = arguments.share(
        options.strength, options.image, options.mask, default=0.3 if pipe.components.is_xl else 0.8
    )
    scales = options.control_scale or [1.0]
    scales = scales if len(scales) > 1 else scales * len(options.controlnet)
    more: dict[str, Any] = {
        "VAE": name_of(options.vae) if options.vae else None,
        "Denoising strength": f"{strength:g}" if options.image else None,
        "Latents": options.latents,
        "Long prompts": options.long_prompts if options.long_prompts != "cut" else None,
    }
    for place, (source, scale) in enumerate(zip(options.controlnet, scales, strict=False)):
        mode = ", Control Mode: ControlNet is more important" if options.guess_mode else ""
        more[f"ControlNet {place}"] = f"Model: {name_of(source)}, Weight: {scale:g}{mode}"
    return [
        parameters_text(
            prompts[index // options.num_images],
            settings,
            seed=options.seed,
            size=image.size,
            model=name_of(options.model),
            negative=options.negative_prompt if guided else None,
            scheduler_config=pipe.components.scheduler_config,
            loras=loras,
            more={**more, "Image": f"{index // options.num_images}.{index % options.num_images}"},
        )
        for index, image in enumerate(images)
    ]


def _embedded_lora(options: argparse.Namespace) -> list[tuple[Path, float]]:
    """The LoRA that ships for the embedded model, unless many-step sampling is asked for."""
    if options.model != EMBEDDED or options.preset or (options.guidance or 0.0) > 1.0:
        return []
    steps = options.steps or EMBEDDED_STEPS
    if options.timesteps:
        steps = len(options.timesteps.split(","))
    # In one step the unified LoRA is better than the one of TSCD alone; it begins at a time of its own.
    name = "unified" if steps == 1 and not options.timesteps else f"tscd-{steps}"
    path = assets() / "loras" / f"{name}.safetensors"
    return [(path, 1.0)] if path.exists() else []


def parse_lora(text: str) -> tuple[Path, float]:
    """The file and scale of ``FILE[@SCALE]``; a file whose own name has an @, and a hub id's revision, stay as is."""
    name, at, scale = text.rpartition("@")
    if not at or Path(text).exists():
        return Path(text), 1.0
    try:
        return Path(name), float(scale)
    except ValueError:
        found = parse_id(text)
        if "@" not in name and found is not None and found.revision and not found.repo.endswith(".safetensors"):
            return Path(text), 1.0
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
