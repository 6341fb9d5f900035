"""Lock a folder for one run at a time, by a file that names the process."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hypersd_jax.data.cache import LOCK
from hypersd_jax.errors import UserError
from hypersd_jax.training.first_process import on_first

UNREADABLE_SECONDS = 1.0
"""How long another process may take between making its lock and writing into it."""


class FolderLock:
    """A context manager that locks a folder, made if need be, for this process.

    A lock whose process has died on this machine is replaced. Of several processes of a run the first one locks.
    """

    def __init__(self, folder: str | os.PathLike[str], key: str) -> None:
        """Prepare; ``key`` is the setting that names the folder, for messages."""
        self._folder, self._key = Path(folder), key
        self._path = self._folder / LOCK
        self._made: list[Path] = []
        self._mine = False

    def __enter__(self) -> Self:
        """Take the lock.

        Raises:
            UserError: naming the other process, or why the folder cannot be written.
        """
        on_first(self._lock)
        return self

    def _lock(self) -> None:
        try:
            missing = [path for path in (self._folder, *self._folder.parents) if not path.exists()]
            self._made = missing
            self._folder.mkdir(parents=True, exist_ok=True)
            self._take()
        except OSError as error:
            self.release()
            reason = error.strerror or error
            raise UserError(f"{self._key}: {self._folder} cannot be written ({reason})") from None
        except BaseException:
            self.release()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Remove the lock, and the folders that were made for it and are empty."""
        if self._mine:
            self._mine = False
            self._path.unlink(missing_ok=True)
        for folder in self._made:
            with contextlib.suppress(OSError):  # there is something in it, as there should be
                folder.rmdir()
        self._made = []

    def _take(self) -> None:
        while not self._create():
            holder = self._holder()
            if holder is None:
                continue  # removed meanwhile
            if holder.get("host") != socket.gethostname() or _runs(holder):
                raise UserError(f"{self._key}: {self._folder} is in use by {self._described(holder)}")
            self._move_away(holder)

    def _move_away(self, holder: dict[str, Any]) -> None:
        """Remove the lock of a dead process; of several processes that see it one can."""
        aside = self._path.with_name(f"{LOCK}.{os.getpid()}")
        try:
            self._path.rename(aside)
        except FileNotFoundError:
            return
        if aside.read_text(encoding="utf-8") == json.dumps(holder):
            aside.unlink()
        else:  # another process was faster, and this is its own lock
            aside.rename(self._path)

    def _create(self) -> bool:
        """Make the lock file; return False where there is one."""
        try:
            descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        self._mine = True
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            me = {"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid()), "since": since}
            json.dump(me, file)
        return True

    def _holder(self) -> dict[str, Any] | None:
        """Read the lock file; None where it is gone."""
        deadline = time.monotonic() + UNREADABLE_SECONDS
        while True:
            try:
                found = json.loads(self._path.read_text(encoding="utf-8"))
                if isinstance(found["pid"], int) and isinstance(found["host"], str):
                    return dict(found)
            except FileNotFoundError:
                return None
            except (ValueError, KeyError, TypeError):
                pass
            if time.monotonic() > deadline:
                raise UserError(
                    f"{self._key}: {self._path} is not a lock that can be read; if nothing else works in this folder, "
                    f"delete the file"
                )
            time.sleep(0.05)

    def _described(self, holder: dict[str, Any]) -> str:
        process = f"process {holder['pid']} on {holder['host']}, since {holder.get('since', 'an unknown time')}"
        if holder["host"] == socket.gethostname():
            return f"{process}; wait for it to end, or name another folder"
        return f"{process}; name another folder, or if that process has ended, delete {self._path}"


def _runs(holder: dict[str, Any]) -> bool:
    """Tell whether the process of a lock of this machine still runs, and is not another one under the same number."""
    if holder["pid"] <= 0:
        return False
    try:
        os.kill(holder["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # it is another user's
    return _started(holder["pid"]) == holder.get("started")


def _started(pid: int) -> int | None:
    """Read a process's start in the kernel's ticks: None where the system does not say, -1 where it has ended."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return -1 if status[0] in "ZX" else int(status[19])  # a zombie has ended, but nobody has asked for its status
    except (OSError, ValueError, IndexError):
        return None
