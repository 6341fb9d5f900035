"""Who may come in: the Host, the Origin and the token of a request, and the headers of every answer."""

from __future__ import annotations

import dataclasses
import hmac
import ipaddress
import re
import secrets
import socket
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_HOST = re.compile(r"([A-Za-z0-9_.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?")
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Cache-Control": "no-cache",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """How a server is reached.

    Attributes:
        host, port: that it listens on.
        token: that a visitor must have; None where none is asked for.
        names: what the Host header may name; None for any name, which a token then stands for.
    """

    host: str
    port: int
    token: str | None
    names: frozenset[str] | None

    @staticmethod
    def of(host: str, port: int, token: str | None) -> Entry:
        """The entry of an address: beyond the loopback interface with a token, made here if none is given."""
        if is_loopback(host):
            return Entry(host=host, port=port, token=token, names=frozenset((*_LOOPBACK, _bracketed(host))))
        return Entry(host=host, port=port, token=token or secrets.token_urlsafe(24), names=None)

    @property
    def url(self) -> str:
        """Where the page is, with the token."""
        query = f"?token={self.token}" if self.token else ""
        # All interfaces are no address that a browser could open.
        host = socket.gethostname() if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{_bracketed(host)}:{self.port}/{query}"

    @property
    def cookie(self) -> str:
        """The cookie's name; cookies know no ports, so it does."""
        return f"hypersd-{self.port}"

    def refusal(self, scope: Mapping[str, Any]) -> tuple[int, str] | None:
        """Status and reason for which a request is refused; None for a welcome one."""
        hosts = _values(scope, b"host")
        if len(hosts) != 1 or (match := _HOST.fullmatch(hosts[0])) is None:
            return 400, "the Host header is not valid"
        if self.names is not None and match[1].lower() not in self.names:
            return 421, f"this server is not {match[1]}"
        if scope["type"] == "websocket" and _values(scope, b"origin") not in (
            [f"http://{hosts[0]}"],
            [f"https://{hosts[0]}"],
        ):
            return 403, "the Origin is not this server's page"
        if self.token is not None and not self._knows_token(scope):
            return 403, "the token is missing or wrong: open the address that the server printed"
        return None

    def _knows_token(self, scope: Mapping[str, Any]) -> bool:
        found = asked_token(scope)
        for header in _values(scope, b"cookie"):
            try:
                cookie = SimpleCookie(header).get(self.cookie)
            except CookieError:
                continue
            found = cookie.value if cookie is not None and found is None else found
        return found is not None and hmac.compare_digest(found.encode(), str(self.token).encode())


class Guard:
    """Refuses whom `Entry.refusal` names before anything else sees the request, and sets the headers of all answers.

    A page that is opened with the right token in its address gets a cookie instead, so that the token stays in no
    history and no log.
    """

    def __init__(self, app: ASGIApp, entry: Entry) -> None:
        self._app, self._entry = app, entry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through to the application, or refuse it."""
        refused = self._entry.refusal(scope)
        if scope["type"] == "websocket":
            if refused is not None:
                await send({"type": "websocket.close", "code": 1008, "reason": refused[1]})
            else:
                await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *own]}
            await send(message)

        await self._answer(refused, scope)(scope, receive, with_headers)

    def _answer(self, refused: tuple[int, str] | None, scope: Scope) -> ASGIApp:
        if refused is not None:
            return PlainTextResponse(refused[1] + "\n", status_code=refused[0])
        if self._entry.token is None or asked_token(scope) is None:
            return self._app
        answer: Response = RedirectResponse("/", status_code=303)
        answer.set_cookie(self._entry.cookie, self._entry.token, httponly=True, samesite="lax")
        return answer


def is_loopback(host: str) -> bool:
    """Whether nothing but this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def asked_token(scope: Mapping[str, Any]) -> str | None:
    """The token in the address."""
    try:
        found = parse_qs(scope.get("query_string", b"").decode("ascii"), max_num_fields=4).get("token", [])
    except ValueError:
        return None
    return found[0] if len(found) == 1 else None


def _values(scope: Mapping[str, Any], name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name]


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
