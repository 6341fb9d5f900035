"""Steering beyond one guidance scale: negative prompts in attention, and steps that are sampled unlike the others."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from hypersd_jax.errors import UserError
from hypersd_jax.pipeline import arguments

StepRange = tuple[int, int | None]
"""First and last of the steps that a setting is for, counted from 1; None is the last step that there is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steering:
    """Settings that are off by default, when they change and cost nothing.

    Attributes:
        nag_scale: scale of normalised attention guidance (`models.attention_guidance`); 0 and 1 are off.
        nag_tau: bound of the steered features' L1 norm, in norms of the positive prompt's.
        nag_alpha: share of the steered features, 0 to 1.
        guidance_steps: the steps that guidance is for; None is all of them.
        base_steps: the steps that are taken by the base alone, without the LoRAs; None is none of them.
    """

    nag_scale: float = 0.0
    nag_tau: float = 2.5
    nag_alpha: float = 0.25
    guidance_steps: StepRange | None = None
    base_steps: StepRange | None = None

    def __post_init__(self) -> None:
        for name in ("nag_scale", "nag_tau", "nag_alpha"):
            arguments.checked(name, getattr(self, name), ())
        if self.nag_scale < 0:
            raise UserError(f"nag_scale={self.nag_scale:g} is negative")
        if self.nag_tau <= 0:
            raise UserError(f"nag_tau={self.nag_tau:g} must be above 0")
        if not 0 <= self.nag_alpha <= 1:
            raise UserError(f"nag_alpha={self.nag_alpha:g} must be in 0..1")
        for name in ("guidance_steps", "base_steps"):
            object.__setattr__(self, name, _read_range(name, getattr(self, name)))

    @property
    def steers_attention(self) -> bool:
        """Whether attention is steered away from a negative prompt."""
        return self.nag_scale > 1


class Section(NamedTuple):
    """Consecutive steps that are sampled alike.

    Attributes:
        start: index of the first.
        stop: index after the last.
        guided: whether guidance, where it is on, is for them.
        bare: whether the base takes them without the LoRAs.
    """

    start: int
    stop: int
    guided: bool
    bare: bool


def sections(steering: Steering, steps: int) -> tuple[Section, ...]:
    """Cut the steps that are walked into sections, one where nothing differs by step.

    Raises:
        UserError: a setting is for a step that there is not.
    """
    guided = _members("guidance_steps", steering.guidance_steps, steps, default=True)
    bare = _members("base_steps", steering.base_steps, steps, default=False)
    kinds = list(zip(guided, bare, strict=True))
    starts = [i for i in range(steps) if i == 0 or kinds[i] != kinds[i - 1]]
    return tuple(Section(a, b, *kinds[a]) for a, b in zip(starts, [*starts[1:], steps], strict=True))


def written(steps: StepRange | None) -> str | None:
    """Write a range of steps as the command line has it, such as ``1``, ``2-4`` or ``2-``."""
    if steps is None:
        return None
    first, last = steps
    return str(first) if first == last else f"{first}-{'' if last is None else last}"


def _read_range(name: str, given: Any) -> StepRange | None:
    if given is None:
        return None
    first, last = given if isinstance(given, tuple | list) and len(given) == 2 else (None, None)
    if type(first) is not int or type(last) not in (int, type(None)) or first < 1 or (last or first) < first:
        raise UserError(f"{name}={given!r} must be the first and the last step, such as (1, 1) or (2, None)")
    return first, last


def _members(name: str, chosen: StepRange | None, steps: int, *, default: bool) -> list[bool]:
    if chosen is None:
        return [default] * steps
    first, last = chosen
    if (last or first) > steps:
        raise UserError(f"{name}={written(chosen)}, but {steps} step{'s are' if steps > 1 else ' is'} taken")
    return [first <= step <= (last or steps) for step in range(1, steps + 1)]
