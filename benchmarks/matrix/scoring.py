"""Pictures of a student against the teacher's, kept by what they were drawn with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.matrix.recipes import Drawn
from hypersd_jax.config import Config
from hypersd_jax.data import evaluation_list
from hypersd_jax.pipeline import Pipeline, parse_dtype
from hypersd_jax.stages.appraisal import look, make_appraiser
from hypersd_jax.stages.reference import MANY_STEPS, draw, get_reference, measure, reference_identity
from hypersd_jax.weights.components import load_components
from hypersd_jax.weights.diffusers.component import fingerprint

SHOWN = 8
"""Prompts in the grid of pictures."""

VALUES = ("kid_train", "clip_gain")
"""What is told beside the distances to the teacher."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """Of one student at one number of steps, and its first pictures.

    Distance, KID and FID are to the teacher's pictures, ``kid_train`` to training pictures; ``clip_gain`` is the text
    match over that of shuffled prompts.
    """

    distance: float
    kid: float
    fid: float
    kid_train: float
    clip_gain: float
    pictures: np.ndarray


class Scorer:
    """The base model, the fixed list, and the teacher's pictures of it."""

    def __init__(self, config: Config, samples: int, root: Path) -> None:
        """Load the base of ``config``; ``root`` keeps the reference, if it has to be computed, and the scores."""
        dtype = parse_dtype(config.model.dtype)
        components = load_components(config.model.source, dtype=dtype, remat=config.model.remat)
        self.base = fingerprint(components.params["unet"])
        self._pipe = Pipeline(components, dtype=dtype)
        self._items = evaluation_list(samples, groups=config.data.groups)
        self._appraiser = make_appraiser(self._items, config.data.groups, self._pipe.native_size[0])
        self._batch_size = config.evaluation.batch_size
        self._root = root
        belonging: dict[str, Any] = {
            "groups": config.data.groups,
            "guidance": config.evaluation.guidance,
            "base": self.base,
        }
        self._identity = reference_identity(self._items, **belonging)
        root.mkdir(parents=True, exist_ok=True)
        for _ in range(2):  # read back what may just have been computed: the file's features are rounded
            self._reference = get_reference(
                self._pipe, self._items, batch_size=self._batch_size, folder=root, **belonging
            )

    @property
    def prompts(self) -> list[str]:
        """Of the pictures that are kept."""
        return [item.prompt for item in self._items[:SHOWN]]

    @property
    def teacher_pictures(self) -> np.ndarray:
        return self._reference.pictures.images[:SHOWN]

    @property
    def teacher_title(self) -> str:
        return f"teacher {MANY_STEPS} steps"

    @property
    def many_steps(self) -> dict[str, Any]:
        """The teacher at many steps: what a student is to reach."""
        return {"steps": MANY_STEPS, **self._reference.values}

    def teachers(self) -> list[dict[str, Any]]:
        """The teacher at few steps, and from other latents: rows without seeds."""
        rows = [("teacher, other latents", self._reference.floor), *(("teacher", t) for t in self._reference.teachers)]
        return [
            {
                "method": title,
                "steps": found.steps,
                "guidance": found.guidance,
                "distance": found.distance.mean,
                "kid": found.kid.mean,
                "fid": found.fid,
                **{name: found.values[name] for name in VALUES},
            }
            for title, found in rows
        ]

    def score(self, lora: Path, row: Drawn) -> Score:
        """Draw and measure, unless the same file has been drawn in the same way before."""
        content = hashlib.sha256(lora.read_bytes()).hexdigest()
        asked = json.dumps([content, row.steps, row.sampler, row.eta, row.timesteps, row.guidance, self._identity])
        path = self._root / "scores" / f"{hashlib.sha256(asked.encode()).hexdigest()[:20]}.npz"
        found = _read(path)
        return found if found is not None else self._measure(lora, row, path)

    def _measure(self, lora: Path, row: Drawn, path: Path) -> Score:
        self._pipe.load_lora(lora, name="student")
        try:
            images, _ = draw(
                self._pipe,
                self._items,
                steps=row.steps,
                guidance=row.guidance,
                sampler=row.sampler or "ddim",
                eta=row.eta or 0.0,
                timesteps=row.timesteps,
                batch_size=self._batch_size,
            )
        finally:
            self._pipe.unload_lora("student")
        mine = look(images)
        found = measure(mine, self._reference.pictures, steps=row.steps, guidance=row.guidance)
        values = self._appraiser.values(mine, None)
        numbers = {"distance": found.distance.mean, "kid": found.kid.mean, "fid": found.fid}
        numbers |= {name: values[name] for name in VALUES}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".tmp-{path.name}")
        np.savez_compressed(temporary, pictures=images[:SHOWN], numbers=np.asarray(json.dumps(numbers)))
        temporary.replace(path)
        return Score(**numbers, pictures=images[:SHOWN])


def _read(path: Path) -> Score | None:
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            return Score(**json.loads(str(file["numbers"])), pictures=file["pictures"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # drawn anew
