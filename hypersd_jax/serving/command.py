"""The command behind ``hypersd serve``: load, compile, listen."""

from __future__ import annotations

import argparse
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hypersd_jax.config import EMBEDDED_GUIDANCE
from hypersd_jax.errors import UserError
from hypersd_jax.paths import parse_lora
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.pipeline.arguments import latent_size
from hypersd_jax.png_text import lora_hash, name_of
from hypersd_jax.sampling_command import EMBEDDED_STEPS
from hypersd_jax.serving.desk import Desk
from hypersd_jax.serving.engine import Engine, Names
from hypersd_jax.serving.limits import Limits
from hypersd_jax.serving.request import Offer
from hypersd_jax.serving.worker import Work, Worker
from hypersd_jax.weights.components import EMBEDDED, assets
from hypersd_jax.weights.lora import weights_file

EMBEDDED_LORA = "unified"
"""Of the LoRAs that ship, the one that is made for every number of steps."""


def load(options: argparse.Namespace, limits: Limits) -> tuple[Engine, Offer, Names]:
    """Load what the options of ``hypersd serve`` name.

    Raises:
        UserError: one line naming the option or file at fault.
    """
    student = Pipeline.from_pretrained(options.model, dtype=options.dtype)
    if options.vae:
        student.load_vae(options.vae)
    controlled = None
    if options.controlnet:
        controlled = student.beside()
        controlled.load_controlnet(options.controlnet)
    hashes: dict[str, str] = {}
    scales: dict[str, float] = {}
    for file, scale in [parse_lora(text) for text in options.lora] or _own_loras(options.model):
        if abs(scale) > limits.lora_scale:
            raise UserError(f"--lora {file}: the scale {scale:g} is beyond {limits.lora_scale:g}, where sliders end")
        name = _free(name_of(file), scales)
        report = student.load_lora(file, scale, name=name)
        if controlled is not None:
            controlled.load_lora(file, scale, name=name)
        print(report, file=sys.stderr)
        hashes[name], scales[name] = lora_hash(weights_file(Path(report.file))), scale
    names = Names(
        model=name_of(options.model),
        vae=name_of(options.vae) if options.vae else None,
        controlnet=name_of(options.controlnet) if options.controlnet else None,
        hashes=hashes,
    )
    how = {key: getattr(options, key) for key in ("sampler", "spacing", "eta", "preset")}
    own_guidance = EMBEDDED_GUIDANCE if options.model == EMBEDDED else None
    engine = Engine(student, controlled, how=how, names=names, teacher_guidance=own_guidance)
    own = student.settings(steps=options.steps or _own_steps(options), guidance=options.guidance, **how)
    offer = Offer(
        modes=engine.modes,
        sizes=_sizes(options.size, student),
        loras=scales,
        steps=min(own.steps, limits.steps),
        guidance=min(own.guidance, limits.guidance),
    )
    return engine, offer, names


def run_serve(options: argparse.Namespace, sock: socket.socket) -> None:
    """Serve what the options name on a bound socket until the process is told to end.

    Raises:
        UserError: as `load`.
    """
    from hypersd_jax.serving.app import App
    from hypersd_jax.serving.guard import Entry
    from hypersd_jax.serving.server import serve

    limits = Limits()
    engine, offer, names = load(options, limits)
    for ready in engine.warm_up(offer):
        print(f"compiled {ready}", file=sys.stderr)
    desk: Desk[Work] = Desk()
    entry = Entry.of(options.host, sock.getsockname()[1], options.token)
    worker = Worker(desk, engine, limits)
    worker.start()
    try:
        serve(App(desk, offer, limits, entry, about(engine, names)), sock, entry, limits)
    finally:
        desk.close()
        worker.join(timeout=10)


def about(engine: Engine, names: Names) -> dict[str, Any]:
    """What the page is told of the model."""
    return {
        "model": names.model,
        "vae": names.vae,
        "controlnet": names.controlnet,
        "teacher": {key: engine.teacher[key] for key in ("steps", "guidance")},
    }


def _own_steps(options: argparse.Namespace) -> int | None:
    """The embedded model with its own LoRA starts as `hypersd sample` does."""
    return EMBEDDED_STEPS if options.model == EMBEDDED and not options.lora and not options.preset else None


def _own_loras(model: str) -> list[tuple[Path, float]]:
    return [(assets() / "loras" / f"{EMBEDDED_LORA}.safetensors", 1.0)] if model == EMBEDDED else []


def _sizes(given: list[tuple[int, int]], pipe: Pipeline) -> dict[str, tuple[int, int]]:
    """The sizes to offer by name, ``WIDTHxHEIGHT``; the model's own where none are given."""
    for height, width in given:
        try:
            latent_size(height, width, pipe.base.native_size, pipe.base.downscale)
        except UserError as error:
            raise UserError(f"--size {height}x{width}: {error}") from None
    return {f"{width}x{height}": (height, width) for height, width in given or [pipe.native_size]}


def _free(name: str, taken: Mapping[str, Any]) -> str:
    """The name, numbered where another LoRA has it."""
    names = [name, *(f"{name}-{number}" for number in range(2, len(taken) + 3))]
    return next(each for each in names if each not in taken)
