"""The process that a command runs in: its encoding, its streams, its caches, and how it ends."""

from __future__ import annotations

import codecs
import errno
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from hypersd_jax.errors import Interrupted, UserError
from hypersd_jax.paths import cache_folder, can_write, home

_UNPRINTABLE = "hypersd_jax.unprintable"


def require_utf8() -> None:
    """Start again in UTF-8 mode where the locale knows ASCII alone and Python was told not to mind.

    Without it names and prompts beyond ASCII could be neither read nor opened.
    """
    if sys.getfilesystemencoding() == "ascii" and sys.executable:
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def settle_environment() -> None:
    """Make the streams take any text, and give the libraries caches that can be written."""
    codecs.register_error(_UNPRINTABLE, _as_bytes)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__"):
            stream.reconfigure(errors=_UNPRINTABLE)
    warnings.showwarning = _one_line_warning
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is absent is as it should be
    own = home()
    # Without a home these would make a folder named ~, or say in several lines where they go instead.
    for variable, folder, name in (("HF_HOME", "huggingface", "huggingface"), ("MPLCONFIGDIR", "", "matplotlib")):
        if own is None or not can_write(own / ".cache" / folder):
            known = own is not None and folder and (own / ".cache" / folder).exists()
            found = None if known or os.environ.get("XDG_CACHE_HOME") else cache_folder(name)
            if found is not None:
                os.environ.setdefault(variable, str(found))


@contextmanager
def exit_status() -> Iterator[None]:
    """Turn what a command raises into an exit status and one line: 2 for bad input, 1 where it could not go on."""
    try:
        yield
        sys.stdout.flush()
    except SystemExit:
        _leave_no_output()
        raise
    except UserError as error:
        _end(2, " ".join(str(error).split()))
    except KeyboardInterrupt as error:
        _end(130, str(error) if isinstance(error, Interrupted) else "stopped")
    except BrokenPipeError:  # whoever read our output has gone
        _end(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _end(1, f"{error.filename or 'the output'}: {error.strerror}")


def _end(status: int, line: str | None = None) -> None:
    if line is not None:
        with suppress(OSError):
            print(f"hypersd: {line}", file=sys.stderr)
    _leave_no_output()
    sys.exit(status)


def _leave_no_output() -> None:
    """Drop what a stream holds that cannot be written, of which Python would complain at the end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _as_bytes(error: UnicodeError) -> tuple[bytes, int]:
    """Replace what a stream's encoding lacks: bytes of a file's name as they are, anything else escaped."""
    assert isinstance(error, UnicodeEncodeError)
    found = b""
    for letter in error.object[error.start : error.end]:
        code = ord(letter)
        found += bytes([code - 0xDC00]) if 0xDC80 <= code <= 0xDCFF else letter.encode("ascii", "backslashreplace")
    return found, error.end


def _one_line_warning(message: Any, *_rest: Any, **_more: Any) -> None:
    print(f"hypersd: warning: {message}", file=sys.stderr)
