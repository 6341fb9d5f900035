"""The settings of an ordinary LoRA: a style or a subject, on the base alone or beside a few-step LoRA."""

from __future__ import annotations

import dataclasses
from typing import Literal

from hypersd_jax.config.fields import derived, outside
from hypersd_jax.config.stage import Sampling, StageConfig

MANY_STEPS = 25


@dataclasses.dataclass(frozen=True, kw_only=True)
class BesideConfig:
    """What keeps a few-step LoRA's speed while another is trained beside it: TSCD's loss of both together.

    Its teacher is the base with the new LoRA alone, guided by the stage's ``guidance``; its student the base with both.
    Only the new one is trained.

    Attributes:
        weight: of the loss, next to the denoising loss of the new LoRA alone.
        k: segments of the solver grid; the steps that both are to be sampled with.
        solver_steps: size N of the solver grid.
    """

    weight: float = 1.0
    k: int = outside(4)
    solver_steps: int = 40

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ValueError(f"weight must be above 0, not {self.weight}")
        if self.k < 1 or self.solver_steps < 1 or self.solver_steps % self.k:
            raise ValueError(f"solver_steps ({self.solver_steps}) must be a multiple of k ({self.k}), both at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraStage(StageConfig):
    """Ordinary training of a LoRA: predict noise, or what the model's prediction type says, in the data's images.

    It has no sampling settings of its own, and its file states none, so that it can be loaded before or after a
    few-step LoRA, whose settings then hold.

    Attributes:
        kind: ``lora``.
        snr_gamma: gamma of min-SNR weighting (arXiv 2303.09556); null: all timesteps alike.
        prompt_dropout: share of examples without their caption, for classifier-free guidance.
        beside: keep the speed of the run's student (``lora.start``, or the stages before), which stays as it is; null:
            train on the base alone.
        guidance: guidance scale of the base with the new LoRA: as the teacher of ``beside``, and where it is sampled.
    """

    kind: Literal["lora"]
    snr_gamma: float | None = 5.0
    prompt_dropout: float = 0.1
    beside: BesideConfig | None = None
    guidance: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.snr_gamma is not None and self.snr_gamma <= 0:
            raise ValueError(f"snr_gamma must be above 0, not {self.snr_gamma}")
        if not 0.0 <= self.prompt_dropout < 1.0:
            raise ValueError(f"prompt_dropout must lie in [0, 1), not {self.prompt_dropout}")
        if self.guidance < 1:
            raise ValueError(f"guidance must be at least 1, which is off, not {self.guidance}")

    @derived
    def guided(self) -> bool:
        """Whether the base with the new LoRA is guided."""
        return self.guidance > 1.0

    @property
    def summary(self) -> str:
        """What it is trained beside."""
        return f"{self.kind} " + ("on the base" if self.beside is None else f"beside {self.beside.k} steps")

    @property
    def grid(self) -> int | None:
        """The solver steps N of ``beside``."""
        return self.beside.solver_steps if self.beside else None

    @property
    def states_sampling(self) -> bool:
        """Only where the file holds a few-step LoRA too."""
        return self.beside is not None

    @property
    def samplings(self) -> tuple[Sampling, ...]:
        """Many guided steps, or the few of both LoRAs together."""
        few = self.beside is not None
        return (
            {
                "steps": self.beside.k if self.beside else MANY_STEPS,
                "sampler": "ddim",
                "eta": 0.0,
                "guidance": 0.0 if few else self.guidance,
                "timesteps": None,
            },
        )
