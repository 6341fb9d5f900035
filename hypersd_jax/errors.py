"""Errors that the person at the keyboard can mend."""

from __future__ import annotations

_SHOWN = 200


class UserError(Exception):
    """Bad usage or bad input: one line that names the file or key at fault.

    The command line prints the message alone and exits with status 2; everything else is a defect of ours and keeps
    its traceback.
    """


class Interrupted(KeyboardInterrupt):
    """A run that Ctrl-C (SIGINT) has ended, after what can be saved was saved; the message says where it resumes."""


class Terminated(SystemExit):
    """A run that SIGTERM, which job schedulers send, has ended; exit status 143."""

    def __init__(self, message: str) -> None:
        """End the process with 128 + 15, as shells report it, and not with the message."""
        super().__init__(143)
        self.message = message

    def __str__(self) -> str:
        return self.message


def shown(value: object) -> str:
    """A value as a message shows it: of what is long the beginning."""
    return short(repr(value))


def short(text: object) -> str:
    """The beginning of a text, such as another library's message, that may quote a whole file."""
    text = str(text)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
