"""Messages with pictures: the length of a JSON object in four bytes (big end first), the object, the pictures' bytes.

The same both ways. A client's object says under ``pictures`` how many bytes each of its pictures has, in the order in
which they follow: ``{"pictures": {"image": 5120, "mask": 301}}``; the server's messages hold one picture.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

from hypersd_jax.errors import UserError, shown

_LENGTH = struct.Struct(">I")


def pack(header: Mapping[str, Any], picture: bytes) -> bytes:
    """Write a message of the server."""
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return b"".join((_LENGTH.pack(len(text)), text, picture))


def unpack(message: bytes, most: int) -> tuple[dict[str, Any], bytes]:
    """Read a message: its object, and the bytes behind it.

    Args:
        message: of `pack`, or of a client.
        most: bytes that the object may have.

    Raises:
        UserError: it is no such message.
    """
    if len(message) < _LENGTH.size:
        raise UserError("the message is too short")
    (length,) = _LENGTH.unpack_from(message)
    if length > min(most, len(message) - _LENGTH.size):
        raise UserError("the message's length does not fit what follows")
    return read_object(message[_LENGTH.size : _LENGTH.size + length], most), message[_LENGTH.size + length :]


def read_object(text: str | bytes, most: int) -> dict[str, Any]:
    """Read a JSON object strictly: no key twice, no NaN or infinity, UTF-8 without lone surrogates.

    Raises:
        UserError: it is none.
    """
    if len(text) > most:
        raise UserError(f"the message's JSON is longer than {most} bytes")
    try:
        decoded = text.decode() if isinstance(text, bytes) else text
        found = json.loads(decoded, object_pairs_hook=_once, parse_constant=_refuse_constant)
    except UserError:
        raise
    except (ValueError, RecursionError):  # and UnicodeDecodeError, which is one
        raise UserError("the message is not JSON") from None
    if not isinstance(found, dict):
        raise UserError("the message is not a JSON object")
    return found


def split(pictures: Any, rest: bytes, names: tuple[str, ...]) -> dict[str, bytes]:
    """Cut the bytes behind a client's object into its pictures.

    Args:
        pictures: what the object says of them; None for none.
        rest: the bytes.
        names: what they may be called.

    Raises:
        UserError: another name, or lengths that are not those of the bytes.
    """
    found: dict[str, bytes] = {}
    given = {} if pictures is None else pictures
    if not isinstance(given, dict):
        raise UserError("pictures: must be an object")
    for name, length in given.items():
        if name not in names:
            raise UserError(f"pictures: {shown(name)} is not one of {', '.join(names)}")
        if type(length) is not int or not 0 < length <= len(rest):
            raise UserError(f"pictures.{name}: its length does not fit the message")
        found[name], rest = rest[:length], rest[length:]
    if rest:
        raise UserError("bytes are left over behind the pictures")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise UserError("the message has a key twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise UserError(f"{name} is no number here")
