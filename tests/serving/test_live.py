"""The protocol, from a client's side: versions, images with their parameters, the teacher, places, and leaving."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from hypersd_jax.serving.engine import Abandoned, Drawn, Engine
from hypersd_jax.serving.worker import Worker
from tests.helpers.infotext import parse
from tests.helpers.live import Canvas, message, picture, unframed

ORIGIN = {"origin": "http://127.0.0.1", "host": "127.0.0.1"}


@pytest.fixture(scope="module")
def client(canvas: Canvas) -> TestClient:
    return TestClient(canvas.app(), base_url="http://127.0.0.1")


@pytest.fixture
def socket(client: TestClient) -> Iterator[Any]:
    with client.websocket_connect("/live", headers=ORIGIN) as opened:
        assert opened.receive_json()["type"] == "hello"
        yield opened


def ask(socket: Any, version: int, **fields: Any) -> None:
    socket.send_text(json.dumps({"version": version, "prompt": "a cat", **fields}))


def images(socket: Any, until: Callable[[dict[str, Any]], bool]) -> list[tuple[dict[str, Any], bytes]]:
    """The images that come, up to one of these."""
    found = []
    while True:
        received = socket.receive()
        if received.get("bytes") is None:
            assert json.loads(received["text"])["type"] == "place"
            continue
        found.append(unframed(received["bytes"]))
        if until(found[-1][0]):
            return found


def text_of(png: bytes) -> Any:
    return parse(Image.open(io.BytesIO(png)).text["parameters"])  # type: ignore[attr-defined]


def test_the_server_says_what_it_has(client: TestClient) -> None:
    with client.websocket_connect("/live", headers=ORIGIN) as opened:
        hello = opened.receive_json()
    with client.websocket_connect("/live", headers=ORIGIN) as opened:
        assert opened.receive_json()["client"] == hello["client"] + 1
    del hello["client"]
    assert hello == {
        "type": "hello",
        "model": "model",
        "vae": None,
        "controlnet": "control",
        "teacher": {"steps": 25, "guidance": 7.5},
        "modes": {"text": [], "image": ["image"], "inpaint": ["image", "mask"], "control": ["image"]},
        "sizes": {"16x16": {"height": 16, "width": 16}},
        "loras": {"fast": 1.0, "style": 0.5},
        "steps": 2,
        "guidance": 0.0,
        "limits": {
            "steps": 8,
            "guidance": 20.0,
            "lora_scale": 2.0,
            "control_scale": 2.0,
            "prompt_characters": 1000,
        },
    }


def test_an_image_comes_with_its_version_and_as_a_png_with_its_parameters(socket: Any) -> None:
    loras = {"fast": 0.25, "style": -1}
    ask(socket, 7, seed=5, steps=3, guidance=2.5, negative="blue", loras=loras)
    ((header, png),) = images(socket, lambda header: header["version"] == 7)
    assert {key: header[key] for key in ("type", "role", "steps", "calls", "seed", "notes")} == {
        "type": "image",
        "role": "student",
        "steps": 3,
        "calls": 6,
        "seed": 5,
        "notes": [],
    }
    assert header["milliseconds"] > 0
    text = text_of(png)
    assert (text.bare_prompt, text.negative) == ("a cat", "blue")
    assert text.loras == [("fast", 0.25), ("style", -1.0)]
    wanted = {"Steps": "3", "Seed": "5", "CFG scale": "2.5", "Sampler": "TCD", "Model": "model"}
    assert {key: text.values[key] for key in wanted} == wanted
    assert Image.open(io.BytesIO(png)).size == (16, 16)


def test_the_same_request_is_the_same_image(socket: Any) -> None:
    for version in (1, 2):
        ask(socket, version, seed=3)
    ask(socket, 3, seed=4)
    found = {header["version"]: png for header, png in images(socket, lambda header: header["version"] == 3)}
    ask(socket, 4, seed=3)
    ((_, again),) = images(socket, lambda header: header["version"] == 4)
    assert again != found[3]
    assert all(again == png for version, png in found.items() if version < 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("mode", ["image", "inpaint", "control"])
def test_pictures_steer(socket: Any, mode: str, kind: str) -> None:
    fields = {"prompt": "a cat", "mode": mode, "steps": 2, "seed": 1}
    sent = {"image": picture(kind, (40, 30))}
    if mode == "inpaint":
        sent["mask"] = picture(kind, (16, 16), "L")
    socket.send_bytes(message({**fields, "version": 1}, **sent))
    ((header, png),) = images(socket, lambda header: header["version"] == 1)
    assert header["role"] == "student"
    assert ("ControlNet 0" in text_of(png).values) == (mode == "control")
    assert ("Denoising strength" in text_of(png).values) == (mode != "control")


def test_the_teacher_follows_when_it_is_asked_for(socket: Any) -> None:
    ask(socket, 1, compare=True)
    student, teacher = images(socket, lambda header: header["role"] == "teacher")
    assert (student[0]["version"], student[0]["role"]) == (1, "student")
    assert {key: teacher[0][key] for key in ("version", "steps", "calls")} == {"version": 1, "steps": 25, "calls": 50}
    assert text_of(teacher[1]).loras == []


def test_a_prompt_that_is_cut_is_noted(socket: Any) -> None:
    ask(socket, 1, prompt="cat " * 100)
    ((header, _),) = images(socket, lambda header: True)
    assert len(header["notes"]) == 1
    assert "cut" in header["notes"][0] or "tokens" in header["notes"][0]


class Slow:
    """An engine that draws nothing, and waits between its steps until it is let go on."""

    teacher = {"steps": 25, "guidance": 1.0}  # noqa: RUF012

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.go = threading.Event()
        self.abandoned = 0

    def draw(self, request: Any, role: str, *, wanted: Callable[[], bool]) -> Any:
        self.begun.append(request.prompt)
        while not self.go.wait(0.005):
            if not wanted():
                self.abandoned += 1
                raise Abandoned
        return Drawn(
            request=request,
            role=role,
            image=np.zeros((16, 16, 3), np.float32),
            settings=SETTINGS,
            seconds=0.1,
            notes=(),
            text="text",
        )


SETTINGS: Any = type("Settings", (), {"steps": 1, "guided": False, "strength": 1.0})


@pytest.fixture
def slow(canvas: Canvas, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    """In place of the canvas's engine."""
    engine = Slow()
    monkeypatch.setattr(canvas.worker, "_engine", engine)
    yield engine
    engine.go.set()


def eventually(true: Callable[[], bool]) -> None:
    for _ in range(1000):
        if true():
            return
        threading.Event().wait(0.005)
    raise AssertionError("it never came true")


def test_only_the_latest_request_is_drawn(socket: Any, slow: Slow) -> None:
    ask(socket, 1, prompt="one")
    eventually(lambda: slow.begun == ["one"])
    for version, prompt in enumerate(("two", "three", "four"), 2):
        ask(socket, version, prompt=prompt)
    ask(socket, 4, prompt="refused")
    while json.loads(socket.receive()["text"])["type"] != "error":
        pass
    slow.go.set()
    found = images(socket, lambda header: header["version"] == 4)
    assert {header["version"] for header, _ in found} <= {1, 4}
    assert slow.begun == ["one", "four"]


def test_clients_are_told_their_place_and_served_in_turn(client: TestClient, slow: Slow) -> None:
    with (
        client.websocket_connect("/live", headers=ORIGIN) as a,
        client.websocket_connect("/live", headers=ORIGIN) as b,
        client.websocket_connect("/live", headers=ORIGIN) as c,
    ):
        for number, opened in enumerate((a, b, c)):
            opened.receive_json()
            ask(opened, 1, prompt=str(number))
            eventually(lambda: slow.begun == ["0"])
            told = opened.receive_json()
            while told["place"] != number:
                told = opened.receive_json()
            assert told["type"] == "place"
        slow.go.set()
        for opened in (a, b, c):
            images(opened, lambda header: True)
    assert slow.begun == ["0", "1", "2"]


def test_who_leaves_costs_nothing(client: TestClient, canvas: Canvas, slow: Slow) -> None:
    """Neither what is being drawn for them nor what waits; the next one's turn comes within a step."""
    with client.websocket_connect("/live", headers=ORIGIN) as a:
        with client.websocket_connect("/live", headers=ORIGIN) as b:
            b.receive_json()
            a.receive_json()
            ask(b, 1, prompt="b")
            eventually(lambda: slow.begun == ["b"])
            ask(b, 2, prompt="b again")
            ask(a, 1, prompt="a")
        eventually(lambda: slow.begun == ["b", "a"])
        assert slow.abandoned == 1
        slow.go.set()
        images(a, lambda header: True)
    eventually(lambda: not canvas.desk.places())


def test_a_teacher_gives_way_to_what_is_newer(socket: Any, slow: Slow) -> None:
    slow.go.set()
    ask(socket, 1, prompt="one", compare=True)
    images(socket, lambda header: header["role"] == "student")
    images(socket, lambda header: header["role"] == "teacher")
    slow.go.clear()
    ask(socket, 2, prompt="two", compare=True)
    eventually(lambda: slow.begun[-1] == "two")
    slow.go.set()
    images(socket, lambda header: header["role"] == "student")
    slow.go.clear()
    slow.begun.clear()
    ask(socket, 3, prompt="three", compare=True)
    eventually(lambda: "three" in slow.begun)


def test_a_defect_ends_nothing(socket: Any, canvas: Canvas, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    engine: Engine = canvas.engine
    assert isinstance(canvas.worker, Worker)

    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("within")

    with monkeypatch.context() as patched:
        patched.setattr(engine, "_draw", broken)
        ask(socket, 1)
        while (told := json.loads(socket.receive()["text"]))["type"] != "error":
            pass
    assert told == {"type": "error", "version": 1, "message": "this could not be drawn; the server's log says why"}
    assert "ZeroDivisionError: within" in capfd.readouterr().err
    ask(socket, 2)
    images(socket, lambda header: header["version"] == 2)
