"""Plan: prompts, images and noise of a call, checked and turned into what each round feeds the compiled programs."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from hypersd_jax.conditioning import warn_of_cuts
from hypersd_jax.diffusion import injects_noise
from hypersd_jax.errors import UserError
from hypersd_jax.pipeline import arguments
from hypersd_jax.pipeline.active import ActiveModel, NegativeIds, TokenIds
from hypersd_jax.pipeline.image_guides import Controls, ImageGuides
from hypersd_jax.pipeline.programs import Programs
from hypersd_jax.pipeline.settings import CallSettings, table_for
from hypersd_jax.pipeline.steering import Section, sections


@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
    """Images that are sampled at a time.

    Attributes:
        indices: their indices in the call, (B,); past `count` the last is repeated, to share the other rounds' program
            and to give each device equally many.
        count: how many of them are wanted.
        owners: the prompt index of each, (B,).
        prompts: token ids of the prompts.
        negatives: token ids of the negative prompts; None where nothing steers away from them.
    """

    indices: np.ndarray
    count: int
    owners: np.ndarray
    prompts: TokenIds
    negatives: NegativeIds | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A call, laid out for `run`.

    Attributes:
        settings: resolved.
        table: the solver's, of the steps that are walked.
        latents: standard normal start (N, h, w, C) of all images.
        noise: (steps, N, h, w, C), what each step adds.
        from_noise: whether the start is noise alone, and not an image's latents with noise.
        guides: images to start from and to keep, by prompt.
        controls: ControlNets, and their images by prompt.
        rounds: which images are sampled together.
        sections: which steps are sampled alike.
    """

    settings: CallSettings
    table: dict[str, np.ndarray]
    latents: np.ndarray
    noise: np.ndarray
    from_noise: bool
    guides: ImageGuides
    controls: Controls
    rounds: tuple[Round, ...]
    sections: tuple[Section, ...]


def make_plan(
    settings: CallSettings,
    model: ActiveModel,
    *,
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str | None] | None,
    latents: Any,
    noise: Any,
    image: Any,
    mask: Any,
    control_image: Any,
    batch_size: int | None,
) -> Plan:
    """Check the inputs of a call, and read, encode and lay them out; arguments are those of `Pipeline.generate`.

    Raises:
        UserError: one line naming the argument at fault.
    """
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size must be at least 1, not {batch_size}")
    base, size = model.base, (settings.height, settings.width)
    factor = base.downscale
    table = table_for(settings, base.scheduler_config, strength=settings.strength)
    if settings.base_steps is not None and not model.has_loras:
        raise UserError("base_steps: no LoRA is loaded, so all steps are the base's")
    prompts, negatives = read_texts(prompt, negative_prompt)
    if any(negatives) and not (settings.guided or settings.steers_attention):
        warnings.warn(f"negative_prompt is ignored: guidance={settings.guidance:g} does not call for it", stacklevel=4)
    rounds = make_rounds(prompts, negatives, settings, model, batch_size)
    images = np.arange(len(prompts) * settings.num_images)
    shape = (size[0] // factor, size[1] // factor, base.latent_channels)
    start, added = seed_noise(
        model.programs, settings.seed, images // settings.num_images, images % settings.num_images, shape, table
    )
    if latents is not None:
        start = arguments.checked("latents", latents, (len(images), *shape))
    if noise is not None:
        added = arguments.checked("noise", noise, (len(table["alpha"]), len(images), *shape))
    encode = functools.partial(model.encode_images, tiled=settings.tiled)
    return Plan(
        settings=settings,
        table=table,
        latents=start,
        noise=added,
        from_noise=image is None or (mask is not None and settings.strength == 1),
        guides=ImageGuides.of(
            image, mask, len(prompts), size, factor=factor, inpainting=base.is_inpainting, encode=encode
        ),
        controls=Controls.of(
            model.controlnets, control_image, settings.control_scales, settings.guess_mode, len(prompts), size
        ),
        rounds=rounds,
        sections=sections(settings, len(table["alpha"])),
    )


def read_texts(
    prompt: str | Sequence[str], negative_prompt: str | Sequence[str | None] | None
) -> tuple[list[str], list[str | None]]:
    """Prompts, and a negative prompt for each; None where the model's own unconditional stands for it."""
    prompts = arguments.texts("prompt", prompt, str)
    negatives = arguments.texts("negative_prompt", negative_prompt, str, type(None))
    if len(negatives) not in (1, len(prompts)):
        raise UserError(f"negative_prompt: {len(negatives)} given for {len(prompts)} prompts")
    return prompts, negatives * len(prompts) if len(negatives) == 1 else negatives


def make_rounds(
    prompts: Sequence[str],
    negatives: Sequence[str | None],
    settings: CallSettings,
    model: ActiveModel,
    batch_size: int | None,
) -> tuple[Round, ...]:
    """Tokenize the prompts, and cut the images of a call into rounds.

    Args:
        prompts: one text each.
        negatives: one for each prompt, read where guidance, or that of attention, is on.
        settings: the call's.
        model: whose text encoders read them.
        batch_size: images in a round; None for all at once. Rounded up to a multiple of the mesh's devices.
    """
    away = settings.guided or settings.steers_attention
    read = [[one, other or ""] if away else [one] for one, other in zip(prompts, negatives, strict=True)]
    windows: list[int | None] = [None] * len(prompts)
    if settings.long_prompts == "chunk":
        windows = [model.base.prompts.windows(texts) for texts in read]
    else:
        warn_of_cuts(model.base.prompts.cuts(prompts), stacklevel=6)
        cuts = model.base.prompts.cuts([text for _, *others in read for text in others])
        warn_of_cuts(cuts, "negative prompt", stacklevel=6)
    rounds = []
    for number, indices, count in batches(
        [number for number in windows for _ in range(settings.num_images)], batch_size, model.devices
    ):
        owners = indices // settings.num_images
        rounds.append(
            Round(
                indices=indices,
                count=count,
                owners=owners,
                prompts=model.tokenize([prompts[owner] for owner in owners], number),
                negatives=model.tokenize_negatives(
                    [negatives[owner] for owner in owners], number, all_ids=settings.steers_attention
                )
                if away
                else None,
            )
        )
    return tuple(rounds)


def batches(
    windows: Sequence[int | None], size: int | None, devices: int = 1
) -> list[tuple[int | None, np.ndarray, int]]:
    """Cut the images of a call into batches of one size, each of images with equally many windows of text.

    Images of other windows are apart because what a prompt's context ends in depends on their number.

    Args:
        windows: of each image's prompt; None for one reading of what fits.
        size: images in a batch; None is all of equal windows at once.
        devices: how many each batch is split over, of which its size becomes a multiple.

    Returns:
        (windows, image indices, how many of these are wanted) of each batch; the last index is repeated to fill it.
    """
    found = []
    for number in dict.fromkeys(windows):
        indices = np.asarray([index for index, own in enumerate(windows) if own == number])
        step = -(-(size or len(indices)) // devices) * devices
        for part in (indices[start : start + step] for start in range(0, len(indices), step)):
            found.append((number, np.pad(part, (0, step - len(part)), mode="edge"), len(part)))
    return found


def seed_noise(
    programs: Programs,
    seed: int,
    prompts: np.ndarray,
    images: np.ndarray,
    shape: tuple[int, int, int],
    table: dict[str, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Generate a call's noise from its seed.

    Args:
        programs: of which `noise` is used.
        seed: modulo 2^32.
        prompts, images: of each of B images its prompt's index, and its own among the prompt's, (B,).
        shape: of one image's latents, (h, w, C).
        table: the solver's.

    Returns:
        the start (B, h, w, C), and what each step adds (steps, B, h, w, C), zeros where the solver adds none.
    """
    at_step = functools.partial(programs.noise, np.uint32(seed % 2**32), prompts, images, shape=shape)
    start = np.asarray(at_step(np.uint32(0)))
    steps = len(table["alpha"])
    if not injects_noise(table):
        return start, np.zeros((steps, *start.shape), np.float32)
    return start, np.stack([np.asarray(at_step(np.uint32(i))) for i in range(1, steps + 1)])
