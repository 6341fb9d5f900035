"""What students are measured against: the teacher's many-step pictures of a fixed list, and the teacher at few steps.

Of the pictures only the many-step ones are kept; of the others, numbers.

For the embedded teacher this ships with the package; for any other it is computed once and kept beside the run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from hypersd_jax.data import EvalItem
from hypersd_jax.errors import UserError
from hypersd_jax.evaluation import (
    Estimate,
    features,
    frechet_distance,
    image_distance,
    kernel_distance,
    load_scorer,
    mean_estimate,
)
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.stages.appraisal import Item, Pictures, look, make_appraiser
from hypersd_jax.weights.components import assets
from hypersd_jax.weights.diffusers.component import fingerprint

MANY_STEPS = 25
FEW_STEPS = (8, 4, 2, 1)
# Further seeds of the list's prompts, beyond those of any list, lie this much above their own. The floor is drawn from
# the first; the beginning of the list is drawn from all, for diversity.
FURTHER_SEEDS = (1_000_000, 2_000_000, 3_000_000)
DIVERSE_PROMPTS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """One model's pictures of the list, measured against the reference.

    ``distances`` (N,) are root mean squared pixel differences to the reference's picture from the same latents; those
    of ``units``, if there are any, are not independent (see `mean_estimate`). ``fid`` and ``kid`` are None for few
    samples. ``values`` need no reference: `Appraiser.values` under their keys of results.json, or nothing.
    """

    steps: int
    guidance: float
    fid: float | None
    kid: Estimate | None
    distances: np.ndarray
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    units: np.ndarray | None = None

    @property
    def calls(self) -> int:
        """Network calls a picture: guidance doubles them."""
        return calls_of(self.steps, self.guidance)

    @property
    def distance(self) -> Estimate:
        """Mean distance with its standard error."""
        return mean_estimate(self.distances, self.units)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """The teacher's ``pictures`` at 25 steps, with their own ``values`` (see `Measured`); the teacher at fewer steps;
    ``floor``: the teacher at 25 steps from other latents, what a perfect student could not be told from; None where
    each prompt has one seed."""

    pictures: Pictures
    values: Mapping[str, Any]
    floor: Measured | None
    teachers: tuple[Measured, ...]


def get_reference(
    pipe: Pipeline,
    items: Sequence[EvalItem],
    *,
    groups: Sequence[str] | None,
    guidance: float,
    batch_size: int,
    base: str,
    folder: Path,
) -> Reference:
    """The reference of this base, list and guidance: shipped, kept in ``folder``, or computed with a progress bar.

    Args:
        pipe: the base, without LoRAs.
        items: the list.
        groups: those of the list and of the training pictures.
        guidance: the teacher's.
        batch_size: of the pictures drawn.
        base: fingerprint of the base's UNet.
        folder: where a reference that is computed is kept.
    """
    identity = reference_identity(items, groups=groups, guidance=guidance, base=base)
    shipped = assets() / "reference" / "teacher.npz"
    if shipped.exists() and (found := load_reference(shipped, identity)) is not None:
        return found

    def compute() -> Reference:
        return compute_reference(pipe, items, groups=groups, guidance=guidance, batch_size=batch_size)

    return kept_or_computed(folder / "reference.npz", identity, compute)


def kept_or_computed(path: Path, identity: str, compute: Callable[[], Reference]) -> Reference:
    """The reference of this identity in a file, or else a computed one, which the first process keeps there.

    Several processes compute it together, unless all of them see the file.
    """
    found = load_reference(path, identity) if path.exists() else None
    if np.all(multihost_utils.process_allgather(np.asarray(found is not None))):
        assert found is not None
        return found
    reference = compute()
    if jax.process_index() == 0:
        save_reference(path, reference, identity)
    return reference


def compute_reference(
    pipe: Pipeline, items: Sequence[EvalItem], *, groups: Sequence[str] | None, guidance: float, batch_size: int
) -> Reference:
    """Draw and measure the teacher: 25 steps twice, few steps with and without guidance, and again for diversity."""
    appraiser = make_appraiser(items, groups, pipe.native_size[0])
    few = [(steps, scale) for scale in (guidance, 0.0) for steps in FEW_STEPS]
    with tqdm(total=_total_calls(len(items), guidance, few), unit="call", desc="reference") as bar:

        def drawn(steps: int, scale: float, offset: int = 0) -> Pictures:
            images, _ = draw(
                pipe, items, steps=steps, guidance=scale, sampler="ddim", batch_size=batch_size, seed_offset=offset
            )
            bar.update(len(items) * calls_of(steps, scale))
            return look(images)

        def further(steps: int, scale: float, offsets: Sequence[int]) -> list[np.ndarray]:
            settings: dict[str, Any] = {"steps": steps, "guidance": scale, "sampler": "ddim", "batch_size": batch_size}
            found = further_features(pipe, items, offsets, **settings)
            bar.update(sum(len(part) for part in found) * calls_of(steps, scale))
            return found

        pictures, other = drawn(MANY_STEPS, guidance), drawn(MANY_STEPS, guidance, FURTHER_SEEDS[0])
        # Both are one model, whose diversity is that of the four seeds together.
        rest = further(MANY_STEPS, guidance, FURTHER_SEEDS[1:])
        values = appraiser.values(pictures, [other.features[:DIVERSE_PROMPTS], *rest])
        floor_values = appraiser.values(other, [pictures.features[:DIVERSE_PROMPTS], *rest])
        teachers = []
        for steps, scale in few:
            mine = drawn(steps, scale)
            own = appraiser.values(mine, further(steps, scale, FURTHER_SEEDS))
            teachers.append(measure(mine, pictures, steps=steps, guidance=scale, values=own))
    floor = measure(other, pictures, steps=MANY_STEPS, guidance=guidance, values=floor_values)
    return Reference(pictures=pictures, values=values, floor=floor, teachers=tuple(teachers))


def measure(
    mine: Pictures,
    reference: Pictures,
    *,
    steps: int,
    guidance: float,
    values: Mapping[str, Any] | None = None,
    sets: bool = True,
    units: np.ndarray | None = None,
) -> Measured:
    """Pictures against the reference's, with what is known of them already; as sets too, unless they are few."""
    return Measured(
        steps=steps,
        guidance=guidance,
        fid=frechet_distance(mine.features, reference.features) if sets else None,
        kid=kernel_distance(mine.features, reference.features) if sets else None,
        distances=image_distance(mine.images, reference.images),
        values=values or {},
        units=units,
    )


def further_features(
    pipe: Pipeline, items: Sequence[Item], seed_offsets: Sequence[int] = FURTHER_SEEDS, **settings: Any
) -> list[np.ndarray]:
    """Features (M, 1280) of the list's first 32 prompts from each further seed; ``settings`` are those of `draw`."""
    first = items[:DIVERSE_PROMPTS]
    images = [draw(pipe, first, seed_offset=offset, **settings)[0] for offset in seed_offsets]
    return np.split(features(np.concatenate(images)), len(images))


def draw(
    pipe: Pipeline,
    items: Sequence[Item],
    *,
    steps: int,
    guidance: float,
    sampler: str,
    batch_size: int,
    eta: float = 0.0,
    timesteps: Sequence[int] | None = None,
    seed_offset: int = 0,
) -> tuple[np.ndarray, float]:
    """Pictures of the list, uint8 (N, H, W, 3), each from the latents of its own seed; and seconds a picture.

    ``seed_offset`` moves those seeds, and gives a stochastic sampler other noise.
    """
    shape = (*(side // pipe.components.vae_config.downscale for side in pipe.native_size),)
    latents = _latents([item.seed + seed_offset for item in items], (*shape, pipe.components.unet_config.in_channels))
    settings: dict[str, Any] = {"steps": steps, "guidance": guidance, "sampler": sampler, "eta": eta}
    if timesteps is not None:
        settings["timesteps"] = timesteps
    begin = time.perf_counter()
    images = pipe(
        [item.prompt for item in items],
        latents=latents,
        seed=seed_offset,
        output="np",
        batch_size=batch_size,
        stepwise=True,
        **settings,
    )
    seconds = (time.perf_counter() - begin) / len(items)
    return np.round(images * 255.0).astype(np.uint8), seconds


def save_reference(path: Path, reference: Reference, identity: str) -> None:
    """Write the reference as one .npz file, atomically; features in float16."""
    rows = ([] if reference.floor is None else [reference.floor]) + list(reference.teachers)
    table = [
        {
            "steps": row.steps,
            "guidance": row.guidance,
            "fid": row.fid,
            "kid": None if row.kid is None else list(row.kid),
            "values": dict(row.values),
        }
        for row in rows
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(".tmp-" + path.name)
    np.savez_compressed(
        temporary,
        identity=np.asarray(identity),
        images=reference.pictures.images,
        features=reference.pictures.features.astype(np.float16),
        values=np.asarray(json.dumps(dict(reference.values))),
        floor=np.asarray(reference.floor is not None),
        rows=np.asarray(json.dumps(table)),
        distances=np.stack([_padded(row.distances, len(reference.pictures.images)) for row in rows]),
    )
    temporary.replace(path)


def load_reference(path: Path, identity: str) -> Reference | None:
    """Read a reference back; None when it is not of this identity."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["identity"]) != identity:
                return None
            rows = [
                Measured(
                    steps=row["steps"],
                    guidance=row["guidance"],
                    fid=row["fid"],
                    kid=None if row["kid"] is None else Estimate(*row["kid"]),
                    distances=distances[~np.isnan(distances)],
                    values=row["values"],
                )
                for row, distances in zip(json.loads(str(file["rows"])), file["distances"], strict=True)
            ]
            floors = int(file["floor"]) if "floor" in file else 1
            return Reference(
                pictures=Pictures(file["images"], file["features"].astype(np.float32)),
                values=json.loads(str(file["values"])),
                floor=rows[0] if floors else None,
                teachers=tuple(rows[floors:]),
            )
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: the reference is damaged ({error}); delete the file") from None


def _padded(distances: np.ndarray, length: int) -> np.ndarray:
    """Float32 of this length: those from other latents are fewer where some prompts have one seed."""
    padded = np.full(length, np.nan, np.float32)
    padded[: len(distances)] = distances
    return padded


def reference_identity(items: Sequence[EvalItem], *, groups: Sequence[str] | None, guidance: float, base: str) -> str:
    """What a reference belongs to: list, training pictures, guidance, the base's fingerprint, and the scorer's."""
    parts = {
        "items": [[item.prompt, item.seed] for item in items],
        "groups": None if groups is None else list(groups),
        "guidance": guidance,
        "base": base,
        "scorer": fingerprint(jax.tree.map(jnp.asarray, dict(load_scorer("report").params))),
        "steps": [MANY_STEPS, *FEW_STEPS],
        "diversity": [DIVERSE_PROMPTS, *FURTHER_SEEDS],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def calls_of(steps: int, guidance: float) -> int:
    """UNet calls an image: guidance doubles them."""
    return steps * (2 if guidance > 1.0 else 1)


def _total_calls(count: int, guidance: float, few: Sequence[tuple[int, float]]) -> int:
    """Network calls of the whole reference of ``count`` prompts."""
    diverse = min(DIVERSE_PROMPTS, count)
    many = calls_of(MANY_STEPS, guidance) * (2 * count + (len(FURTHER_SEEDS) - 1) * diverse)
    return many + sum(calls_of(*settings) for settings in few) * (count + len(FURTHER_SEEDS) * diverse)


def _latents(seeds: Sequence[int], shape: tuple[int, ...]) -> np.ndarray:
    one = jax.jit(jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape, jnp.float32)))
    return np.asarray(one(np.asarray(seeds, np.uint32)))
