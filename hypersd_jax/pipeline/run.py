"""Run: a plan's rounds through the compiled programs, one after another."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from hypersd_jax.conditioning import Conditioning
from hypersd_jax.diffusion import begin
from hypersd_jax.models.attention_guidance import AttentionGuidance
from hypersd_jax.pipeline.active import ActiveModel
from hypersd_jax.pipeline.plan import Plan, Round
from hypersd_jax.pipeline.settings import CallSettings
from hypersd_jax.weights.placement import host

Callback = Callable[[int, int], None]


def run(plan: Plan, model: ActiveModel, *, decode: bool, stepwise: bool, callback: Callback | None) -> np.ndarray:
    """Sample all rounds of a plan.

    Args:
        plan: of `make_plan`.
        model: the one that it was made with.
        decode: whether to decode the last latents.
        stepwise: run one compiled step at a time; a callback does too.
        callback: called as ``callback(step, steps)`` after each step, counted over all rounds.

    Returns:
        images (N, H, W, 3) in 0..1, or latents (N, h, w, C), in the order of the call.
    """
    progress = None if callback is None else Progress(callback, len(plan.rounds) * len(plan.noise))
    found = []
    with _decoder_ahead(plan, model) if decode else contextlib.nullcontext():
        for each in plan.rounds:
            latents = _sample(plan, each, model, stepwise=stepwise, progress=progress)
            result = model.decode(latents, tiled=plan.settings.tiled) if decode else latents
            if progress is not None:
                progress.finish()
            found.append(host(result))
    return in_order(plan.rounds, found)


@contextlib.contextmanager
def _decoder_ahead(plan: Plan, model: ActiveModel) -> Iterator[None]:
    """Compile the decoder in a thread while the steps are compiled and taken.

    What fails there fails again, and is reported, where the decoder is called.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        shape = len(plan.rounds[0].indices), *plan.latents.shape[1:]
        thread.submit(model.compile_decoder, shape, tiled=plan.settings.tiled)
        yield


def _sample(plan: Plan, each: Round, model: ActiveModel, *, stepwise: bool, progress: Progress | None) -> jax.Array:
    """The last latents (B, h, w, C) of a round."""
    settings, controls = plan.settings, plan.controls
    texts = {
        bare: _read(each, model.bare() if bare else model, settings)
        for bare in dict.fromkeys(section.bare for section in plan.sections)
    }
    own = plan.guides.take(each.owners)
    latents = model.on_mesh(plan.latents[each.indices])
    noise = plan.noise[:, each.indices]
    guides = model.on_mesh(own.for_scan(latents, controls.take(each.owners)))
    state = model.on_mesh(begin(plan.table, latents, None if plan.from_noise else model.on_mesh(own.clean)))
    for section in plan.sections:
        cond, uncond, nag = texts[section.bare]
        guided = settings.guided and section.guided
        size = 1 if stepwise or progress is not None else section.stop - section.start
        for start in range(section.start, section.stop, size):
            table, added = some_steps(plan.table, noise, slice(start, start + size))
            state = model.programs.scan(
                *(model.bare() if section.bare else model).denoiser,
                cond,
                uncond if guided else None,
                np.float32(settings.guidance if section.guided else 1),
                table,
                state,
                model.on_mesh(added, axis=1),
                guides,
                controls.params,
                controls.scales,
                nag,
                controlnets=controls.networks,
                prompted_only=controls.prompted_only and guided,
                prediction_type=settings.prediction_type,
            )
            if progress is not None:
                progress.follow(state.x)
    return state.x


def _read(
    each: Round, model: ActiveModel, settings: CallSettings
) -> tuple[Conditioning, Conditioning | None, AttentionGuidance | None]:
    """Encode the texts of a round: prompts, the unconditional, and what attention is steered away from."""
    size = settings.height, settings.width
    cond = model.condition(each.prompts, size)
    if each.negatives is None:
        return cond, None, None
    negatives, nag = each.negatives, None
    if settings.steers_attention and negatives.ids is not None:
        numbers = (np.float32(value) for value in (settings.nag_scale, settings.nag_tau, settings.nag_alpha))
        nag = AttentionGuidance(model.condition(negatives.ids, size).context, *numbers)
    return cond, model.unconditional(negatives, cond, size) if settings.guided else None, nag


def some_steps(table: Mapping[str, np.ndarray], noise: Any, which: slice) -> tuple[dict[str, np.ndarray], Any]:
    """Cut some steps out of a solver's table, and of what its steps add."""
    return {key: value if value.ndim == 0 else value[which] for key, value in table.items()}, noise[which]


def in_order(rounds: Sequence[Round], results: Sequence[np.ndarray]) -> np.ndarray:
    """Join what the rounds gave, (B, ...) each, in the order of the call's images."""
    indices = np.concatenate([each.indices[: each.count] for each in rounds])
    kept = [images[: each.count] for each, images in zip(rounds, results, strict=True)]
    return np.concatenate(kept)[np.argsort(indices)]


class Progress:
    """Progress of a call, reported to a callback after every finished step.

    A step is waited for once the next one has been handed to the devices, so that they never stand idle between two.
    """

    def __init__(self, callback: Callback, total: int) -> None:
        self._callback = callback
        self._total = total
        self._done = 0
        self._running: jax.Array | None = None

    def follow(self, latents: jax.Array) -> None:
        """Take the result of the step that was just handed over, and report the one before it."""
        before, self._running = self._running, latents
        self._report(before)

    def finish(self) -> None:
        """Report the last step that was handed over."""
        before, self._running = self._running, None
        self._report(before)

    def _report(self, latents: jax.Array | None) -> None:
        if latents is None:
            return
        jax.block_until_ready(latents)
        self._done += 1
        self._callback(self._done, self._total)
