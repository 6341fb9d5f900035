"""The structure term of a feedback stage: an instance segmentation of what the student makes of real images (Eq. 14).

Real latents are noised to one of the student's times, it takes its steps from there, and SOLOv2 looks at the image.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from hypersd_jax import distill
from hypersd_jax.bases import Networks, TextToImage
from hypersd_jax.config import FeedbackStage, StructureConfig
from hypersd_jax.data.instances import AnnotatedImage, read_annotations
from hypersd_jax.data.listing import file_name
from hypersd_jax.diffusion import add_noise
from hypersd_jax.distill import Trajectory, alpha_sigma, draw_trajectory
from hypersd_jax.distill.structure import instance_loss
from hypersd_jax.errors import UserError
from hypersd_jax.inputs import structure
from hypersd_jax.inputs.batches import Reading, nothing
from hypersd_jax.models.solov2 import resize, whole_strides
from hypersd_jax.rewards.solov2 import LoadedSoloV2, load_solov2
from hypersd_jax.stages import generator
from hypersd_jax.stages.context import Run
from hypersd_jax.stages.generator import Frozen
from hypersd_jax.stages.kinds import STUDENT
from hypersd_jax.stages.rewards import decoded_images
from hypersd_jax.stages.streams import Draw, drawn_from
from hypersd_jax.training import Metrics, replicated

SHOWN = 3


@functools.cache
def open_network(path: str) -> LoadedSoloV2:
    """Load SOLOv2 once."""
    return load_solov2(path)


def require_structure(run: Run, stage: FeedbackStage) -> None:
    """Refuse (UserError) weights, annotations or data that the term cannot be computed from; warn what it leaves out.

    Without the term there is nothing to refuse.
    """
    config = stage.structure
    if config is None:
        return
    where = f"stages.{stage.name}.structure"
    if run.config.data.cache is not None:
        raise UserError(f"{where}: it needs the images themselves, without data.cache")
    needed: dict[str, Callable[[], Any]] = {
        "path": lambda: open_network(config.path),
        "annotations": lambda: annotated_images(run, config),
    }
    for key, opened in needed.items():
        try:
            opened()
        except UserError as error:
            raise UserError(f"{where}.{key}: {error}") from None
    crowds = read_annotations(config.annotations).crowds
    images = annotated_images(run, config).values()
    empty = sum(not image.instances for image in images)
    counts = [f"{crowds} crowds are left out"] if crowds else []
    counts += [f"{empty} of {len(images)} images have no instance"] if empty else []
    if counts and jax.process_index() == 0:
        warnings.warn(f"{where}.annotations: {config.annotations}: {', '.join(counts)}", stacklevel=2)


def annotated_images(run: Run, config: StructureConfig) -> Mapping[int, AnnotatedImage]:
    """Find the annotations of each image of the run's data, by key.

    Raises:
        UserError: they cannot be read, do not list every image, or have more categories than the network; or the
            images are no files of their own.
    """
    annotations, classes = read_annotations(config.annotations), open_network(config.path).config.classes
    if annotations.categories != classes:  # they are numbered by their order, which others would shift
        raise UserError(f"{config.annotations}: {annotations.categories} categories, but the network has {classes}")
    files = run.source.files if run.source else None
    if files is None:
        raise UserError(f"the images of data.source={run.config.data.source} are no files, so nothing can name them")
    same, count = Counter(map(file_name, files.values())).most_common(1)[0]
    if count > 1:
        raise UserError(f"{config.annotations}: {count} images of data.source are called {same}")
    found = {key: annotations.image(name) for key, name in files.items()}
    if unknown := [files[key] for key, image in found.items() if image is None]:
        some = ", ".join(unknown[:SHOWN]) + (", ..." if len(unknown) > SHOWN else "")
        raise UserError(f"{config.annotations}: {len(unknown)} of {len(files)} images are not in it: {some}")
    return {key: image for key, image in found.items() if image is not None}


def targets_of(run: Run, stage: FeedbackStage) -> Reading:
    """Make the function that reads the instances of a batch's images; without the term it reads nothing."""
    config = stage.structure
    if config is None:
        return nothing
    assert run.source is not None
    assert run.source.files is not None
    images, network = annotated_images(run, config), open_network(config.path)
    room = {"positives": config.positives, "instances": config.instances}
    return structure.reading(images, run.source.files, network.config, **room)


def frozen_structure(run: Run, stage: FeedbackStage) -> Any:
    """Return the network's parameters; None without the term."""
    if stage.structure is None:
        return None
    return jax.device_put(dict(open_network(stage.structure.path).params), replicated(run.mesh))


def structure_term(
    base: TextToImage, stage: FeedbackStage, models: Any, frozen: Frozen, batch: Any, key: jax.Array
) -> tuple[jax.Array, Metrics, jax.Array]:
    """Compute the weighted structure term (Eq. 14), its metrics, and its calls of the student."""
    config, count, nets = stage.structure, stage.structure_steps, Networks(base=base, weights=frozen.weights)
    assert config is not None
    latents, times = batch["latents"], jnp.asarray(stage.times)[-count:]
    last = min(stage.late_steps, count)
    drawn = draw_trajectory(drawn_from(key, Draw.STRUCTURE), latents.shape, count, batch["indices"], last=last)
    first = jnp.broadcast_to(times[0], latents.shape[:1])
    start = add_noise(latents, drawn.noise, *alpha_sigma(base.schedule, first, latents))
    trajectory = Trajectory(times, jnp.zeros(2, jnp.int32), base.schedule, stage.deterministic)
    student = generator.predictor(nets, stage, models[STUDENT], frozen)
    before = generator.predictor(nets, stage, jax.lax.stop_gradient(models[STUDENT]), frozen)
    sample, _ = distill.student_sample(
        lambda *inputs: (student(*inputs), None), before, batch["cond"], drawn._replace(noise=start), trajectory
    )
    images = jnp.clip(decoded_images(base, frozen.feedback, sample.x0), 0.0, 1.0)
    size = whole_strides(*images.shape[1:3])
    if size != images.shape[1:3]:
        images = resize(images, size)
    seen = open_network(config.path).network(frozen.structure, images)
    found = instance_loss(seen.categories, seen.kernels, seen.features, batch[structure.TARGETS])
    metrics: Metrics = {
        "structure": found.total,
        "structure_category": found.category,
        "structure_mask": found.mask,
        "structure_left_out": jnp.mean(batch[structure.LEFT_OUT]),
    }
    return config.weight * found.total, metrics, drawn.step + 1.0
