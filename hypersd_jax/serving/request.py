"""What a client may ask for: every field of a message, checked strictly."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image

from hypersd_jax.errors import UserError, shown
from hypersd_jax.serving import wire
from hypersd_jax.serving.limits import Limits
from hypersd_jax.serving.pictures import read_picture

TEXT, IMAGE, INPAINT, CONTROL = "text", "image", "inpaint", "control"
PICTURES = {TEXT: (), IMAGE: ("image",), INPAINT: ("image", "mask"), CONTROL: ("image",)}
"""The pictures that each mode needs, no more and no fewer."""
STUDENT, TEACHER = "student", "teacher"
_MOST_VERSION = 2**53 - 1  # what a page's numbers hold exactly
_MOST_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Offer:
    """What a server has, which a request chooses from.

    Attributes:
        modes: keys of `PICTURES`.
        sizes: images' (height, width) by the name that requests have.
        loras: scales of the loaded LoRAs, by name.
        steps, guidance: where a request says nothing.
    """

    modes: tuple[str, ...]
    sizes: Mapping[str, tuple[int, int]]
    loras: Mapping[str, float]
    steps: int
    guidance: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """An image that a client asks for.

    Attributes:
        version: the client's own number, higher with every request.
        mode: a key of `PICTURES`.
        prompt, negative: texts.
        seed: of the noise.
        steps, guidance: as in `Pipeline.generate`.
        strength: share of the steps that is walked from an image.
        control_scale: how strongly the ControlNet steers.
        size: height and width in pixels.
        loras: the scale of each loaded LoRA.
        compare: whether the base model is to draw the same in its many steps too.
        pictures: by name.
    """

    version: int
    mode: str
    prompt: str
    negative: str
    seed: int
    steps: int
    guidance: float
    strength: float
    control_scale: float
    size: tuple[int, int]
    loras: Mapping[str, float]
    compare: bool
    pictures: Mapping[str, Image.Image]

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance is on."""
        return self.guidance > 1


class Reader:
    """Reads clients' messages.

    Args:
        offer: what they may choose from.
        limits: their bounds.
    """

    def __init__(self, offer: Offer, limits: Limits) -> None:
        self._offer, self._limits = offer, limits
        self._checks = _checks(offer, limits)

    def read(self, message: str | bytes) -> Request:
        """Read a message: a JSON object as text, or one with pictures (`wire.unpack`).

        Raises:
            UserError: one line that names the field at fault.
        """
        most = self._limits.header_bytes
        fields, rest = (
            (wire.read_object(message, most), b"") if isinstance(message, str) else wire.unpack(message, most)
        )
        for name in fields:
            if name not in self._checks and name != "pictures":
                raise UserError(f"{shown(name)} is no field of a request")
        values = {
            name: check(name, fields[name]) if name in fields else default
            for name, (default, check) in self._checks.items()
        }
        for name, value in values.items():
            if value is _REQUIRED:
                raise UserError(f"{name} is missing")
        if values["mode"] in (IMAGE, INPAINT) and int(values["steps"] * values["strength"]) < 1:
            raise UserError(f"strength: {values['strength']:g} of {values['steps']} steps leaves none")
        pictures = self._pictures(values["mode"], fields.get("pictures"), rest)
        loras = {**self._offer.loras, **values.pop("loras")}
        return Request(**values, loras=loras, pictures=pictures)

    def _pictures(self, mode: str, lengths: Any, rest: bytes) -> dict[str, Image.Image]:
        found = wire.split(lengths, rest, PICTURES[mode])
        for name in PICTURES[mode]:
            if name not in found:
                raise UserError(f"pictures.{name} is missing")
        most = self._limits.picture_side
        return {name: read_picture(f"pictures.{name}", data, most) for name, data in found.items()}


_REQUIRED = object()
_Check = Callable[[str, Any], Any]


def _checks(offer: Offer, limits: Limits) -> dict[str, tuple[Any, _Check]]:
    """The default and the check of each field."""
    size = next(iter(offer.sizes))
    return {
        "version": (_REQUIRED, _whole(1, _MOST_VERSION)),
        "mode": (offer.modes[0], _one_of(offer.modes)),
        "prompt": (_REQUIRED, _text(limits.prompt_characters)),
        "negative": ("", _text(limits.prompt_characters)),
        "seed": (0, _whole(0, _MOST_SEED)),
        "steps": (offer.steps, _whole(1, limits.steps)),
        "guidance": (offer.guidance, _number(0, limits.guidance)),
        "strength": (1.0, _number(0, 1)),
        "control_scale": (1.0, _number(0, limits.control_scale)),
        "size": (offer.sizes[size], lambda name, value: offer.sizes[_one_of(tuple(offer.sizes))(name, value)]),
        "loras": ({}, _scales(offer.loras, limits.lora_scale)),
        "compare": (False, _flag),
    }


def _whole(least: int, most: int) -> _Check:
    def check(name: str, value: Any) -> int:
        if type(value) is not int or not least <= value <= most:
            raise UserError(f"{name}: must be a whole number from {least} to {most}")
        return value

    return check


def _number(least: float, most: float) -> _Check:
    def check(name: str, value: Any) -> float:
        # Compared before it is converted: a whole number may be too large for that.
        if type(value) not in (int, float) or not least <= value <= most or not math.isfinite(value):
            raise UserError(f"{name}: must be a number from {least:g} to {most:g}")
        return float(value)

    return check


def _text(most: int) -> _Check:
    def check(name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise UserError(f"{name}: must be text")
        if len(value) > most:
            raise UserError(f"{name}: has {len(value)} characters, more than {most}")
        if any(0xD800 <= ord(letter) < 0xE000 or letter == "\0" for letter in value):
            raise UserError(f"{name}: holds half a character, or none")
        return value

    return check


def _one_of(names: tuple[str, ...]) -> _Check:
    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in names:
            raise UserError(f"{name}: {shown(value)} is not one of {', '.join(names)}")
        return value

    return check


def _scales(loras: Mapping[str, float], most: float) -> _Check:
    scale = _number(-most, most)

    def check(name: str, value: Any) -> dict[str, float]:
        if not isinstance(value, dict):
            raise UserError(f"{name}: must be an object of scales")
        for lora in value:
            if lora not in loras:
                raise UserError(f"{name}: {shown(lora)} is not loaded")
        return {lora: scale(f"{name}.{lora}", each) for lora, each in value.items()}

    return check


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"{name}: must be true or false")
    return value
