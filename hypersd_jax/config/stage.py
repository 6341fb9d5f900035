"""The settings that every kind of stage has, and what a run reads of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal, TypedDict

from hypersd_jax.config.fields import outside, static


class Sampling(TypedDict):
    """The sampling settings of a stage's student; ``guidance`` 0 is off, ``timesteps`` None are the sampler's own."""

    steps: int
    sampler: str
    eta: float
    guidance: float
    timesteps: tuple[int, ...] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
    """The settings of every kind of stage: its length, AdamW's, and the moving average of the weights.

    A kind of stage is a subclass with a ``kind`` of its own. Its instances are arguments of the compiled step too, as
    `config.fields` says.

    Attributes:
        kind: the stage's method.
        name: addresses the stage on the command line, and names its files.
        updates: training steps.
        batch_size: examples a step.
        accumulate: parts that a batch is computed in, one after the other, to save memory.
        learning_rate: AdamW's, after the warm-up.
        warmup: training steps over which the learning rate rises from zero.
        schedule: the learning rate after the warm-up; ``cosine`` and ``linear`` fall to zero at the last step.
        beta1: AdamW's decay of the first moment.
        beta2: AdamW's decay of the second moment.
        weight_decay: AdamW's.
        clip_norm: largest norm of the gradient; larger ones are scaled down to it.
        ema: decay of the moving average of the weights; 0: the weights themselves.
        export: which weights are exported and start the next stage: the moving average, or the raw ones.
        skip: leave the stage out.
    """

    trains_adapter: ClassVar[bool] = True
    """Whether it starts from a frozen model, and not with the model's own weights."""

    kind: str
    name: str = outside()
    updates: int
    batch_size: int = outside()
    accumulate: int = static(1)
    learning_rate: float = 1e-6
    warmup: int = 0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    beta1: float = static(0.9)
    beta2: float = static(0.999)
    weight_decay: float = static(0.0)
    clip_norm: float = static(1.0)
    ema: float = 0.95
    export: Literal["ema", "raw"] = outside("ema")
    skip: bool = outside(False)

    def __post_init__(self) -> None:
        for key in ("updates", "batch_size", "accumulate"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, not {getattr(self, key)}")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be above 0, not {self.learning_rate}")
        if self.warmup < 0 or self.weight_decay < 0:
            raise ValueError("warmup and weight_decay must not be negative")
        if self.clip_norm <= 0:
            raise ValueError(f"clip_norm must be above 0, not {self.clip_norm}")
        if not (0.0 <= self.ema < 1.0 and 0.0 <= self.beta1 < 1.0 and 0.0 <= self.beta2 < 1.0):
            raise ValueError("ema, beta1 and beta2 must lie in [0, 1)")
        if self.name in ("", ".", "..") or set(self.name) & set("/\\ "):
            raise ValueError(f"name {self.name!r} must be a plain file name")

    @property
    def learns_nothing(self) -> str | None:
        """Why a student that starts at the base is there already; None where there is something to learn."""
        return None

    @property
    def summary(self) -> str:
        """A short description for the file of its student."""
        return self.name

    @property
    def reads_images(self) -> bool:
        """Whether it reads images, and not prompts alone."""
        return True

    @property
    def exports_model(self) -> bool:
        """Whether it exports a model, and not an adapter."""
        return not self.trains_adapter

    @property
    def states_sampling(self) -> bool:
        """Whether the file of its student says how to sample with it."""
        return True

    @property
    def teachers(self) -> frozenset[str]:
        """The teachers that it names: earlier stages, or BASE and PREVIOUS."""
        return frozenset()

    @property
    def grid(self) -> int | None:
        """The steps N of the solver grid that its consistency loss runs on; None where it has none."""
        return None

    @property
    def samplings(self) -> tuple[Sampling, ...]:
        """The samplings of its student to compare, the first as in its file; empty where it has no student."""
        return ()

    @property
    def guarded(self) -> Mapping[str, str]:
        """What the measurements of its guards are called, by key of metrics.jsonl; empty where it has none."""
        return {}
