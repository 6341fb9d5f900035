"""A run, as typed configuration."""

from __future__ import annotations

import dataclasses
from typing import Literal

from hypersd_jax.config.building import PathText
from hypersd_jax.config.data import DataConfig
from hypersd_jax.config.distributed import DistributedConfig
from hypersd_jax.config.generator import TEACHERS
from hypersd_jax.config.stage import StageConfig
from hypersd_jax.paths import expanded


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base model.

    Attributes:
        source: a diffusers folder, a single file or a hub id (docs/files.md), or ``embedded``.
        fresh: parts (``vae``, ``unet``, ``text_encoder``) that start from random weights; each needs its configuration.
        dtype: of the arithmetic and the frozen weights; ``auto``: bfloat16 on TPU and GPU, float32 on CPU.
        remat: recompute activations in the backward pass: less memory, more time.
    """

    source: PathText = "embedded"
    fresh: tuple[str, ...] = ()
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    remat: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", expanded(self.source))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The student's adapter on the UNet.

    Attributes:
        rank: of every adapted module.
        alpha: the scale is alpha / rank; null: alpha = rank, scale 1.
        start: the LoRA that the first stage starts from, a file or a hub id; null: a new one. Rank and alpha are then
            of the modules alone that it does not adapt.
    """

    rank: int = 64
    alpha: float | None = None
    start: PathText | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(f"alpha must be above 0, not {self.alpha}")
        if self.start is not None:
            object.__setattr__(self, "start", expanded(self.start))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along the two axes.

    Attributes:
        data: devices that share the batch; null: all that ``fsdp`` leaves.
        fsdp: devices that also split the weights; ``auto``: the fewest with which weights and training state take half
            of a device's memory or less, up to 8 and a divisor of the devices there are; 8 where it is not known.
    """

    data: int | None = None
    fsdp: int | Literal["auto"] = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """The logs, previews and checkpoints of a run.

    Attributes:
        every: training steps from one line of ``metrics.jsonl`` to the next.
        sample_every: training steps between preview grids; 0: one at the end of each stage.
        checkpoint_every: training steps between checkpoints.
        checkpoint_minutes: minutes after which a checkpoint is saved in any case; 0: never for that reason.
        stop_after_skipped: steps in a row without a finite loss and gradient after which the run ends (half of the
            stage where that is fewer).
        tensorboard: write ``tensorboard/`` as well.
        compilation_cache: keep compiled programs for later runs.
    """

    every: int = 1
    sample_every: int = 0
    checkpoint_every: int = 200
    checkpoint_minutes: float = 10.0
    stop_after_skipped: int = 20
    tensorboard: bool = True
    compilation_cache: bool = True

    def __post_init__(self) -> None:
        if self.every < 1 or self.checkpoint_every < 1 or self.sample_every < 0:
            raise ValueError("every and checkpoint_every must be at least 1, sample_every at least 0")
        if self.checkpoint_minutes < 0 or self.stop_after_skipped < 1:
            raise ValueError("checkpoint_minutes must be at least 0, stop_after_skipped at least 1")


EMBEDDED_GUIDANCE = 4.0
"""The many-step guidance of the embedded model, and of one trained on the embedded images."""

EMBEDDED_SAMPLES, OWN_SAMPLES = 256, 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The comparison of students and teacher after the last stage.

    It is on held-out captions of the embedded images, or on the first captions of a dataset of one's own, several seeds
    each.

    Attributes:
        samples: of each student and of the teacher; 0 leaves the comparison out; null: 256 on the embedded images, else
            16.
        guidance: the teacher's guidance scale; null: 4 with the embedded model or images, else the model's own (7.5,
            SDXL 5).
        batch_size: of all samples that are generated while and after training.
    """

    samples: int | None = None
    guidance: float | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        if (self.samples or 0) < 0 or self.batch_size < 1:
            raise ValueError("samples must be at least 0 and batch_size at least 1")
        if self.guidance is not None and not 0 <= self.guidance < float("inf"):
            raise ValueError(f"guidance must not be negative, not {self.guidance}")
        if self.samples in (1, 2):
            raise ValueError(f"samples must be 0, or at least 3, which KID needs, not {self.samples}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The settings of a run.

    Attributes:
        output_dir: the folder that the run writes to.
        reuse: the folder of another run, whose first stages are reused as far as all that made them is the same.
        seed: seed of every random stream of the run.
        model: the base model.
        data: the dataset.
        lora: the student's adapter.
        stages: trained in order, each from the student of the one before.
        mesh: how the devices share the work.
        distributed: the processes of a run on several hosts.
        log: what is written while training.
        evaluation: the comparison after training.
    """

    output_dir: str
    reuse: str | None = None
    seed: int = 0
    model: ModelConfig = ModelConfig()
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    lora: LoraConfig = LoraConfig()
    stages: tuple[StageConfig, ...]
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    log: LogConfig = LogConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self) -> None:
        object.__setattr__(self, "output_dir", expanded(self.output_dir))
        if self.reuse is not None:
            object.__setattr__(self, "reuse", expanded(self.reuse))
        if not self.stages:
            raise ValueError("stages must name at least one stage")
        names = [stage.name for stage in self.stages]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"stages: the name {name!r} is used twice")
            if name in TEACHERS:
                raise ValueError(f"stages: the name {name!r} is a teacher's already")
        if self.evaluation.guidance is None and (self.on_emoji or self.model.source == "embedded"):
            settled = dataclasses.replace(self.evaluation, guidance=EMBEDDED_GUIDANCE)  # so that the record says it
            object.__setattr__(self, "evaluation", settled)
        if len({stage.trains_adapter for stage in self.stages}) > 1:
            raise ValueError("stages: those that train an adapter and those that train a model cannot share a run")
        if not self.active_stages:
            raise ValueError("stages: all of them are skipped")
        if self.adapter_stages and self.model.fresh:
            raise ValueError("model.fresh: stages that train an adapter need a complete model")
        if self.reuse is not None and not self.adapter_stages:
            raise ValueError("reuse: only stages that start from a complete model are reused")
        first = self.active_stages[0]
        if self.lora.start is None and (reason := first.learns_nothing):
            raise ValueError(f"stages.{first.name}: {reason}")
        for stage in self.adapter_stages[:-1]:
            if stage.exports_model:
                raise ValueError(f"stages.{stage.name}: a stage with student=unet must be the last")

    @property
    def active_stages(self) -> tuple[StageConfig, ...]:
        """The stages that are not skipped."""
        return tuple(stage for stage in self.stages if not stage.skip)

    @property
    def adapter_stages(self) -> tuple[StageConfig, ...]:
        """The stages that start from the frozen model: all active ones, or none."""
        return tuple(stage for stage in self.active_stages if stage.trains_adapter)

    @property
    def batch_size(self) -> int | None:
        """The batch size of all stages; None where they differ."""
        sizes = {stage.batch_size for stage in self.active_stages}
        return sizes.pop() if len(sizes) == 1 else None

    @property
    def on_emoji(self) -> bool:
        """Whether the data are the embedded images."""
        return self.data.source == "emoji"

    @property
    def compared_samples(self) -> int:
        """The number of samples of each student and of the teacher in the comparison."""
        if self.evaluation.samples is not None:
            return self.evaluation.samples
        return EMBEDDED_SAMPLES if self.on_emoji else OWN_SAMPLES
