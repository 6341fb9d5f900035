"""Messages and requests that mean harm: each is refused in one line, none reads a file, and the server goes on."""

from __future__ import annotations

import json
import struct
import sys
import zlib
from typing import Any

import pytest
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect

from hypersd_jax.serving.guard import HEADERS, Entry
from tests.helpers.live import Canvas, framed, message, picture, unframed

ORIGIN = {"origin": "http://127.0.0.1", "host": "127.0.0.1"}
GOOD: dict[str, Any] = {"version": 1, "prompt": "a cat"}
IMAGE: dict[str, Any] = {**GOOD, "mode": "image"}
PNG = picture()


def asks(**fields: Any) -> str:
    return json.dumps({**GOOD, **fields})


def bomb(side: int) -> bytes:
    """A PNG of a few bytes whose header promises side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


HOSTILE: dict[str, tuple[str | bytes, str]] = {
    # no object
    "nothing": ("", "not JSON"),
    "no JSON": ("draw a cat", "not JSON"),
    "half an object": ('{"version": 1', "not JSON"),
    "a list": ("[1, 2]", "not a JSON object"),
    "null": ("null", "not a JSON object"),
    "deeply nested": ('{"a":' * 2000 + "1" + "}" * 2000, ""),  # how deep is too deep the version of Python decides
    "too long": (asks(prompt="x" * 20_000), "longer than"),
    "a key twice": ('{"version": 1, "version": 2, "prompt": ""}', "a key twice"),
    "no bytes": (b"", "too short"),
    "three bytes": (b"\0\0\1", "too short"),
    "length beyond the message": (struct.pack(">I", 1000) + b"{}", "does not fit"),
    "length of 4 GB": (b"\xff\xff\xff\xff{}", "does not fit"),
    "no UTF-8": (framed(b'{"version": 1, "prompt": "\xff\xfe"}'), "not JSON"),
    "pickle": (framed(b"\x80\x04\x95c__builtin__\neval\n."), "not JSON"),
    # fields
    "no version": (json.dumps({"prompt": "a"}), "version is missing"),
    "no prompt": (json.dumps({"version": 1}), "prompt is missing"),
    "an unknown field": (asks(output="/etc/passwd"), "'output' is no field"),
    "a model": (asks(model="../../other"), "'model' is no field"),
    "a prototype": (asks(__proto__={"admin": True}), "is no field"),
    "version 0": (asks(version=0), "version: must be"),
    "a version that is text": (asks(version="1"), "version: must be"),
    "a version that is true": (asks(version=True), "version: must be"),
    "a version beyond numbers": (asks(version=2**60), "version: must be"),
    "a prompt that is a list": (asks(prompt=["a"]), "prompt: must be text"),
    "a prompt that is too long": (asks(prompt="x" * 1001), "more than 1000"),
    "half a character": ('{"version": 1, "prompt": "\\ud800"}', "half a character"),
    "a character of no sign": ('{"version": 1, "prompt": "a\\u0000b"}', "half a character, or none"),
    "a negative prompt that is a number": (asks(negative=3), "negative: must be text"),
    "a negative prompt that is too long": (asks(negative="x" * 1001), "more than 1000"),
    "0 steps": (asks(steps=0), "steps: must be"),
    "a million steps": (asks(steps=10**6), "steps: must be"),
    "half a step": (asks(steps=1.5), "steps: must be"),
    "a seed below 0": (asks(seed=-1), "seed: must be"),
    "a seed beyond 32 bits": (asks(seed=2**32), "seed: must be"),
    "a seed of 5000 digits": ('{"version": 1, "prompt": "", "seed": ' + "9" * 5000 + "}", "not JSON"),
    "guidance that is no number": ('{"version": 1, "prompt": "", "guidance": NaN}', "NaN is no number"),
    "guidance without end": ('{"version": 1, "prompt": "", "guidance": Infinity}', "Infinity is no number"),
    "guidance that overflows": ('{"version": 1, "prompt": "", "guidance": 1e999}', "guidance: must be"),
    "guidance below 0": (asks(guidance=-0.5), "guidance: must be"),
    "a huge whole number": (asks(guidance=10**400), "guidance: must be"),
    "strength above 1": (asks(strength=1.5), "strength: must be"),
    "strength that is text": (asks(strength="1"), "strength: must be"),
    "a control scale of 100": (asks(control_scale=100), "control_scale: must be"),
    "a size that is not offered": (asks(size="4096x4096"), "size: '4096x4096' is not one of"),
    "a size that is a list": (asks(size=[16, 16]), "size: "),
    "a mode that is not there": (asks(mode="video"), "mode: 'video' is not one of"),
    "a mode that is an object": (asks(mode={}), "mode: "),
    "scales that are a list": (asks(loras=[1]), "loras: must be an object"),
    "a LoRA that is a path": (asks(loras={"../../secret.safetensors": 1}), "is not loaded"),
    "a scale of 1e9": (asks(loras={"fast": 1e9}), "loras.fast: must be"),
    "a scale that is true": (asks(loras={"fast": True}), "loras.fast: must be"),
    "compare that is a number": (asks(compare=1), "compare: must be true or false"),
    # pictures
    "a picture for text": (message(GOOD, image=PNG), "pictures: 'image' is not one of"),
    "no picture for an image": (json.dumps(IMAGE), "pictures.image is missing"),
    "no mask": (message({**GOOD, "mode": "inpaint"}, image=PNG), "pictures.mask is missing"),
    "a picture that is a path": (json.dumps({**IMAGE, "pictures": {"image": "/etc/passwd"}}), "its length"),
    "pictures that are a path": (json.dumps({**IMAGE, "pictures": "/etc/passwd"}), "pictures: must be an object"),
    "a picture longer than the message": (framed(json.dumps({**IMAGE, "pictures": {"image": 9}}).encode()), "length"),
    "a picture of length -1": (framed(json.dumps({**IMAGE, "pictures": {"image": -1}}).encode(), PNG), "length"),
    "bytes left over": (message(IMAGE, image=PNG) + b"more", "left over"),
    "no image": (message(IMAGE, image=b"<svg onload=alert(1)>"), "is no PNG, JPEG or WebP"),
    "a script": (message(IMAGE, image=b"%!PS-Adobe-3.0 EPSF-3.0\n"), "is no PNG, JPEG or WebP"),
    "another format": (message(IMAGE, image=picture("TIFF")), "is no PNG, JPEG or WebP"),
    "half a PNG": (message(IMAGE, image=picture(size=(64, 64), compress_level=0)[:900]), "is damaged"),
    "a bomb": (message(IMAGE, image=bomb(50_000)), "is no PNG, JPEG or WebP"),
    "a smaller bomb": (message(IMAGE, image=bomb(2049)), "more than 2048"),
    "a bomb of the largest size": (message(IMAGE, image=bomb(2048)), "is damaged"),
    "16 bits a channel": (message(IMAGE, image=picture(mode="I;16")), "pixels of kind"),
    "a strength that leaves no step": (message({**IMAGE, "steps": 1, "strength": 0.5}, image=PNG), "leaves none"),
    "strength 0": (message({**IMAGE, "strength": 0}, image=PNG), "leaves none"),
}


class Opened:
    """Which files this process opens; a hook of the interpreter, which stays until it ends."""

    def __init__(self) -> None:
        self.watching = False
        self.files: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.watching and event == "open" and not isinstance(arguments[0], int):
            self.files.append(str(arguments[0]))


OPENED = Opened()


@pytest.fixture(scope="module")
def client(canvas: Canvas) -> TestClient:
    return TestClient(canvas.app(refusals=10**6, messages_per_second=1e6), base_url="http://127.0.0.1")


def drawn(socket: Any, version: int) -> dict[str, Any]:
    """Ask for an image, and wait for it."""
    socket.send_text(asks(version=version))
    while True:
        found = socket.receive()
        if found.get("bytes") is not None:
            header, _ = unframed(found["bytes"])
            if header["version"] == version:
                return header


def test_there_are_many_kinds() -> None:
    assert len(HOSTILE) >= 60


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_message_is_refused_in_one_line(client: TestClient, canvas: Canvas, kind: str) -> None:
    sent, reason = HOSTILE[kind]
    with client.websocket_connect("/live", headers=ORIGIN) as socket:
        assert socket.receive_json()["type"] == "hello"
        OPENED.files, OPENED.watching = [], True
        try:
            (socket.send_text if isinstance(sent, str) else socket.send_bytes)(sent)
            found = socket.receive_json()
        finally:
            OPENED.watching = False
        assert found["type"] == "error"
        assert reason in found["message"]
        assert "\n" not in found["message"]
        assert len(found["message"]) < 400
        assert OPENED.files == []
        assert not canvas.desk.places()


def test_a_good_message_is_still_answered(client: TestClient) -> None:
    with client.websocket_connect("/live", headers=ORIGIN) as socket:
        assert drawn(socket, 1)["version"] == 1
        for sent, _ in HOSTILE.values():
            (socket.send_text if isinstance(sent, str) else socket.send_bytes)(sent)
        assert drawn(socket, 2)["version"] == 2
        socket.send_text(asks(version=2))
        while (found := socket.receive()).get("text") is None or "above" not in found["text"]:
            pass
        assert "2 is not above 2" in found["text"]


def test_who_is_refused_too_often_is_shown_out(canvas: Canvas) -> None:
    client = TestClient(canvas.app(refusals=5), base_url="http://127.0.0.1")
    with client.websocket_connect("/live", headers=ORIGIN) as socket:
        socket.receive_json()
        for _ in range(5):
            socket.send_text("{}")
        for _ in range(5):
            assert socket.receive_json() == {"type": "error", "message": "version is missing"}
        with pytest.raises(WebSocketDisconnect) as closed:
            socket.receive_json()
    assert closed.value.code == 1008


def test_too_many_messages_are_not_read(canvas: Canvas) -> None:
    client = TestClient(canvas.app(burst=3, messages_per_second=0.001), base_url="http://127.0.0.1")
    with client.websocket_connect("/live", headers=ORIGIN) as socket:
        socket.receive_json()
        for version in range(1, 6):
            socket.send_text(asks(version=version))
        errors = []
        while len(errors) < 2:
            found = socket.receive()
            if found.get("text") is not None and json.loads(found["text"])["type"] == "error":
                errors.append(json.loads(found["text"])["message"])
        assert errors == ["more than 0.001 messages a second"] * 2


def test_the_places_are_counted(canvas: Canvas) -> None:
    client = TestClient(canvas.app(clients=1), base_url="http://127.0.0.1")
    with client.websocket_connect("/live", headers=ORIGIN) as first:
        assert first.receive_json()["type"] == "hello"
        with client.websocket_connect("/live", headers=ORIGIN) as second:
            assert second.receive_json() == {"type": "full", "message": "all 1 places are taken"}
            with pytest.raises(WebSocketDisconnect) as closed:
                second.receive_json()
            assert closed.value.code == 1013
    with client.websocket_connect("/live", headers=ORIGIN) as third:
        assert third.receive_json()["type"] == "hello"


PATHS = [
    "/etc/passwd",
    "/../../../etc/passwd",
    "/..%2f..%2fetc%2fpasswd",
    "/static/../app.py",
    "/app.py",
    "/index.html",
    "//etc/passwd",
    "/style.css/",
    "/STYLE.CSS",
    "/app.js%00.css",
    "/?file=/etc/passwd&token=x",
    "/live",
    "/docs",
    "/%2e%2e/",
]


@pytest.mark.parametrize("path", PATHS)
def test_no_path_leads_to_a_file(client: TestClient, path: str) -> None:
    OPENED.files, OPENED.watching = [], True
    try:
        answer = client.get(path)
    finally:
        OPENED.watching = False
    assert answer.status_code == (200 if path.startswith("/?") else 404)
    assert OPENED.files == []
    for name, value in HEADERS.items():
        assert answer.headers[name] == value


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_other_methods_are_refused(client: TestClient, method: str) -> None:
    assert client.request(method, "/", content=b"x" * 100).status_code == 405


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost@evil", "", "a b", "[::1", "0.0.0.0"]
)
def test_another_host_is_refused(client: TestClient, host: str) -> None:
    """A name that an attacker's DNS points here does not become this page's origin."""
    assert client.get("/", headers={"host": host}).status_code in (400, 421)


@pytest.mark.parametrize(
    "origin",
    [None, "null", "http://evil.example", "http://127.0.0.1.evil.example", "http://127.0.0.1:81", "file://", ""],
)
def test_another_origin_cannot_connect(client: TestClient, origin: str | None) -> None:
    headers = {"host": "127.0.0.1", **({} if origin is None else {"origin": origin})}
    with (
        pytest.raises((WebSocketDisconnect, WebSocketDenialResponse)),
        client.websocket_connect("/live", headers=headers),
    ):
        pass


@pytest.mark.parametrize("path", ["/", "/live/", "/other", "/app.js"])
def test_there_is_one_socket(client: TestClient, path: str) -> None:
    with pytest.raises(WebSocketDisconnect), client.websocket_connect(path, headers=ORIGIN):
        pass


def test_another_interface_asks_for_a_token(canvas: Canvas) -> None:
    entry = Entry.of("0.0.0.0", 80, None)
    assert entry.token is not None
    assert len(entry.token) >= 32
    assert entry.token in entry.url
    client = TestClient(canvas.app(entry), base_url="http://box.example", follow_redirects=False)
    origin = {"origin": "http://box.example", "host": "box.example"}
    for address in ("/", "/?token=wrong", "/?token=", f"/?token={entry.token}&token={entry.token}", "/app.js"):
        answer = client.get(address)
        assert answer.status_code == 403, address
        assert "the address that the server printed" in answer.text
    for address in ("/live", "/live?token=wrong"):
        with pytest.raises(WebSocketDisconnect), client.websocket_connect(address, headers=origin):
            pass
    with (
        pytest.raises(WebSocketDisconnect),
        client.websocket_connect(f"/live?token={entry.token}", headers={**origin, "origin": "http://evil.example"}),
    ):
        pass
    with client.websocket_connect(f"/live?token={entry.token}", headers=origin) as socket:
        assert socket.receive_json()["type"] == "hello"
    answer = client.get(f"/?token={entry.token}")
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    assert all(word in answer.headers["set-cookie"].lower() for word in ("httponly", "samesite=lax"))
    assert client.get("/").status_code == 200
    assert client.get("/app.js").status_code == 200
    cookie = answer.headers["set-cookie"].partition(";")[0]
    with client.websocket_connect("/live", headers={**origin, "cookie": cookie}) as socket:
        assert socket.receive_json()["type"] == "hello"
