"""The settings of consistency distillation."""

from __future__ import annotations

import dataclasses
from typing import Literal

from hypersd_jax.config.adversarial import AdversarialConfig
from hypersd_jax.config.fields import derived, outside, static
from hypersd_jax.config.stage import Sampling, StageConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConsistencyStage(StageConfig):
    """Trajectory-segmented consistency distillation (arXiv 2404.13686, Algorithm 1), or a baseline of it.

    Attributes:
        kind: ``tscd``; ``tcd`` (arXiv 2402.19159): one segment from the start; ``lcm`` (arXiv 2310.04378): a loss
            between two estimates of x_0; ``pcm`` (arXiv 2405.18407): the target timestep is always the segment
            boundary.
        k: number of segments; 1 for ``tcd`` and ``lcm``.
        solver_steps: size N of the teacher's DDIM grid.
        guidance: range of the teacher's guidance scale, in diffusers' convention. [1, 1] leaves the teacher unguided,
            at half the calls.
        teacher: whose solver step is learned: the guided base's, or the previous stage's student's.
        distance: between the student's side and the target's.
        huber_c: the constant of ``pseudo_huber``.
        distance_weight: of the distance, next to ``adversarial.weight`` (section 3.1).
        adversarial: the adversarial term; null: none.
        offset_noise: strength of the offset noise (noise perturbation).
        prompt_dropout: share of empty prompts. With guidance [1, 1] the student then keeps reacting to guidance and
            negative prompts (PCM's ``not_apply_cfg_solver``; Hyper-SD's later CFG LoRAs).
        sampler: solver in the header of the exported file; ``auto``: ddim for ``tscd`` and ``pcm``, else the method's
            own.
        eta: eta in the header of the exported file.
        sample_guidance: guidance scale in the header of the exported file.
    """

    kind: Literal["tscd", "tcd", "lcm", "pcm"] = "tscd"
    k: int
    solver_steps: int = 40
    guidance: tuple[float, float] = (3.0, 8.0)
    teacher: Literal["base", "previous"] = outside("base")
    distance: Literal["mse", "pseudo_huber"] = "mse"
    huber_c: float = static(0.001)
    distance_weight: float = 1.0
    adversarial: AdversarialConfig | None = None
    offset_noise: float = 0.0
    prompt_dropout: float = 0.0
    sampler: Literal["auto", "ddim", "tcd", "lcm"] = outside("auto")
    eta: float = outside(0.0)
    sample_guidance: float = outside(0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("k", "solver_steps"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, not {getattr(self, key)}")
        if self.kind in ("tcd", "lcm") and self.k != 1:
            raise ValueError(f"k must be 1 for kind={self.kind}, which has no segments, not {self.k}")
        if self.solver_steps % self.k:
            raise ValueError(f"solver_steps ({self.solver_steps}) must be a multiple of k ({self.k})")
        if self.offset_noise < 0:
            raise ValueError(f"offset_noise must not be negative, not {self.offset_noise}")
        if self.distance_weight < 0 or (self.distance_weight != 1.0 and not self.adversarial):
            raise ValueError("distance_weight must not be negative, and is 1 where there is no adversarial term")
        if self.adversarial and self.kind == "lcm":
            raise ValueError("adversarial: kind=lcm compares clean estimates and has no segment for a discriminator")
        if not 0.0 <= self.prompt_dropout < 1.0:
            raise ValueError(f"prompt_dropout must lie in [0, 1), not {self.prompt_dropout}")
        if self.sample_guidance < 0:
            raise ValueError(f"sample_guidance must not be negative, not {self.sample_guidance}")
        if self.huber_c <= 0:
            raise ValueError(f"huber_c must be above 0, not {self.huber_c}")
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"eta must lie in 0..1, not {self.eta}")
        low, high = self.guidance
        if low > high or low < 1:
            raise ValueError(f"guidance must be a range [low, high] with 1 <= low <= high, not [{low}, {high}]")
        if self.sampler == "auto":  # settled here, so that the run's record says which
            object.__setattr__(self, "sampler", {"tcd": "tcd", "lcm": "lcm"}.get(self.kind, "ddim"))

    @derived
    def guided(self) -> bool:
        """Whether the base, as a teacher, is guided."""
        return self.guidance != (1.0, 1.0)

    @derived
    def drops(self) -> bool:
        """Whether some samples lose their prompt."""
        return self.prompt_dropout > 0

    @property
    def learns_nothing(self) -> str | None:
        """Why an unguided teacher with N = k teaches nothing: t_end is t_{n-1}, which the student's step reaches."""
        if self.kind == "lcm" or self.solver_steps != self.k or self.guided:
            return None
        return (
            "with guidance [1, 1] and solver_steps = k the base takes the teacher's step already, and there is nothing "
            f"to learn; solver_steps must be above {self.k}"
        )

    @property
    def summary(self) -> str:
        """The method and its number of segments."""
        return f"{self.kind} k={self.k}"

    @property
    def grid(self) -> int:
        """The teacher's solver steps N."""
        return self.solver_steps

    @property
    def samplings(self) -> tuple[Sampling, ...]:
        """One sampling step for each segment."""
        return (
            {
                "steps": self.k,
                "sampler": self.sampler,
                "eta": self.eta,
                "guidance": self.sample_guidance,
                "timesteps": None,
            },
        )
