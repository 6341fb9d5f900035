"""A call of the sampler cut into phases: functions of one device's share of the images, and what they are given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import cycle, islice
from typing import Any, NamedTuple

import jax
import numpy as np

from hypersd_jax.bases import TextToImage
from hypersd_jax.conditioning import Conditioning
from hypersd_jax.diffusion import begin
from hypersd_jax.pipeline import CallSettings, Pipeline, programs
from hypersd_jax.pipeline.active import NegativeIds, TokenIds
from hypersd_jax.pipeline.plan import make_plan
from hypersd_jax.pipeline.settings import resolve_call
from hypersd_jax.pipeline.steering import Steering
from hypersd_jax.sampling_command import EMBEDDED_PROMPTS

TEXT, DENOISE, DECODE = "text", "denoise", "decode"


class Phase(NamedTuple):
    """A part of a call that is one program.

    Attributes:
        function: of one device's share of the batch, or of all of it.
        axes: the batch axis of each argument; None where every device is given all of it. Results have it first.
    """

    function: Callable[..., Any]
    axes: tuple[int | None, ...]


def make_phases(base: TextToImage, settings: CallSettings) -> dict[str, Phase]:
    """Make the phases of text to image from the functions that `pipeline.programs` compiles.

    Args:
        base: the model, without weights.
        settings: of the call; size and prediction type are read.
    """
    size = settings.height, settings.width

    def text(
        params: Any, adapters: Any, tokens: TokenIds, negatives: NegativeIds | None
    ) -> tuple[Conditioning, Conditioning | None]:
        cond = base.with_size(base.encode_prompts(params, tokens, adapters), *size)
        if negatives is None:
            return cond, None
        uncond = cond
        if negatives.ids is not None:
            uncond = base.with_size(base.encode_prompts(params, negatives.ids, adapters), *size)
        return cond, uncond.zeroed(negatives.zeros)

    def denoise(
        params: Any, adapter: Any, scale: Any, table: Any, conditioning: Any, latents: jax.Array, noise: jax.Array
    ) -> jax.Array:
        cond, uncond = conditioning
        state = programs.scan(
            base,
            params,
            adapter,
            cond,
            uncond,
            scale,
            table,
            begin(table, latents),
            noise,
            programs.Guides(),
            (),
            (),
            controlnets=(),
            prompted_only=False,
            prediction_type=settings.prediction_type,
        )
        return state.x

    def decode(params: Any, latents: jax.Array) -> jax.Array:
        return programs.decode(base, params, latents, tiled=False)

    return {
        TEXT: Phase(text, (None, None, 0, 0)),
        DENOISE: Phase(denoise, (None, None, None, None, 0, 0, 1)),
        DECODE: Phase(decode, (None, 0)),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What the phases of one call are given beside weights, on the host.

    Attributes:
        settings: resolved.
        tokens: token ids of B prompts, (B, S) for each text encoder.
        negatives: of their negative prompts; None where guidance is off.
        table: the solver's.
        latents: standard normal (B, h, w, C).
        noise: (n, B, h, w, C), what each of n steps adds.
    """

    settings: CallSettings
    tokens: TokenIds
    negatives: NegativeIds | None
    table: dict[str, np.ndarray]
    latents: np.ndarray
    noise: np.ndarray

    @property
    def steps(self) -> int:
        """Number of sampling steps."""
        return self.settings.steps

    @property
    def batch(self) -> int:
        """Number of images, over all devices."""
        return len(self.latents)


def make_workload(
    pipe: Pipeline,
    *,
    steps: int,
    batch: int,
    sampler: str | None = None,
    guidance: float | None = None,
    size: tuple[int, int] | None = None,
) -> Workload:
    """Lay out a call of ``batch`` prompts, an image each, seed 0, as the pipeline would.

    Args:
        pipe: with its LoRAs, which say how to sample where the arguments do not.
        steps: sampling steps.
        batch: images.
        sampler: see `Pipeline.generate`.
        guidance: see `Pipeline.generate`.
        size: height and width in pixels; None is the model's own.

    Raises:
        UserError: an argument does not suit the model.
    """
    height, width = size or (None, None)
    images: dict[str, Any] = {"image": None, "mask": None, "control_image": None}
    settings = resolve_call(
        pipe.settings(steps=steps, sampler=sampler, guidance=guidance),
        pipe.base,
        (),
        seed=0,
        num_images=1,
        height=height,
        width=width,
        strength=None,
        control_scale=1.0,
        guess_mode=False,
        long_prompts="cut",
        tiled=False,
        steering=Steering(),
        **images,
    )
    plan = make_plan(
        settings,
        pipe.active(),
        prompt=list(islice(cycle(EMBEDDED_PROMPTS), batch)),
        negative_prompt=None,
        latents=None,
        noise=None,
        batch_size=None,
        **images,
    )
    (only,) = plan.rounds
    return Workload(
        settings=settings,
        tokens=only.prompts,
        negatives=only.negatives,
        table=plan.table,
        latents=plan.latents,
        noise=plan.noise,
    )
