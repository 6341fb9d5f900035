"""A student's samples against the teacher's, kept by what they were generated with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.matrix.recipes import Sampled
from hypersd_jax.bases import load_base
from hypersd_jax.config import Config
from hypersd_jax.evaluation import generate, make_model
from hypersd_jax.evaluation.comparison import embedded_evaluator, embedded_teacher
from hypersd_jax.evaluation.reference import get_reference, reference_identity
from hypersd_jax.evaluation.tables import steps_text
from hypersd_jax.pipeline import Pipeline, parse_dtype
from hypersd_jax.weights.fingerprints import fingerprint

SHOWN = 8
"""Prompts in the grid of images."""

METRICS = ("distance", "kid", "fid_teacher", "kid_train", "clip_gain")
"""Columns of every row: the evaluator's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """The `METRICS` of one student at one number of steps, and its first images."""

    values: dict[str, float]
    images: np.ndarray


class Scorer:
    """The base model, the fixed list, and the teacher's samples of it."""

    def __init__(self, config: Config, samples: int, root: Path) -> None:
        """Load the base of ``config``; ``root`` keeps the reference, if it has to be computed, and the scores."""
        dtype = parse_dtype(config.model.dtype)
        base = load_base(config.model.source, dtype=dtype)
        self.base = fingerprint(base.params[base.denoiser])
        self._pipe = Pipeline(base)
        self._batch_size = config.evaluation.batch_size
        self._root = root
        evaluator = embedded_evaluator(self._pipe, samples, config.data.groups)
        guidance = float(config.evaluation.guidance or 0.0)
        teacher = embedded_teacher(self._pipe, self.base, guidance, self._batch_size)
        self._identity = reference_identity(teacher, evaluator)
        self._reference, measuring = get_reference(teacher, evaluator, root)
        self._evaluator = dataclasses.replace(measuring, further=())  # seeds of recipes stand for those of samples

    @property
    def prompts(self) -> list[str]:
        """Prompts of the images that are kept."""
        return [item.prompt for item in self._evaluator.items[:SHOWN]]

    @property
    def teacher_images(self) -> np.ndarray:
        return self._reference.samples.images[:SHOWN]

    @property
    def teacher_title(self) -> str:
        return f"teacher {steps_text(self.many_steps['steps'])}"

    @property
    def many_steps(self) -> dict[str, Any]:
        """The teacher at many steps: what a student is to reach."""
        return self._reference.rows[0].row

    def teachers(self) -> list[dict[str, Any]]:
        """The teacher at few steps, and from other latents: rows without seeds."""
        return [
            {"method": row["model"], **{key: row[key] for key in ("steps", "guidance", *METRICS)}}
            for row in (each.row for each in self._reference.rows[1:])
        ]

    def score(self, lora: Path, row: Sampled) -> Score:
        """Generate and measure, unless the same file has been sampled in the same way before."""
        content = hashlib.sha256(lora.read_bytes()).hexdigest()
        asked = json.dumps([content, row.steps, row.sampler, row.eta, row.timesteps, row.guidance, self._identity])
        path = self._root / "scores" / f"{hashlib.sha256(asked.encode()).hexdigest()[:20]}.npz"
        found = _read(path)
        return found if found is not None else self._measure(lora, row, path)

    def _measure(self, lora: Path, row: Sampled, path: Path) -> Score:
        self._pipe.load_lora(lora, name="student")
        settings = {"steps": row.steps, "guidance": row.guidance, "sampler": row.sampler, "eta": row.eta}
        try:
            model = make_model("student", self._pipe, timesteps=row.timesteps, **settings)
            samples = generate(model, self._evaluator.items, batch_size=self._batch_size)
        finally:
            self._pipe.unload_lora("student")
        found = self._evaluator.evaluate(samples, model).row
        score = Score(values={key: found[key] for key in METRICS}, images=samples.images[:SHOWN])
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".tmp-{path.name}")
        np.savez_compressed(temporary, images=score.images, values=np.asarray(json.dumps(score.values)))
        temporary.replace(path)
        return score


def _read(path: Path) -> Score | None:
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            return Score(values=json.loads(str(file["values"])), images=file["images"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # generated anew
