"""The command behind ``python sample.py``: load, sample, save."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from hypersd_jax import files
from hypersd_jax.diffusion import SOLVERS
from hypersd_jax.errors import UserError
from hypersd_jax.paths import numbered_paths, parse_lora
from hypersd_jax.pipeline import CallSettings, Pipeline, to_pil
from hypersd_jax.pipeline.arguments import NotFiniteWarning, about_not_finite, not_finite
from hypersd_jax.pipeline.steering import StepRange, written
from hypersd_jax.png_text import (
    UsedLora,
    image_paths,
    lora_hash,
    name_of,
    parameters_text,
    save_images,
)
from hypersd_jax.progress import COMPILING, begin_clock
from hypersd_jax.weights.components import EMBEDDED, assets
from hypersd_jax.weights.lora import LoraReport, weights_file
from hypersd_jax.weights.mesh import mesh_of_option

EMBEDDED_PROMPTS = (
    "red apple, fluent flat style",
    "cat face, noto style",
    "lion, blob style, yellow background",
    "sunflower, fluent 3d style, green background",
)
EMBEDDED_STEPS = 4
# Of the few-step LoRAs; more steps are the model's own.
MOST_STEPS = 8
# Images sampled in one program; more go in rounds.
ROUND = 32


def run_sample(options: argparse.Namespace) -> None:
    """Sample what the options of ``hypersd sample`` ask for, and save it.

    The embedded model without ``--lora`` takes the LoRA that ships for the number of steps asked for (4 by default).

    Raises:
        UserError: one line naming the option or file at fault.
    """
    prompts = read_prompts(options.prompt, options.prompts_file, embedded=options.model == EMBEDDED)
    latents = _latents(options.latents)
    loras = [parse_lora(text) for text in options.lora] or _embedded_lora(options)
    mesh = None if options.mesh is None else mesh_of_option(*options.mesh)
    pipe = Pipeline.from_pretrained(options.model, dtype=options.dtype, mesh=mesh)
    if options.vae:
        pipe.load_vae(options.vae)
    # Named by number: the same file may be given twice, at two scales.
    for number, source in enumerate(options.controlnet):
        pipe.load_controlnet(source, name=f"{number}: {source}")
    reports = [pipe.load_lora(file, scale, name=f"{number}: {file}") for number, (file, scale) in enumerate(loras)]

    arguments: dict[str, Any] = {
        "steps": options.steps,
        "sampler": options.sampler,
        "spacing": options.spacing,
        "eta": options.eta,
        "guidance": options.guidance,
        "preset": options.preset,
        "timesteps": _timesteps(options.timesteps),
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
        "nag_scale": options.nag_scale,
        "nag_tau": options.nag_tau,
        "nag_alpha": options.nag_alpha,
        "guidance_steps": options.guidance_steps,
        "base_steps": options.base_steps,
    }
    begin = time.perf_counter()
    with tqdm(unit="step", desc=f"sampling: {COMPILING}", delay=2.0) as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore", NotFiniteWarning)  # an error here, see below

        def progress(step: int, steps: int) -> None:
            bar.total = steps
            if step == 1:
                begin_clock(bar, "sampling", step)
            bar.update(step - bar.n)

        images, settings = pipe.generate(
            prompts,
            options.negative_prompt,
            num_images=options.num_images,
            latents=latents,
            callback=progress,
            batch_size=min(ROUND, len(prompts) * options.num_images),
            output="np",
            **arguments,
        )
    seconds = time.perf_counter() - begin
    for report in reports:
        print(report, file=sys.stderr)
    used = used_loras(loras, reports)
    print(used_line(settings, options, used, mesh, len(images), seconds), file=sys.stderr)
    save_finite(images, options, image_texts(options, settings, prompts, used), pipe.dtype)


def save_finite(images: np.ndarray, options: argparse.Namespace, texts: Sequence[str], dtype: Any) -> None:
    """Save the images (B, H, W, 3) that are finite, each under the name that it has among all, and print the names.

    Raises:
        UserError: after that, where some are not finite.
    """
    broken = not_finite(images)
    for index, path in enumerate(_image_paths(options, len(images))):
        if index not in broken:
            save_images(to_pil(images[index : index + 1]), path, [texts[index]])
            print(path)
    if broken:
        kept = "" if len(broken) == len(images) else "; the others are saved"
        raise UserError(about_not_finite(broken, len(images), dtype) + kept)


def _image_paths(options: argparse.Namespace, count: int) -> list[Path]:
    if options.new:
        return numbered_paths(options.output, count, bare=options.bare)
    if not options.bare:
        return [options.output.with_name(f"{options.output.stem}-{i:03d}{options.output.suffix}") for i in range(count)]
    return image_paths(options.output, count)


def used_line(
    settings: CallSettings,
    options: argparse.Namespace,
    loras: Sequence[UsedLora],
    mesh: Mesh | None,
    count: int,
    seconds: float,
) -> str:
    """One line on the settings that a number of images were sampled with."""
    parts = [
        f"model {name_of(options.model)}",
        "LoRA " + (" + ".join(f"{lora.name}@{lora.scale:g}" for lora in loras) or "none"),
        settings.sampler,
        f"{settings.steps} step{'s' if settings.steps != 1 else ''}",
        f"guidance {settings.guidance:g}" + _at_steps(settings.guidance_steps),
        f"NAG {settings.nag_scale:g}" if settings.steers_attention else None,
        f"base alone{_at_steps(settings.base_steps)}" if settings.base_steps else None,
        f"eta {settings.eta:g}" if SOLVERS[settings.sampler].has_eta else None,
        f"spacing {settings.spacing}" if settings.spacing else None,
        f"timesteps {','.join(map(str, settings.timesteps))}" if settings.timesteps else None,
        f"seed {settings.seed}",
        f"{settings.width}x{settings.height}",
        None if mesh is None else f"mesh {'x'.join(map(str, mesh.devices.shape))}",
        f"{count} image{'s' if count != 1 else ''} in {seconds:.1f} s",
    ]
    return "sampled with " + ", ".join(part for part in parts if part)


def read_prompts(given: list[str] | None, file: Path | None, *, embedded: bool) -> list[str]:
    """The prompts of the command line and of a file, see `files.read_prompts`."""
    prompts = list(given or [])
    if file is not None:
        try:
            prompts += files.read_prompts(file)
        except ValueError as error:
            raise UserError(f"--prompts-file {file}: {error}") from None
    if not prompts and embedded:
        return list(EMBEDDED_PROMPTS)
    if not prompts:
        raise UserError("--prompt is missing")
    return prompts


def used_loras(loras: Sequence[tuple[Path, float]], reports: Sequence[LoraReport]) -> list[UsedLora]:
    """Names and scales of the LoRAs as they were asked for, and hashes of the files that were found."""
    return [
        UsedLora(name=name_of(file), scale=scale, hash=lora_hash(weights_file(Path(report.file))))
        for (file, scale), report in zip(loras, reports, strict=True)
    ]


def image_texts(
    options: argparse.Namespace, settings: CallSettings, prompts: Sequence[str], loras: Sequence[UsedLora]
) -> list[str]:
    """Compose the text of each image of a call, for `save_images`.

    ``Image: i.j`` says that it is image j of prompt i, both from 0: with the seed, what its noise was generated from.
    """
    more: dict[str, Any] = {
        "VAE": name_of(options.vae) if options.vae else None,
        "Denoising strength": f"{settings.strength:g}" if options.image else None,
        "Latents": options.latents,
        "Long prompts": settings.long_prompts if settings.long_prompts != "cut" else None,
    }
    for number, (source, scale) in enumerate(zip(options.controlnet, settings.control_scales, strict=True)):
        mode = ", Control Mode: ControlNet is more important" if settings.guess_mode else ""
        more[f"ControlNet {number}"] = f"Model: {name_of(source)}, Weight: {scale:g}{mode}"
    return [
        parameters_text(
            prompt,
            settings,
            model=name_of(options.model),
            negative=options.negative_prompt,
            loras=loras,
            more={**more, "Image": f"{i}.{j}"},
        )
        for i, prompt in enumerate(prompts)
        for j in range(settings.num_images)
    ]


def _embedded_lora(options: argparse.Namespace) -> list[tuple[Path, float]]:
    """The LoRA that ships for the embedded model and the steps asked for, unless many-step sampling is."""
    by_step = options.guidance_steps or options.base_steps  # the other steps are the LoRA's
    if options.model != EMBEDDED or options.preset or ((options.guidance or 0.0) > 1.0 and not by_step):
        return []
    steps = EMBEDDED_STEPS if options.steps is None else options.steps
    if options.timesteps:
        steps = len(options.timesteps.split(","))
    if steps not in range(1, MOST_STEPS + 1):
        return []
    return [(shipped_lora(steps, own_times=options.timesteps is not None), 1.0)]


def shipped_lora(steps: int, *, own_times: bool = False) -> Path:
    """The best of the embedded model's LoRAs for a number of steps.

    In 4 and 8 steps the LoRAs of TSCD are better than the unified one, in 2 and 1 it is (docs/experiments.md), and it
    alone is made for the other numbers. It begins at a timestep of its own, so explicit ones go to TSCD's.
    """
    own = (1, 2, 4, 8) if own_times else (4, 8)
    name = f"tscd-{steps}" if steps in own else "unified"
    return assets() / "loras" / f"{name}.safetensors"


def _at_steps(steps: StepRange | None) -> str:
    return "" if steps is None else f" in step{'s' if steps[0] != steps[1] else ''} {written(steps)}"


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
