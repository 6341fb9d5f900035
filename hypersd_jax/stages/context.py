"""The state that the stages of one run share: base, data, and the students of earlier stages."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from hypersd_jax import adapters
from hypersd_jax.adapters import Adapter
from hypersd_jax.bases import TextToImage
from hypersd_jax.conditioning import Conditioning
from hypersd_jax.config import BASE, PREVIOUS, Config, LoraConfig
from hypersd_jax.data import Source
from hypersd_jax.inputs.batches import Inputs
from hypersd_jax.inputs.prompts import PromptInputs
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.stages.kinds import training_step
from hypersd_jax.stages.streams import Stream, stream
from hypersd_jax.training import Step, StopSignals
from hypersd_jax.training.output import Output
from hypersd_jax.weights.fingerprints import fingerprint
from hypersd_jax.weights.placement import place

Factors = dict[str, dict[str, jax.Array]]
"""The trained part of an adapter: down and up by module."""


@dataclasses.dataclass(kw_only=True)
class Run:
    """One training run; a stage changes what it passes on to the next.

    Attributes:
        config: the whole configuration.
        output: its folder.
        mesh: of the devices.
        base: the model as the stages see it.
        base_fingerprint: of the weights that the next stage starts from.
        start_fingerprint: of the adapter that the run starts from; None: a new one.
        preview_prompts: the data's first prompts.
        uncond: the unconditional, of one sample.
        source: images and captions, where a stage reads them.
        prompt_inputs: conditioning from prompts alone, where a stage reads no images.
        scales: of the student's LoRA factors.
        fresh_scales: of factors that `fresh_factors` draws at the run's own rank; the student's may have grown.
        student: the factors that the next stage starts from.
        students: adapters of earlier stages, by name, as far as a later stage names them.
        step: the training step of all stages.
        stop: the signals that have come.
    """

    config: Config
    output: Output
    mesh: Mesh
    base: TextToImage
    base_fingerprint: Any
    preview_prompts: tuple[str, ...]
    uncond: Conditioning | None
    source: Source | None
    prompt_inputs: PromptInputs | None
    step: Step
    stop: StopSignals
    start_fingerprint: str | None = None
    scales: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    fresh_scales: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    student: Factors = dataclasses.field(default_factory=dict)
    students: dict[str, Adapter] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def pipe(self) -> Pipeline:
        """Sampling pipeline of the base."""
        return Pipeline(self.base)

    @functools.cached_property
    def inputs(self) -> Inputs | None:
        """Latents and conditioning of the images; None where no stage reads images.

        Raises:
            UserError: the cache is missing, unfinished, or of another model.
        """
        if self.source is None:
            return None
        trained = () if self.config.adapter_stages else self.base.text_encoders
        return Inputs(self.config, self.source, self.base, self.mesh, trained=trained)

    def start_from(self, base: TextToImage) -> None:
        """Make the next stages start from another model of the same structure."""
        self.base = base
        self.base_fingerprint = fingerprints(self.config, base)
        for made in ("inputs", "pipe"):
            self.__dict__.pop(made, None)
        self.step = training_step(self.base, self.mesh)

    def has_student(self, earlier: Sequence[str]) -> bool:
        """Tell whether a stage finds a student: that of an ``earlier`` one, or the LoRA that the run starts from."""
        return bool(earlier) or self.config.lora.start is not None

    @property
    def grid_length(self) -> int:
        """Length of the run's longest solver grid; shorter ones are padded to it, so that stages share one program."""
        return max((stage.grid or 1 for stage in self.config.adapter_stages), default=1)

    def fresh_factors(
        self, name: Stream, index: int, *, rank: int | None = None
    ) -> tuple[Factors, dict[str, jax.Array]]:
        """Draw new LoRA factors, whose output is zero, and their scales, from a random stream of stage ``index``.

        They have the run's rank and alpha, or another rank and scales of 1.
        """
        lora = self.config.lora if rank is None else LoraConfig(rank=rank)
        adapter = self.base.fresh_adapter(stream(self.config.seed, name, index), rank=lora.rank, alpha=lora.alpha)
        factors, scales = place(self.mesh, adapters.split(adapter))
        return factors, scales

    def teacher(self, name: str) -> Adapter:
        """Return the adapter of a teacher: BASE, PREVIOUS, or the name of an earlier stage. The base's is empty."""
        if name == BASE:
            return {}
        return adapters.join(self.student, self.scales) if name == PREVIOUS else self.students[name]

    def images_before(self, index: int) -> int:
        """Count the images that the stages before stage ``index`` have read."""
        return sum(stage.updates * stage.batch_size for stage in self.config.active_stages[:index])


def fingerprints(config: Config, base: TextToImage) -> Any:
    """Fingerprint the weights that the stages start from: the denoiser's, or if these are trained, each component's."""
    if config.adapter_stages:
        return fingerprint(base.params[base.denoiser])
    return {name: fingerprint(part) for name, part in base.params.items()}
