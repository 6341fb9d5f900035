"""A live canvas for tests: a tiny model with two LoRAs and a ControlNet, and a server of it in a thread."""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import uvicorn
from PIL import Image

from hypersd_jax.models import ControlNetConfig, UNetConfig, controlnet, unet
from hypersd_jax.serving.app import App
from hypersd_jax.serving.command import about, load
from hypersd_jax.serving.desk import Desk
from hypersd_jax.serving.engine import Engine, Names
from hypersd_jax.serving.guard import Entry
from hypersd_jax.serving.limits import Limits
from hypersd_jax.serving.request import Offer
from hypersd_jax.serving.server import configured
from hypersd_jax.serving.worker import Work, Worker
from hypersd_jax.weights.diffusers.component import save_params
from hypersd_jax.weights.lora import write_lora
from tests.helpers.lora_files import random_adapter
from tests.helpers.tiny_model import UNET, tiny_model

CONTROL: dict[str, Any] = {
    **{key: UNET[key] for key in UNET if key not in ("_class_name", "sample_size", "up_block_types")},
    "conditioning_embedding_out_channels": [4, 6],
}
HOST = "127.0.0.1"


def write_model(root: Path) -> argparse.Namespace:
    """Options of ``hypersd serve`` for a tiny model and all that goes with it."""
    shapes = unet(UNetConfig.from_dict(UNET), dtype=jnp.float32).shapes
    for seed, name in enumerate(("fast", "style")):
        write_lora(root / f"{name}.safetensors", {"unet": random_adapter(shapes, seed)})
    network = controlnet(ControlNetConfig.from_dict(CONTROL))
    save_params(root / "control", network.init(0), config=CONTROL, component_kind="unet")
    return argparse.Namespace(
        model=str(tiny_model(root / "model")),
        lora=[f"{root / 'fast.safetensors'}@1", f"{root / 'style.safetensors'}@0.5"],
        vae=None,
        controlnet=str(root / "control"),
        dtype="auto",
        size=[(16, 16)],
        steps=2,
        guidance=0.0,
        sampler="tcd",
        spacing=None,
        eta=None,
        preset=None,
    )


class Canvas:
    """A loaded model with its worker, which applications of any limits and entries share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.engine: Engine
        self.offer: Offer
        self.names: Names
        self.engine, self.offer, self.names = load(options, Limits())
        for _ in self.engine.warm_up(self.offer):
            pass
        self.desk: Desk[Work] = Desk()
        self.worker = Worker(self.desk, self.engine, Limits())
        self.worker.start()

    def app(self, entry: Entry | None = None, **limits: Any) -> App:
        """An application of it."""
        entry = entry or Entry.of(HOST, 80, None)
        return App(self.desk, self.offer, Limits(**limits), entry, about(self.engine, self.names))

    @contextlib.contextmanager
    def served(self, port: int = 0) -> Iterator[str]:
        """The address of a server in a thread."""
        with socket.create_server((HOST, port)) as sock:
            entry = Entry.of(HOST, sock.getsockname()[1], None)
            server = uvicorn.Server(configured(self.app(entry), Limits()))
            thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
            thread.start()
            while not server.started:
                time.sleep(0.01)
            try:
                yield entry.url
            finally:
                server.should_exit = True
                thread.join(10)

    def close(self) -> None:
        self.desk.close()
        self.worker.join(10)


def message(fields: dict[str, Any], **pictures: bytes) -> bytes:
    """A request with pictures as a client writes it."""
    lengths = {name: len(data) for name, data in pictures.items()}
    return framed(json.dumps({"pictures": lengths, **fields}).encode(), *pictures.values())


def framed(text: bytes, *rest: bytes) -> bytes:
    return struct.pack(">I", len(text)) + text + b"".join(rest)


def unframed(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and picture of a message of the server."""
    (length,) = struct.unpack_from(">I", data)
    return json.loads(data[4 : 4 + length]), data[4 + length :]


def picture(kind: str = "PNG", size: tuple[int, int] = (16, 16), mode: str = "RGB", **options: Any) -> bytes:
    """A file of one colour with a bright half."""
    image = Image.new(mode, size)
    image.paste(Image.new(mode, (size[0], size[1] // 2), "white" if mode != "I;16" else 60000))
    file = BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()
