"""What students are measured against: the teacher's many-step pictures of a fixed list, and the teacher at few steps.

For the embedded teacher this ships with the package; for any other it is computed once and kept beside the run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from hypersd_jax.data import EvalItem
from hypersd_jax.errors import UserError
from hypersd_jax.evaluation import (
    Estimate,
    features,
    frechet_distance,
    image_distance,
    kernel_distance,
    mean_estimate,
)
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.weights.components import assets

MANY_STEPS = 25
FEW_STEPS = (8, 4, 2, 1)
# Seeds of the floor's second set of teacher pictures lie beyond those of any list.
FLOOR_SEED = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """One model's pictures of the list, measured against the reference.

    ``distances`` (N,) are root mean squared pixel differences to the reference's picture from the same latents.
    """

    steps: int
    guidance: float
    fid: float
    kid: Estimate
    distances: np.ndarray

    @property
    def calls(self) -> int:
        """Network calls a picture: guidance doubles them."""
        return self.steps * (2 if self.guidance > 1.0 else 1)

    @property
    def distance(self) -> Estimate:
        """Mean distance with its standard error."""
        return mean_estimate(self.distances)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """``images`` uint8 (N, H, W, 3) and ``features`` (N, 1280) of the teacher at 25 steps; the teacher at fewer steps;
    ``floor``: the teacher at 25 steps from other latents, what a perfect student could not be told from."""

    images: np.ndarray
    features: np.ndarray
    floor: Measured
    teachers: tuple[Measured, ...]


def get_reference(
    pipe: Pipeline, items: Sequence[EvalItem], *, guidance: float, batch_size: int, base: str, folder: Path
) -> Reference:
    """The reference of this base, list and guidance: shipped, kept in ``folder``, or computed with a progress bar."""
    identity = reference_identity(items, guidance, base)
    for path in (assets() / "reference" / "teacher.npz", folder / "reference.npz"):
        if path.exists():
            found = load_reference(path, identity)
            if found is not None:
                return found
    reference = compute_reference(pipe, items, guidance=guidance, batch_size=batch_size)
    save_reference(folder / "reference.npz", reference, identity)
    return reference


def compute_reference(pipe: Pipeline, items: Sequence[EvalItem], *, guidance: float, batch_size: int) -> Reference:
    """Draw and measure the teacher: 25 steps twice, and few steps with and without guidance."""
    calls = len(items) * (4 * MANY_STEPS + 3 * sum(FEW_STEPS))
    with tqdm(total=calls, unit="call", desc="reference") as bar:

        def drawn(steps: int, scale: float, offset: int = 0) -> np.ndarray:
            images, _ = draw(
                pipe, items, steps=steps, guidance=scale, sampler="ddim", batch_size=batch_size, seed_offset=offset
            )
            bar.update(len(items) * steps * (2 if scale > 1 else 1))
            return images

        images = drawn(MANY_STEPS, guidance)
        mine = features(images)
        floor = measure(drawn(MANY_STEPS, guidance, FLOOR_SEED), images, mine, MANY_STEPS, guidance)
        teachers = tuple(
            measure(drawn(steps, scale), images, mine, steps, scale) for scale in (guidance, 0.0) for steps in FEW_STEPS
        )
    return Reference(images=images, features=mine, floor=floor, teachers=teachers)


def measure(images: np.ndarray, reference: np.ndarray, mine: np.ndarray, steps: int, guidance: float) -> Measured:
    """Pictures against the reference's pictures and their features ``mine``."""
    theirs = features(images)
    return Measured(
        steps=steps,
        guidance=guidance,
        fid=frechet_distance(theirs, mine),
        kid=kernel_distance(theirs, mine),
        distances=image_distance(images, reference),
    )


def draw(
    pipe: Pipeline,
    items: Sequence[EvalItem],
    *,
    steps: int,
    guidance: float,
    sampler: str,
    batch_size: int,
    eta: float = 0.0,
    seed_offset: int = 0,
) -> tuple[np.ndarray, float]:
    """Pictures of the list, uint8 (N, H, W, 3), each from the latents of its own seed; and seconds a picture."""
    shape = (*(side // pipe.components.vae_config.downscale for side in pipe.native_size),)
    latents = _latents([item.seed + seed_offset for item in items], (*shape, pipe.components.unet_config.in_channels))
    settings: dict[str, Any] = {"steps": steps, "guidance": guidance, "sampler": sampler, "eta": eta}
    begin = time.perf_counter()
    images = pipe(
        [item.prompt for item in items],
        latents=latents,
        output="np",
        batch_size=batch_size,
        stepwise=True,
        **settings,
    )
    seconds = (time.perf_counter() - begin) / len(items)
    return np.round(images * 255.0).astype(np.uint8), seconds


def save_reference(path: Path, reference: Reference, identity: str) -> None:
    """Write the reference as one .npz file, atomically; features in float16."""
    rows = [reference.floor, *reference.teachers]
    table = [{"steps": r.steps, "guidance": r.guidance, "fid": r.fid, "kid": list(r.kid)} for r in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(".tmp-" + path.name)
    np.savez_compressed(
        temporary,
        identity=np.asarray(identity),
        images=reference.images,
        features=reference.features.astype(np.float16),
        rows=np.asarray(json.dumps(table)),
        distances=np.stack([row.distances for row in rows]).astype(np.float32),
    )
    temporary.replace(path)


def load_reference(path: Path, identity: str) -> Reference | None:
    """Read a reference back; None when it is of another base, list or guidance."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["identity"]) != identity:
                return None
            rows = [
                Measured(
                    steps=row["steps"],
                    guidance=row["guidance"],
                    fid=row["fid"],
                    kid=Estimate(*row["kid"]),
                    distances=distances,
                )
                for row, distances in zip(json.loads(str(file["rows"])), file["distances"], strict=True)
            ]
            return Reference(
                images=file["images"],
                features=file["features"].astype(np.float32),
                floor=rows[0],
                teachers=tuple(rows[1:]),
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: the reference is damaged ({error}); delete the file") from None


def reference_identity(items: Sequence[EvalItem], guidance: float, base: str) -> str:
    """What a reference belongs to: list, guidance, and the base's fingerprint."""
    text = json.dumps([[item.prompt, item.seed] for item in items]) + f"|{guidance}|{base}|{MANY_STEPS}|{FEW_STEPS}"
    return hashlib.sha256(text.encode()).hexdigest()


def _latents(seeds: Sequence[int], shape: tuple[int, ...]) -> np.ndarray:
    one = jax.jit(jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape, jnp.float32)))
    return np.asarray(one(np.asarray(seeds, np.uint32)))
