"""SIGINT and SIGTERM: a run finishes its training step, saves, and prints where it resumes."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

from hypersd_jax.errors import Interrupted, Terminated

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_SECONDS = 0.3
"""Seconds within which a second signal is the same one: `timeout` and job launchers send theirs twice."""
PATIENCE_SECONDS = 1.5
"""Seconds that Python may not respond, as inside XLA's compiler, before a process with nothing to save is ended."""


class StopSignals:
    """The handler of SIGINT and SIGTERM while a run lasts. A context manager; it restores the handlers before it.

    The first signal raises `Interrupted` or `Terminated` where Python is, but between `hold` and `release` it is
    only noted, and `release` raises. A second one ends the process at once, or outside the command line raises at once.
    Without being entered, or in another thread than the main one, which alone gets signals, it does nothing.

    Attributes:
        where: what the message says after "stopped".
        signal: the first signal that has come.
    """

    def __init__(self, *, alone: bool = False, leave: Callable[[], None] = lambda: None) -> None:
        """Prepare; nothing is installed yet.

        Args:
            alone: the process is for this run alone, as the command line's is. Then a thread watches for signals that
                Python cannot handle, since it waits for the compiler, and ends the process. A notebook is not ended.
            leave: undoes what must not stay even so, such as a lock file.
        """
        self.where = "before anything was done"
        self.signal: int | None = None
        self._alone, self._leave = alone, leave
        self._held = False
        self._first = 0.0
        self._before: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._wakeup = -1

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` and a shell's `&` have it
                self._before[number] = signal.signal(number, self._handle)
        if self._alone and self._before:
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(self._pipe[0],), name="signals", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()
        if self._pipe is not None:
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._pipe[1])  # ends the thread, which closes the other end
            self._pipe = None
        if isinstance(error, Terminated):  # of which Python itself prints nothing
            print(f"hypersd: {error}", file=sys.stderr, flush=True)

    def hold(self) -> None:
        """Delay signals until `release`: a training step runs, or is being saved."""
        self._held = True

    def release(self) -> None:
        """Raise for a signal that has come since `hold`."""
        self._held = False
        if self.signal is not None:
            raise self.error(self.signal)

    def error(self, number: int) -> Interrupted | Terminated:
        """Make the exception that a signal raises."""
        kind = Terminated if number == signal.SIGTERM else Interrupted
        return kind(f"stopped {self.where}")

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._first = number, time.monotonic()
            if self._held:
                if self._alone:
                    # Not print: the signal may have come while something else was being printed.
                    os.write(2, b"\nhypersd: stopping after the update in hand; a second signal stops at once\n")
                return
        elif time.monotonic() - self._first < SAME_SECONDS:
            return
        raise self.error(number)

    def _watch(self, read_end: int) -> None:
        """Runs in a thread: the bytes that arrive are the numbers of signals, whatever Python is doing."""
        first: float | None = None
        while received := os.read(read_end, 1):
            number = received[0]
            if number not in SIGNALS:
                continue
            if first is None:
                first = time.monotonic()
                deadline = first + PATIENCE_SECONDS
                while self.signal is None and not self._held and time.monotonic() < deadline:
                    time.sleep(0.01)
                if self.signal is None and not self._held and self._pipe is not None:
                    self._end(number, f"stopped {self.where}")
            elif time.monotonic() - first >= SAME_SECONDS:
                self._end(number, "stopped at once; the same command resumes at the last checkpoint")
        os.close(read_end)

    def _end(self, number: int, message: str) -> None:
        self._leave()
        print(f"\nhypersd: {message}", file=sys.stderr, flush=True)
        os._exit(128 + number)
