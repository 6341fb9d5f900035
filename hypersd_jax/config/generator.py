"""The settings of the stages that train a student on its own samples: score distillation, and regression alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from hypersd_jax.config.adversarial import AdversarialConfig
from hypersd_jax.config.feedback import FeedbackConfig
from hypersd_jax.config.fields import derived, outside, static
from hypersd_jax.config.stage import Sampling, StageConfig

LATEST = 999  # of 1000 training times
BASE, PREVIOUS = TEACHERS = ("base", "previous")
"""Teachers that are no stage's name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegressionConfig:
    """The MSE between a one-step student and the end of a many-step model's ODE rollout from the same noise.

    Hyper-SD, arXiv 2404.13686, section 3.3.

    Attributes:
        weight: of the regression, next to the matching loss.
        path_weight: of the MSE at a second point, which the student's own deterministic step has reached: from there it
            is to find the same endpoint, so that more steps correct the first.
        path_range: where that second point lies, as shares of the training timesteps.
        pairs: how many ODE pairs are computed once and reused, as DMD's are, a multiple of the batch; 0
            computes every step's anew.
        teacher: an earlier stage by name, whose student has absorbed its guidance; ``previous``, the stage's own start;
            or ``base``, with the stage's guidance.
        steps: of its DDIM trajectory.
    """

    weight: float = 0.25
    path_weight: float = 0.0
    path_range: tuple[float, float] = (0.1, 0.9)
    pairs: int = outside(0)
    teacher: str = outside("previous")
    steps: int = static(8)

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ValueError(f"weight must be above 0, not {self.weight}")
        if self.path_weight < 0:
            raise ValueError(f"path_weight must not be negative, not {self.path_weight}")
        low, high = self.path_range
        if not 0.0 <= low < high <= 1.0:
            raise ValueError(f"path_range must be [low, high] with 0 <= low < high <= 1, not [{low}, {high}]")
        if self.path_range != type(self).path_range and not self.path_weight:
            raise ValueError("path_range is read only with a path_weight above 0")
        if self.pairs < 0:
            raise ValueError(f"pairs must not be negative, not {self.pairs}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")

    @derived
    def from_base(self) -> bool:
        """Whether its teacher is the base, with the stage's guidance."""
        return self.teacher == BASE

    @derived
    def follows_path(self) -> bool:
        """Whether there is a second point."""
        return self.path_weight > 0

    @derived
    def paired(self) -> bool:
        """Whether the batches hold ODE pairs of noise and endpoint."""
        return self.pairs > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegulariserConfig:
    """The consistency regulariser: TSCD's loss, next to score distillation's or feedback's.

    It keeps the student good at more steps, and near the teacher.

    Attributes:
        weight: of the consistency regulariser, next to the stage's own loss.
        solver_steps: size of its grid.
        k: its segments: as many as the student has steps that it is to keep.
        teacher: of its solver steps, as in `RegressionConfig`.
    """

    weight: float = 1.0
    solver_steps: int = 50
    k: int = outside(1)
    teacher: str = outside("base")

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ValueError(f"weight must be above 0, not {self.weight}")
        if self.solver_steps < 1:
            raise ValueError(f"solver_steps must be at least 1, not {self.solver_steps}")
        if self.k < 1 or self.solver_steps % self.k:
            raise ValueError(f"solver_steps ({self.solver_steps}) must be a multiple of k ({self.k})")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratorStage(StageConfig):
    """The settings of a student that is trained on its own samples, which score distillation and regression share.

    Attributes:
        student: ``lora``, or ``unet``: full fine-tuning with float32 master weights, earlier LoRAs merged. Such a stage
            must be the last.
        times: the student's input timesteps: 999 for a unified LoRA, 800 for Hyper-SD's one-step UNet.
        guidance: guidance scale of the base, where the base is a teacher.
        regression: the regression to a many-step model; null: none.
        anchor: the consistency regulariser; null: none.
        data_free: read prompts alone; the consistency regulariser then uses the student's own samples.
        steps: step counts at which the student is sampled and compared; empty: the number of ``times``.
        sampler: solver in the header of the exported file; ``auto``: lcm for a UNet and for DMD2's few steps, else tcd.
        eta: eta in the header of the exported file.
    """

    student: Literal["lora", "unet"] = "lora"
    times: tuple[int, ...] = (LATEST,)
    guidance: float = 3.0
    regression: RegressionConfig | None = None
    anchor: RegulariserConfig | None = None
    data_free: bool = False
    steps: tuple[int, ...] = outside(())
    sampler: Literal["auto", "ddim", "tcd", "lcm"] = outside("auto")
    eta: float = outside(0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.times or any(later >= earlier for earlier, later in zip(self.times, self.times[1:], strict=False)):
            raise ValueError(f"times must fall, not {list(self.times)}")
        if self.times[-1] < 1:
            raise ValueError(f"times must be at least 1, not {self.times[-1]}")
        if not self.steps:
            object.__setattr__(self, "steps", (len(self.times),))
        if min(self.steps) < 1:
            raise ValueError(f"steps must be counts of at least 1, not {list(self.steps)}")
        if self.guidance < 1:
            raise ValueError(f"guidance must be at least 1, which is off, not {self.guidance}")
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"eta must lie in 0..1, not {self.eta}")
        if self.regression and len(self.times) > 1:
            raise ValueError("regression is of a one-step student; times must be one")
        if self.regression and self.regression.pairs % self.batch_size:
            raise ValueError(f"regression.pairs must be a multiple of batch_size={self.batch_size}")
        if self.regression and self.regression.pairs > self.updates * self.batch_size:
            raise ValueError("regression.pairs: more than the stage's updates come to")
        if self.sampler == "auto":  # settled here, so that the run's record says which
            object.__setattr__(self, "sampler", "lcm" if self.exports_model or self.noises_afresh else "tcd")
        if self.exports_model and (self.sampler != "lcm" or self.steps != (len(self.times),)):
            raise ValueError("student=unet is sampled with lcm at its own times: steps must be their number")

    @property
    def noises_afresh(self) -> bool:
        """Whether the student is trained with fresh noise between several steps."""
        return len(self.times) > 1

    @derived
    def deterministic(self) -> bool:
        """Whether the student's steps follow its deterministic trajectory, and not fresh noise."""
        return False

    @derived
    def gradient_steps(self) -> int:
        """How many of its last steps may carry the gradient; one is chosen at random."""
        return len(self.times)

    @derived
    def guided(self) -> bool:
        """Whether the base, as a teacher, is guided."""
        return self.guidance > 1.0

    @property
    def summary(self) -> str:
        """Method and times."""
        return f"{self.kind} times={list(self.times)}"

    @property
    def reads_images(self) -> bool:
        """Unless it is data-free."""
        return not self.data_free

    @property
    def exports_model(self) -> bool:
        """Whether all weights of the UNet are trained, in place of a LoRA."""
        return self.student == "unet"

    @property
    def teachers(self) -> frozenset[str]:
        """The teachers of the regression and the consistency regulariser."""
        return frozenset(settings.teacher for settings in (self.regression, self.anchor) if settings)

    @property
    def grid(self) -> int | None:
        """The consistency regulariser's solver steps N; None without it."""
        return self.anchor.solver_steps if self.anchor else None

    @property
    def samplings(self) -> tuple[Sampling, ...]:
        """Unguided; as many steps as the student was trained with are taken at its own times."""
        return tuple(
            {
                "steps": steps,
                "sampler": self.sampler,
                "eta": self.eta,
                "guidance": 0.0,
                "timesteps": self.times if steps == len(self.times) else None,
            }
            for steps in self.steps
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreStage(GeneratorStage):
    """Score distillation (arXiv 2404.13686, section 3.3) of the student that the stages before have made.

    Attributes:
        kind: ``dmd``: DMD (arXiv 2311.18828) with one of ``times``, DMD2 (arXiv 2405.14867) with several; ``tdm``
            (arXiv 2503.06674): the points of the student's deterministic trajectory, each over its own timesteps.
        weight: of the matching loss; 0 leaves the adversarial term alone.
        time_range: timesteps that samples are noised to, as shares of the training timesteps.
        fake_updates: steps of the fake score model, a LoRA of its own, for one of the student.
        fake_learning_rate: the fake score model's learning rate.
        adversarial: the adversarial term (DMD2); null: none.
        feedback: rewards that the student's samples are to reach, as a term of its loss; null: none.
    """

    kind: Literal["dmd", "tdm"]
    weight: float = 1.0
    time_range: tuple[float, float] = (0.02, 0.98)
    fake_updates: int = static(5)
    fake_learning_rate: float = 1e-4
    adversarial: AdversarialConfig | None = None
    feedback: FeedbackConfig | None = None

    def __post_init__(self) -> None:
        low, high = self.time_range
        if not 0.0 <= low < high <= 1.0:
            raise ValueError(f"time_range must be [low, high] with 0 <= low < high <= 1, not [{low}, {high}]")
        if self.weight < 0:
            raise ValueError(f"weight must not be negative, not {self.weight}")
        if self.weight == 0 and not self.adversarial:
            raise ValueError("weight=0 leaves nothing to match; without the score term the stage is kind=regression")
        super().__post_init__()
        if self.kind == "tdm" and len(self.times) > 1 and self.times[1] > round(high * LATEST):
            raise ValueError("times: only the first may lie above time_range, to whose times samples are noised on")
        if self.fake_updates < 1 or self.fake_learning_rate <= 0:
            raise ValueError("fake_updates must be at least 1 and fake_learning_rate above 0")
        if self.adversarial and self.adversarial.features == "pair":
            raise ValueError("adversarial.features=pair is of consistency stages; here: mid, encoder or all")
        if self.adversarial and self.adversarial.updates != 1:
            raise ValueError("adversarial.updates: here the heads are trained with the fake model (fake_updates)")
        if self.data_free and self.adversarial:
            raise ValueError("data_free: an adversarial term needs images")
        if self.kind == "tdm" and self.student == "unet":
            raise ValueError("kind=tdm: its steps are deterministic, and a UNet's are sampled with lcm")

    @property
    def guarded(self) -> Mapping[str, str]:
        """Those of its feedback."""
        return self.feedback.guarded if self.feedback else {}

    @property
    def noises_afresh(self) -> bool:
        """DMD2's steps, unlike TDM's."""
        return self.kind == "dmd" and len(self.times) > 1

    @derived
    def deterministic(self) -> bool:
        """TDM's steps, unlike DMD2's."""
        return self.kind == "tdm"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegressionStage(GeneratorStage):
    """Regression to a many-step teacher's endpoints, the consistency regulariser, or both, without any score.

    Attributes:
        kind: ``regression``.
    """

    kind: Literal["regression"]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.regression or self.anchor):
            raise ValueError("regression or anchor is needed: without them there is nothing to train on")
