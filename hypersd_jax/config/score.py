"""What the stage of score distillation is told, and what any stage with discriminators is."""

from __future__ import annotations

import dataclasses
from typing import Literal

from hypersd_jax.config.stage import StageConfig

LATEST = 999  # of 1000 training times
BASE, PREVIOUS = TEACHERS = ("base", "previous")
"""Teachers that are no stage's name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """Discriminator heads on the features of a frozen UNet (in score distillation: the fake model's), trained alone.

    ``weight`` is that of the student's adversarial term. ``features``: ``encoder`` (blocks down and middle, a head
    each: PCM for SDXL), ``all`` (blocks up too: PCM for SD 1.5), ``mid`` (one head on the middle block: DMD2) or
    ``pair`` (one on the middle blocks of the judged latents and of those that the step started from, side by side:
    SDXL-Lightning, arXiv 2402.13929). ``updates`` counts the heads' updates to one of the student. ``r1_weight`` is
    of the penalty on the discriminator's slope at the real side, taken over a step of ``r1_sigma``.
    """

    weight: float = 0.1
    loss: Literal["hinge", "non_saturating", "least_squares"] = "hinge"
    features: Literal["encoder", "all", "mid", "pair"] = "encoder"
    learning_rate: float = 1e-5
    updates: int = 1
    r1_weight: float = 0.0
    r1_sigma: float = 0.01

    def __post_init__(self) -> None:
        if self.weight < 0 or self.r1_weight < 0:
            raise ValueError("weight and r1_weight must not be negative")
        if self.learning_rate <= 0 or self.r1_sigma <= 0:
            raise ValueError("learning_rate and r1_sigma must be above 0")
        if self.r1_sigma != type(self).r1_sigma and not self.r1_weight:
            raise ValueError("r1_sigma is read only beside an r1_weight above 0")
        if self.updates < 1:
            raise ValueError(f"updates must be at least 1, not {self.updates}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegressionConfig:
    """The MSE between a one-step student and where a many-step model leads from the same noise (Hyper-SD, 3.3).

    ``teacher``: the name of an earlier stage, whose student has absorbed its guidance already; ``previous``, the
    stage's own start; or ``base``, with the stage's guidance. ``steps`` of its DDIM trajectory. ``path_weight`` is
    of the MSE at a second point: the student's own deterministic step has led to a time of ``path_range`` (shares of
    the training times), and from there it is to find the same end, so that more steps correct the first. ``pairs``, a
    multiple of the batch, is how many samples' noise and end are computed once and gone over again, as DMD's are; 0
    computes every update's anew.
    """

    weight: float = 0.25
    path_weight: float = 0.0
    path_range: tuple[float, float] = (0.1, 0.9)
    pairs: int = 0
    teacher: str = "previous"
    steps: int = 8

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ValueError(f"weight must be above 0, not {self.weight}")
        if self.path_weight < 0:
            raise ValueError(f"path_weight must not be negative, not {self.path_weight}")
        low, high = self.path_range
        if not 0.0 <= low < high <= 1.0:
            raise ValueError(f"path_range must be [low, high] with 0 <= low < high <= 1, not [{low}, {high}]")
        if self.path_range != type(self).path_range and not self.path_weight:
            raise ValueError("path_range is read only beside a path_weight above 0")
        if self.pairs < 0:
            raise ValueError(f"pairs must not be negative, not {self.pairs}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnchorConfig:
    """TSCD's loss of one segment, kept on beside score distillation so that the student stays good at more steps.

    ``solver_steps`` is its grid; ``teacher``, of its solver steps, as in `RegressionConfig`.
    """

    weight: float = 1.0
    solver_steps: int = 50
    teacher: str = "base"

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ValueError(f"weight must be above 0, not {self.weight}")
        if self.solver_steps < 1:
            raise ValueError(f"solver_steps must be at least 1, not {self.solver_steps}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreStage(StageConfig):
    """Score distillation (Hyper-SD, arXiv 2404.13686, section 3.3) of the student that the stages before have made.

    ``kind``: ``dmd`` (one of ``times``: arXiv 2311.18828; several: DMD2's few steps, arXiv 2405.14867) or ``tdm``
    (arXiv 2503.06674: the points of the student's deterministic trajectory are matched, each over its own times).
    ``times`` are the student's input times, 999 for a unified LoRA, 800 for Hyper-SD's one-step UNet. ``student``:
    ``lora``, or ``unet`` for the whole UNet with float32 master weights, with what came before merged into it; such a
    stage must be the last. ``guidance`` is the real score's. One update of the student follows ``fake_updates`` of the
    fake-score model, a LoRA of its own that starts at zero; with a ``weight`` of 0 and no adversarial term there is
    none, and the student learns from its regression and its anchor alone. ``time_range`` is what samples are noised to,
    as shares of the training times. ``data_free`` reads prompts alone: the anchor
    then stands on the student's own samples. ``steps`` are the step counts that the student is drawn and compared at,
    with ``sampler`` and ``eta``; empty is the number of ``times``. ``auto`` is lcm for a UNet and for DMD2's few steps,
    which are trained with fresh noise between them, and else tcd.
    """

    kind: Literal["dmd", "tdm"]
    student: Literal["lora", "unet"] = "lora"
    times: tuple[int, ...] = (LATEST,)
    guidance: float = 3.0
    weight: float = 1.0
    time_range: tuple[float, float] = (0.02, 0.98)
    fake_updates: int = 5
    fake_learning_rate: float = 1e-4
    regression: RegressionConfig | None = None
    anchor: AnchorConfig | None = None
    adversarial: AdversarialConfig | None = None
    data_free: bool = False
    steps: tuple[int, ...] = ()
    sampler: Literal["auto", "ddim", "tcd", "lcm"] = "auto"
    eta: float = 0.0

    @property
    def has_fake(self) -> bool:
        """Whether a fake-score model is trained beside the student."""
        return self.weight > 0 or self.adversarial is not None

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.time_range
        if not 0.0 <= low < high <= 1.0:
            raise ValueError(f"time_range must be [low, high] with 0 <= low < high <= 1, not [{low}, {high}]")
        if not self.times or any(later >= earlier for earlier, later in zip(self.times, self.times[1:], strict=False)):
            raise ValueError(f"times must fall, not {list(self.times)}")
        if self.times[-1] < 1:
            raise ValueError(f"times must be at least 1, not {self.times[-1]}")
        if not self.steps:
            object.__setattr__(self, "steps", (len(self.times),))
        if self.kind == "tdm" and len(self.times) > 1 and self.times[1] > round(high * LATEST):
            raise ValueError("times: only the first may lie above time_range, to whose times samples are noised on")
        if min(self.steps) < 1:
            raise ValueError(f"steps must be counts of at least 1, not {list(self.steps)}")
        if self.weight < 0:
            raise ValueError(f"weight must not be negative, not {self.weight}")
        if self.guidance < 1:
            raise ValueError(f"guidance must be at least 1, which is off, not {self.guidance}")
        if self.weight == 0 and not (self.regression or self.anchor or self.adversarial):
            raise ValueError("weight=0 leaves nothing to train on")
        if self.fake_updates < 1 or self.fake_learning_rate <= 0:
            raise ValueError("fake_updates must be at least 1 and fake_learning_rate above 0")
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"eta must lie in 0..1, not {self.eta}")
        if self.regression and len(self.times) > 1:
            raise ValueError("regression is of a one-step student; times must be one")
        if self.regression and self.regression.pairs % self.batch_size:
            raise ValueError(f"regression.pairs must be a multiple of batch_size={self.batch_size}")
        if self.regression and self.regression.pairs > self.updates * self.batch_size:
            raise ValueError("regression.pairs: more than the stage's updates come to")
        if self.adversarial and self.adversarial.features == "pair":
            raise ValueError("adversarial.features=pair is of consistency stages; here: mid, encoder or all")
        if self.adversarial and self.adversarial.updates != 1:
            raise ValueError("adversarial.updates: here the heads are trained with the fake model (fake_updates)")
        if self.data_free and self.adversarial:
            raise ValueError("data_free: an adversarial term needs pictures")
        if self.sampler == "auto":  # settled here, so that the run's record says which
            fresh = self.kind == "dmd" and len(self.times) > 1
            object.__setattr__(self, "sampler", "lcm" if self.student == "unet" or fresh else "tcd")
        if self.kind == "tdm" and self.student == "unet":
            raise ValueError("kind=tdm: its steps are deterministic, and a UNet's are drawn with lcm")
        if self.student == "unet" and (self.sampler != "lcm" or self.steps != (len(self.times),)):
            raise ValueError("student=unet is drawn with lcm at its own times: steps must be their number")
