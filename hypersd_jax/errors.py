"""Errors that the person at the keyboard can mend."""

from __future__ import annotations

_SHOWN = 200


class UserError(Exception):
    """Bad usage or bad input: one line that names the file or key at fault.

    The command line prints the message alone and exits with status 2; everything else is a defect of ours and keeps
    its traceback.
    """


def shown(value: object) -> str:
    """A value as a message shows it: of what is long the beginning."""
    return short(repr(value))


def short(text: object) -> str:
    """The beginning of a text, such as another library's message, that may quote a whole file."""
    text = str(text)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
