"""``hypersd serve``."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import re
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

from hypersd_jax.commands import checks, parsing
from hypersd_jax.commands.lora_folder import find_loras
from hypersd_jax.errors import UserError

_EPILOG = """\
examples:
  hypersd serve
  hypersd serve --model PATH/TO/stable-diffusion-v1-5 --lora Hyper-SD15-1step-lora.safetensors --vae taesd

Everything is compiled before the page's address is printed. Other machines reach it with --host 0.0.0.0, and then only
with the token in the address.

"""
_PACKAGES = ("starlette", "uvicorn", "websockets")


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "serve",
        help="a web page that draws while you type",
        description="Serve a web page that draws while its users type and sketch.",
        epilog=_EPILOG + parsing.preset_list(),
    )
    group = parser.add_argument_group("with")
    parsing.add_model(group)
    group.add_argument("--controlnet", type=parsing.source, metavar="SRC", help="for sketches that steer")
    group.add_argument(
        "--size",
        type=parsing.size,
        action="append",
        default=[],
        metavar="HxW",
        help="an image size to offer, may be given several times (default: the model's own)",
    )

    group = parser.add_argument_group("how, where the page begins")
    parsing.add_settings(group)

    group = parser.add_argument_group("where")
    group.add_argument(
        "--host", default="127.0.0.1", help="the address to listen on (default: %(default)s, this machine)"
    )
    group.add_argument("--port", type=_port, default=8000, help="0 takes a free one (default: %(default)s)")
    group.add_argument(
        "--token", type=_token, help="that visitors must have (default: none on this machine, else a random one)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Load, compile, and serve until SIGINT or SIGTERM."""
    check(options)
    with bound(options.host, options.port) as sock, ended_by(signal.SIGINT, signal.SIGTERM):
        from hypersd_jax.compilation import use_compilation_cache
        from hypersd_jax.serving.command import run_serve

        use_compilation_cache()
        run_serve(options, sock)


@contextlib.contextmanager
def ended_by(*signals: signal.Signals) -> Iterator[None]:
    """Signals end the process with status 0, also while a model is loaded and compiled: nothing is left half done."""
    before = {each: signal.signal(each, lambda *_: sys.exit(0)) for each in signals}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def check(options: argparse.Namespace) -> None:
    """Refuse what is wrong with the options alone, and an installation without the packages that serve."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"serve needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    checks.check_preset(options.preset)
    checks.check_model(options.model)
    options.lora = find_loras(options.lora, options.lora_dir)
    checks.check_loras(options.lora)
    for source in (options.controlnet, options.vae):
        if source:
            checks.check_source(source)


def bound(host: str, port: int) -> socket.socket:
    """A socket that has the address, so that nobody waits for a model in vain; it does not listen yet."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host} --port {port}: cannot be listened on ({reason})") from None
    return sock


def _port(text: str) -> int:
    """The type of ``--port``."""
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 65535, not {text!r}")
    return int(text)


def _token(text: str) -> str:
    """The type of ``--token``."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{16,200}", text):
        raise argparse.ArgumentTypeError("must be 16 to 200 letters, digits, - and _")
    return text
