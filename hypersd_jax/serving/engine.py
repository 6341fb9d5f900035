"""What draws: the student with its LoRAs, and the teacher, which is the base alone, on the same weights."""

from __future__ import annotations

import dataclasses
import functools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from hypersd_jax.errors import UserError
from hypersd_jax.pipeline import CallSettings, Pipeline, to_pil
from hypersd_jax.pipeline.arguments import NotFiniteWarning, about_not_finite, not_finite
from hypersd_jax.pipeline.model import Generated
from hypersd_jax.png_text import UsedLora, parameters_text, png_bytes
from hypersd_jax.serving.request import CONTROL, INPAINT, PICTURES, STUDENT, TEACHER, TEXT, Offer, Request

_GREY = 128


def _always() -> bool:
    return True


class Abandoned(Exception):
    """Nobody waits any more for what is being drawn."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Names:
    """What a picture's text says of where it comes from; none is a path.

    Attributes:
        model, vae, controlnet: see `png_text.name_of`; None where there is none.
        hashes: `png_text.lora_hash` of each LoRA, by its name on the page.
    """

    model: str
    vae: str | None
    controlnet: str | None
    hashes: Mapping[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    """An image of a request.

    Attributes:
        request: what was asked for.
        role: who drew it.
        image: (H, W, 3) in 0..1.
        settings: what it was sampled with.
        seconds: from the prompt to the pixels.
        notes: what the reader of the prompt warned of, one line each.
        text: for its PNG.
    """

    request: Request
    role: str
    image: np.ndarray
    settings: CallSettings
    seconds: float
    notes: tuple[str, ...]
    text: str

    @property
    def calls(self) -> int:
        """Evaluations of the denoiser, of which guidance needs two a step, and an image's strength leaves some out."""
        settings = self.settings
        return int(settings.steps * settings.strength) * (2 if settings.guided else 1)

    def png(self) -> bytes:
        """The image as a PNG file, with its parameters inside."""
        return png_bytes(to_pil(self.image[None])[0], self.text)


class Engine:
    """The pipelines of a server; used by one thread at a time.

    Args:
        student: with its LoRAs, by the names of the page, and without a ControlNet.
        controlled: the same with the ControlNet; None without one.
        how: sampler, spacing, eta and preset of the student's calls, as `Pipeline.generate` has them.
        names: for the text of the pictures.
        teacher_guidance: of the teacher's calls; None is the base's own.
    """

    def __init__(
        self,
        student: Pipeline,
        controlled: Pipeline | None,
        *,
        how: Mapping[str, Any],
        names: Names,
        teacher_guidance: float | None = None,
    ) -> None:
        self._names, self._how = names, how
        bare = student.beside()
        self._pipes = {(STUDENT, False): student, (TEACHER, False): bare}
        if controlled is not None:
            self._pipes |= {(STUDENT, True): controlled, (TEACHER, True): controlled.beside(controlnets=True)}
        self._scales: dict[str, float] = {}
        own = bare.settings(guidance=teacher_guidance)
        self.teacher: dict[str, Any] = {"steps": own.steps, "guidance": own.guidance, "sampler": own.sampler}

    @functools.cached_property
    def modes(self) -> tuple[str, ...]:
        """What can be asked for: an inpainting model can do nothing else."""
        if self._pipes[STUDENT, False].base.is_inpainting:
            return (INPAINT,)
        return tuple(mode for mode in PICTURES if mode != CONTROL or (STUDENT, True) in self._pipes)

    def draw(self, request: Request, role: str = STUDENT, *, wanted: Callable[[], bool] = _always) -> Drawn:
        """Draw a request.

        Args:
            request: checked.
            role: `STUDENT`, or `TEACHER`: the base in its own steps and guidance.
            wanted: asked after every step whether to go on.

        Raises:
            Abandoned: it was not wanted any more.
            UserError: the model cannot draw this, or what it drew is not finite.
        """
        how = {**self._how, "steps": request.steps, "guidance": request.guidance}
        return self._draw(request, role, how if role == STUDENT else self.teacher, wanted)

    def warm_up(self, offer: Offer) -> Iterator[str]:
        """Compile all that requests of an offer run, two programs at a time; yields what is ready, to be shown."""
        plan = [(probe, role) for probe in probes(offer) for role in (STUDENT, TEACHER)]
        # A teacher's guidance is its own, so that half of its programs are never run.
        plan = [
            (probe, role) for probe, role in plan if role == STUDENT or probe.guided == (self.teacher["guidance"] > 1)
        ]
        # The filters of warnings are the process's: they are set here, where one thread runs.
        with warnings.catch_warnings(), ThreadPoolExecutor(max_workers=2) as threads:
            warnings.simplefilter("ignore")
            for number, done in enumerate(threads.map(lambda each: self._probe(*each), plan), 1):
                yield f"{number} of {len(plan)}: {done}"
        first = plan[0][0]
        for change in (0.5, 0.0):  # joining LoRAs anew runs small programs too
            loras = {name: scale - change for name, scale in offer.loras.items()}
            self.draw(dataclasses.replace(first, loras=loras))

    def _probe(self, probe: Request, role: str) -> str:
        how = {**(self._how if role == STUDENT else self.teacher), "steps": probe.steps}
        if role == STUDENT:
            how["guidance"] = probe.guidance
        self._generate(probe, role, how, _always)
        return f"{probe.size[1]}x{probe.size[0]}, {probe.mode}, {role}{', guided' if probe.guided else ''}"

    def _draw(self, request: Request, role: str, how: Mapping[str, Any], wanted: Callable[[], bool]) -> Drawn:
        begin = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", NotFiniteWarning)  # an error here, see below
            images, settings = self._generate(request, role, how, wanted)
        seconds = time.perf_counter() - begin
        if not_finite(images):
            raise UserError(about_not_finite([0], 1, self._pipes[role, False].dtype))
        return Drawn(
            request=request,
            role=role,
            image=images[0],
            settings=settings,
            seconds=seconds,
            notes=tuple(str(each.message) for each in caught if issubclass(each.category, UserWarning)),
            text=self._text(request, role, settings),
        )

    def _generate(self, request: Request, role: str, how: Mapping[str, Any], wanted: Callable[[], bool]) -> Generated:
        if role == STUDENT:
            self._set_scales(request.loras)

        def ask(_step: int, _steps: int) -> None:
            if not wanted():
                raise Abandoned

        return self._pipes[role, request.mode == CONTROL].generate(
            request.prompt,
            request.negative or None if how["guidance"] > 1 else None,
            seed=request.seed,
            height=request.size[0],
            width=request.size[1],
            callback=ask,
            output="np",
            **self._pictures(request),
            **how,
        )

    def _pictures(self, request: Request) -> dict[str, Any]:
        if request.mode == TEXT:
            return {}
        if request.mode == CONTROL:
            return {"control_image": request.pictures["image"], "control_scale": request.control_scale}
        return {"strength": request.strength, **request.pictures}

    def _set_scales(self, scales: Mapping[str, float]) -> None:
        """Change those that are others than before: joining LoRAs anew takes a while."""
        for name, scale in scales.items():
            if self._scales.get(name) != scale:
                for (role, _), pipe in self._pipes.items():
                    if role == STUDENT:
                        pipe.set_lora_scale(name, scale)
                self._scales[name] = scale

    def _text(self, request: Request, role: str, settings: CallSettings) -> str:
        names = self._names
        loras = [
            UsedLora(name=name, scale=scale, hash=names.hashes[name])
            for name, scale in (request.loras.items() if role == STUDENT else ())
        ]
        steered = request.mode == CONTROL
        from_image = request.mode not in (TEXT, CONTROL)
        more = {
            "VAE": names.vae,
            "Denoising strength": f"{settings.strength:g}" if from_image else None,
            "ControlNet 0": f"Model: {names.controlnet}, Weight: {request.control_scale:g}" if steered else None,
        }
        return parameters_text(
            request.prompt, settings, model=names.model, negative=request.negative or None, loras=loras, more=more
        )


def probes(offer: Offer) -> Iterator[Request]:
    """Requests that run every program that requests of this offer run."""
    for height, width in offer.sizes.values():
        grey = Image.new("RGB", (width, height), (_GREY, _GREY, _GREY))
        half = Image.new("L", (width, height))
        half.paste(255, (0, 0, width, height // 2))
        for mode in offer.modes:
            for guidance in (1.0, 2.0):
                for strength in (1.0, 0.5) if "mask" in PICTURES[mode] else (1.0,):
                    yield Request(
                        version=1,
                        mode=mode,
                        prompt="a",
                        negative="b",
                        seed=1,
                        steps=2,
                        guidance=guidance,
                        strength=strength,
                        control_scale=1.0,
                        size=(height, width),
                        loras=offer.loras,
                        compare=False,
                        pictures={name: half if name == "mask" else grey for name in PICTURES[mode]},
                    )
