"""Sample 12 images on one device and on meshes of eight; run by test_meshes.py in a process of its own.

Prints one JSON object: for each mesh and call the largest difference from the images of one device, and by program how
much less a device of the mesh computes than that one device.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

from hypersd_jax.pipeline import Pipeline
from hypersd_jax.training import make_mesh
from hypersd_jax.weights import placement

placement.SHARD_ABOVE_BYTES = 1024  # so that even a tiny model is split over `fsdp`

PROMPTS = ["red apple, fluent flat style", "a cat face", "lion, blob style"]
IMAGES = np.random.default_rng(0).random((3, 16, 16, 3)).astype(np.float32)
MASK = np.zeros((16, 16), np.float32)
MASK[:, :8] = 1
CALL: dict[str, Any] = {"steps": 2, "guidance": 0.0, "output": "np", "num_images": 4}
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "guided": {"guidance": 4.0, "negative_prompt": ["blob", None, "red"]},
    "noise in single steps": {"sampler": "tcd", "eta": 0.5, "stepwise": True},
    "image": {"image": IMAGES, "strength": 0.5},
    "mask": {"image": IMAGES, "mask": MASK},
    "tiled": {"height": 8, "width": 160, "tiled": True},
    "rounds": {"batch_size": 5},
    "controlnet": {"control_image": IMAGES, "guidance": 4.0},
}
SHAPES = [(8, 1), (2, 4)]


class Spy:
    """Notes what one device of each program computes, in operations, when the program is called."""

    def __init__(self, pipe: Pipeline) -> None:
        self.seen: dict[str, float] = {}
        programs = pipe._programs
        names = ("encode_prompts", "scan", "decode", "encode_images")
        spied = {name: self._spied(name, getattr(programs, name)) for name in names}
        pipe._programs = dataclasses.replace(programs, **spied)

    def _spied(self, name: str, program: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.seen[name] = program.lower(*args, **kwargs).compile().cost_analysis()["flops"]
            result = program(*args, **kwargs)
            pieces = {leaf.addressable_shards[0].data.shape[0] / leaf.shape[0] for leaf in jax.tree.leaves(result)}
            assert pieces == {1 / len(jax.tree.leaves(result)[0].sharding.device_set)}
            return result

        call.lower = program.lower  # type: ignore[attr-defined]
        return call


def run(pipe: Pipeline, folder: Path, call: dict[str, Any]) -> np.ndarray:
    pipe.unload_controlnet()
    if "control_image" in call:
        pipe.load_controlnet(folder / "control")
    return pipe(PROMPTS, **{**CALL, **call})


def in_parts(pipe: Pipeline) -> list[np.ndarray]:
    """Every single part of a call, on three samples."""
    cond, uncond = pipe.encode_prompts(PROMPTS, "blob")
    latents = pipe.encode_images(IMAGES)
    output = pipe.predict(latents, 499, cond, uncond, guidance=3.0)
    return [np.asarray(each) for each in (cond.context, latents, output, pipe.decode(latents))]


def apart(found: Any, expected: Any) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max())


def decoder_compilations(pipe: Pipeline) -> int:
    """How often the decoder is compiled in a call with a batch of its own: beside the steps alone, not once more."""
    seen: list[str] = []

    def note(name: str, _seconds: float, **about: Any) -> None:
        if name == "/jax/core/compile/backend_compile_duration" and about["fun_name"] == "jit(decode)":
            seen.append(name)

    jax.monitoring.register_event_duration_secs_listener(note)
    pipe(PROMPTS, **{**CALL, "num_images": 7})
    return len(seen)


def main(folder: Path) -> None:
    alone = Pipeline.from_pretrained(folder / "model")
    before = Spy(alone)
    expected = {name: (run(alone, folder, call), dict(before.seen)) for name, call in CALLS.items()}
    parts = in_parts(alone)
    seen: dict[str, Any] = {}
    for shape in SHAPES:
        pipe = Pipeline.from_pretrained(folder / "model", mesh=make_mesh(*shape))
        found: dict[str, Any] = {"decoder compiled": decoder_compilations(pipe)}
        spy = Spy(pipe)
        for name, call in CALLS.items():
            spy.seen.clear()
            images, operations = expected[name]
            difference = apart(run(pipe, folder, call), images)
            less = {program: operations[program] / count for program, count in spy.seen.items()}
            found[name] = {"difference": difference, "less": less}
        found["parts"] = [apart(*both) for both in zip(in_parts(pipe), parts, strict=True)]
        seen["x".join(map(str, shape))] = found
    print(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
