"""Open a run from shapes alone: everything is checked that a real run checks, and nothing is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh

from hypersd_jax.bases import TextToImage, describe_base
from hypersd_jax.config import PREVIOUS, Config, StageConfig
from hypersd_jax.errors import UserError
from hypersd_jax.inputs.prompts import PromptInputs
from hypersd_jax.paths import can_write
from hypersd_jax.stages.context import Run
from hypersd_jax.stages.kinds import STUDENT, kind_of, training_step
from hypersd_jax.stages.mesh_choice import choose_mesh
from hypersd_jax.stages.opening import open_data, start_factors
from hypersd_jax.stages.run import check_stages
from hypersd_jax.stages.streams import Stream
from hypersd_jax.training import StopSignals, TrainState, init_state, make_mesh
from hypersd_jax.training.output import open_output
from hypersd_jax.training.reuse import require_run
from hypersd_jax.weights.placement import BATCH_AXES

AnyMesh = Any
"""A `Mesh`, or the `AbstractMesh` of devices that are not here."""


def abstract_mesh(config: Config, count: int, memory: float | None, dtype: Any) -> tuple[AnyMesh, str | None]:
    """Lay out ``count`` devices of so much memory, which need not be here, as the configuration says; and say why.

    Raises:
        UserError: naming `mesh.data` or `mesh.fsdp`, which do not fit.
    """
    choice = choose_mesh(config, count, memory, dtype)
    return AbstractMesh((choice.data, choice.fsdp), BATCH_AXES, (AxisType.Auto,) * 2), choice.reason


def tracing_mesh() -> Mesh:
    """Return the mesh of one CPU device, for which functions are traced to be counted: its kernels are all XLA's."""
    try:
        return make_mesh(1, 1, devices=jax.local_devices(backend="cpu")[:1])
    except RuntimeError:  # JAX_PLATFORMS names another alone
        return make_mesh(1, 1, devices=jax.local_devices()[:1])


def open_abstract(config: Config, *, mesh: AnyMesh, traced_for: Mesh, dtype: Any) -> Run:
    """Open and check a run whose weights and adapters are `jax.ShapeDtypeStruct`s.

    Weights are read only where something is compared with them: those of the encoders, with ``data.cache``; of rewards,
    all. The values of the others may still turn out not to be finite.

    Args:
        config: of the run.
        mesh: that it is planned for.
        traced_for: the mesh whose devices the networks are traced for.
        dtype: of the computation.

    Raises:
        UserError: what the run itself would refuse.
    """
    output = open_output(config)
    if not can_write(Path(config.output_dir).absolute()):
        raise UserError(f"output_dir: {config.output_dir} cannot be written")
    base = _described(config, traced_for, dtype)
    source, prompts = open_data(config, base.image_side)
    texts = source or prompts
    assert texts is not None
    run = Run(
        config=config,
        output=output,
        mesh=mesh,
        base=base,
        base_fingerprint="",
        preview_prompts=tuple(texts.preview_prompts),
        uncond=_unconditional(base) if config.adapter_stages else None,
        source=source,
        prompt_inputs=PromptInputs(prompts, base, mesh, resolution=base.image_side) if prompts else None,
        step=training_step(base, traced_for),
        stop=StopSignals(),
    )
    if config.adapter_stages:
        here = dataclasses.replace(run, mesh=tracing_mesh())  # which has devices to lay out arrays on
        run.student, run.scales = jax.eval_shape(lambda: here.fresh_factors(Stream.ADAPTER, 0))
        run.fresh_scales = run.scales
        if config.lora.start is not None:
            start, fresh = config.lora.start, run.teacher(PREVIOUS)
            run.student, run.scales = jax.eval_shape(lambda fresh: start_factors(base, start, fresh), fresh)
    check_stages(run)
    require_run(config)
    return run


def _described(config: Config, mesh: Mesh, dtype: Any) -> TextToImage:
    own: dict[str, Any] = {}
    if not config.adapter_stages:  # the weights themselves are trained, in float32
        own = {"param_dtype": jnp.float32, "fresh": config.model.fresh}
    own |= {"resolution": config.data.resolution, "remat": config.model.remat}
    source = config.model.source
    base = describe_base(source, dtype=dtype, mesh=mesh, **own)
    if config.data.cache is None:
        return base
    # A cache is of certain encoders, which are compared with the model's.
    read = (base.autoencoder, *(base.text_encoders if config.adapter_stages else ()))
    return describe_base(source, dtype=dtype, mesh=mesh, **{**own, "read": read})


def _unconditional(base: TextToImage) -> Any:
    """Describe `inputs.encoding.unconditional`."""
    params = {name: base.params[name] for name in base.text_encoders}
    ids = base.prompts.tokenize([""])
    return jax.eval_shape(lambda params: base.encode_prompts(params, ids), params)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageShapes:
    """The arrays of a stage as `jax.ShapeDtypeStruct`s.

    Attributes:
        state: what is trained.
        frozen: what the training step reads; those of its tables that follow from settings are NumPy arrays.
        own: leaves of ``frozen`` that are not the base's: adapters of teachers, rewards, tables.
    """

    state: TrainState
    frozen: Any
    own: list[Any]


def stage_shapes(run: Run, index: int, stage: StageConfig, mesh: Mesh) -> StageShapes:
    """Describe the arrays of a stage of a run from `open_abstract`; ``mesh`` is what it is traced for."""
    kind, stage = kind_of(stage), without_measuring(stage)
    kept: dict[str, Any] = {}

    def make(given: Mapping[str, Any]) -> Any:
        inner = _filled(run, given, mesh)
        state = init_state(kind.trainable(inner, index, stage), stage, averaged=(STUDENT,))
        frozen = kind.frozen(inner, stage)
        leaves, kept["tree"] = jax.tree.flatten(frozen)
        kept["tables"] = [None if isinstance(leaf, jax.core.Tracer) else leaf for leaf in leaves]
        base = {id(leaf) for leaf in jax.tree.leaves(given["params"])}
        kept["own"] = [id(leaf) not in base for leaf in leaves]
        return state, leaves

    given = {name: getattr(run, name) for name in _ARRAYS}
    state, leaves = jax.eval_shape(make, {**given, "params": _shapes(dict(run.base.params))})
    known = [shape if table is None else table for shape, table in zip(leaves, kept["tables"], strict=True)]
    own = [leaf for leaf, is_own in zip(leaves, kept["own"], strict=True) if is_own]
    return StageShapes(state=state, frozen=jax.tree.unflatten(kept["tree"], known), own=own)


_ARRAYS = ("uncond", "student", "scales", "fresh_scales", "students")
"""Attributes of a run that hold arrays, beside its base."""


def _filled(run: Run, given: Mapping[str, Any], mesh: Mesh) -> Run:
    """Return the run with arrays, inside a trace, in place of its shapes."""
    arrays = {name: given[name] for name in _ARRAYS}
    return dataclasses.replace(run, base=run.base.with_weights(given["params"]), mesh=mesh, **arrays)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def without_measuring(stage: Any) -> Any:
    """Return a stage whose margins, which would be measured on the teacher's images, are any numbers."""
    feedback: Any = getattr(stage, "feedback", None)
    if feedback is None:
        return stage
    rewards = tuple(dataclasses.replace(each, margin=each.margin or 0.0) for each in feedback.rewards)
    return dataclasses.replace(stage, feedback=dataclasses.replace(feedback, rewards=rewards))


def pass_on(run: Run, stage: StageConfig, student: Any) -> None:
    """Let the next stages find the student of this one, as `Kind.finish` does; sample and write nothing.

    Args:
        run: changed.
        stage: whose student it is; of full fine-tuning nothing is passed on, since every shape stays.
        student: its factors, or their shapes.
    """
    if not stage.exports_model:
        run.student, run.scales = passed_factors(run, stage, student)
        run.students[stage.name] = run.teacher(PREVIOUS)


def passed_factors(run: Run, stage: StageConfig, student: Any) -> tuple[Any, Any]:
    """Return the factors and scales that the stage after this one starts from; of shapes, shapes."""
    passed: Any = getattr(kind_of(stage), "passed_on", None)
    if passed is None:
        return student, run.scales
    found: tuple[Any, Any]
    if isinstance(jax.tree.leaves(student)[0], jax.ShapeDtypeStruct):
        given = {**{name: getattr(run, name) for name in _ARRAYS}, "params": {}}
        found = jax.eval_shape(
            lambda given, own: passed(_filled(run, given, tracing_mesh()), stage, own), given, student
        )
    else:
        found = passed(run, stage, student)
    return found
