"""``hypersd serve`` as a process: its address, its end, and what it refuses before it loads anything."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Origin

from hypersd_jax.commands.serve import bound, check
from hypersd_jax.errors import UserError
from hypersd_jax.serving.guard import Entry, is_loopback
from hypersd_jax.serving.limits import Limits
from tests.helpers.live import Canvas

ROOT = Path(__file__).parents[2]


def started(options: argparse.Namespace, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "hypersd_jax", "serve", "--model", options.model, "--port", "0", *more]
    for file in options.lora:
        command += ["--lora", file]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_it_serves_until_it_is_told_to_end(canvas: Canvas, live_files: argparse.Namespace) -> None:
    process = started(live_files)
    assert process.stdout is not None
    try:
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(url, timeout=10) as answer:
            assert b"hypersd" in answer.read()
            assert "default-src 'self'" in answer.headers["content-security-policy"]
            assert answer.headers["server"] is None
        with pytest.raises(urllib.error.HTTPError, match="421"):
            urllib.request.urlopen(urllib.request.Request(url, headers={"Host": "evil.example"}), timeout=10)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert "Ctrl-C ends the server" in errors


def test_it_ends_while_it_compiles_too(canvas: Canvas, live_files: argparse.Namespace) -> None:
    process = started(live_files)
    assert process.stderr is not None
    try:
        process.stderr.readline()  # the LoRA's report: JAX is there, and nothing is compiled
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert "Traceback" not in errors


RAW = {
    "a path upwards": (b"GET /../../../../etc/passwd HTTP/1.1\r\nHost: HERE\r\n\r\n", b"404"),
    "an escaped path": (b"GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\nHost: HERE\r\n\r\n", b"404"),
    "a whole address": (b"GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\n\r\n", b"421"),
    "two hosts": (b"GET / HTTP/1.1\r\nHost: HERE\r\nHost: evil.example\r\n\r\n", b"400"),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", b"400"),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"400"),
    "endless headers": (b"GET / HTTP/1.1\r\nHost: HERE\r\nX: " + b"x" * 100_000, b"400"),
}


@pytest.fixture(scope="module")
def url(canvas: Canvas) -> Iterator[str]:
    with canvas.served() as served:
        yield served


@pytest.mark.parametrize("kind", RAW)
def test_bytes_that_no_browser_sends(url: str, kind: str) -> None:
    sent, status = RAW[kind]
    host, port = url.removeprefix("http://").strip("/").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(sent.replace(b"HERE", f"{host}:{port}".encode()))
        answer = connection.recv(65536)
    assert answer.split(b" ", 2)[1] == status
    assert b"root:" not in answer


def test_a_message_that_is_too_large_ends_the_connection(url: str) -> None:
    """It is not read to its end, so that the code of the closing may be lost on the way."""
    with connect(f"ws{url.removeprefix('http')}live", origin=Origin(url.strip("/"))) as connection:
        assert '"hello"' in str(connection.recv())
        with pytest.raises(ConnectionClosed) as closed:
            converse(connection, b"x" * (Limits().message_bytes + 1))
    assert closed.value.rcvd is None or closed.value.rcvd.code == 1009


def converse(connection: ClientConnection, sent: bytes) -> None:
    """Send, and read for as long as anything comes."""
    connection.send(sent)
    while True:
        connection.recv()


def test_a_port_that_is_taken_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--host 127.0.0.1 --port {port}: cannot be listened on"):
            bound("127.0.0.1", port)
    with pytest.raises(UserError, match="cannot be listened on"):
        bound("no host of that name", 0)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvicorn" else object())
    with pytest.raises(UserError, match=r"^serve needs uvicorn: pip install uvicorn$"):
        check(argparse.Namespace())


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("localhost", True),
        ("::1", True),
        ("127.3.2.1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.7", False),
        ("box.example", False),
    ],
)
def test_only_this_machine_gets_in_without_a_token(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback
    assert (Entry.of(host, 80, None).token is None) == loopback
    assert Entry.of(host, 80, "a" * 16).token == "a" * 16
