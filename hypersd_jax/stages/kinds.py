"""The protocol of a kind of stage, and the registry of the modules that implement it.

Its settings are a dataclass of `hypersd_jax.config`, which does not import JAX, so that a mistake in a recipe is
reported at once; all else is the module that is registered for them here. Nothing outside asks what kind a stage is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from jax.sharding import Mesh

from hypersd_jax.bases import Base
from hypersd_jax.config import StageConfig
from hypersd_jax.errors import UserError
from hypersd_jax.training import Phase, Step, TrainState, Watch, make_step, step_argument

if TYPE_CHECKING:
    from hypersd_jax.inputs.batches import LoadedBatch
    from hypersd_jax.stages.context import Run

STUDENT, FAKE, DISCRIMINATOR = "student", "fake", "discriminator"
"""The models that stages train. Every stage has a student; its moving average is the target."""


@contextlib.contextmanager
def naming(key: str) -> Iterator[None]:
    """Prefix the `UserError` of a block with a configuration key."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}.{error}") from None


class Kind(Protocol):
    """A module with these functions; ``stage`` is of its own kind throughout.

    It may also have these, which are asked for by name:
        ``watch(run, stage)``: what measures a state on the way (`watch_of`).
        ``batch_shapes(run, stage, size)``: what a micro-batch of so many samples holds (`batch_shapes.MicroBatch`);
            without it a plan knows nothing of the batches, and counts no work.
        ``passed_on(run, stage, student)``: factors and scales that the next stage starts from, where they are not the
            student's own.
    """

    def check(self, run: Run, stage: Any, earlier: Sequence[str]) -> None:
        """Refuse what does not fit the model or the ``earlier`` stages: a UserError that names the key."""

    def trainable(self, run: Run, index: int, stage: Any) -> dict[str, Any]:
        """Return float32 weights by model, STUDENT among them: LoRA factors, discriminator heads, or full networks."""

    def frozen(self, run: Run, stage: Any) -> Any:
        """Return what the training step reads and never changes."""

    def phases(self, base: Base, stage: Any) -> Sequence[Phase]:
        """List the phases of a training step; called inside the step, where the stage's numbers are arrays."""

    def batches(self, run: Run, index: int, stage: Any, frozen: Any, done: int) -> Iterator[LoadedBatch]:
        """Load the batches from step ``done + 1`` on, addressed by its number, so that resuming is exact."""

    def preview(self, run: Run, stage: Any, student: Any, name: str) -> None:
        """Sample with a student that is being trained: samples/NAME.png."""

    def finish(self, run: Run, stage: Any, student: Any, *, trained: bool) -> None:
        """Sample with the student, export it and pass it on to the run; ``trained``: there were steps to do."""


KINDS: dict[type[StageConfig], Kind] = {}


def register(settings: type[StageConfig], kind: Any) -> None:
    """Register a module (or an object) for the stages that a dataclass describes."""
    step_argument(settings)
    KINDS[settings] = kind


def kind_of(stage: StageConfig) -> Kind:
    """Return the module of a stage."""
    return KINDS[type(stage)]


def watch_of(run: Run, stage: StageConfig) -> Watch | None:
    """Make what measures a stage on the way: its module's ``watch(run, stage)``; None where it has none."""
    make = getattr(kind_of(stage), "watch", None)
    found: Watch | None = make(run, stage) if make else None
    return found


def exported_weights(stage: StageConfig, state: TrainState) -> Any:
    """Return the student that the stage exports: the moving average of its weights, or the weights."""
    return (state.ema if stage.export == "ema" else state.trainable)[STUDENT]


def training_step(base: Base, mesh: Mesh) -> Step:
    """Make the training step of every stage on a base; stages of one kind and equal choices share one program."""
    options = base.compiler_options
    return make_step(lambda stage: kind_of(stage).phases(base, stage), mesh=mesh, compiler_options=options)
