"""The log of a run while it trains: metrics.jsonl, TensorBoard events and a progress bar."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
from tqdm import tqdm

from hypersd_jax.errors import UserError
from hypersd_jax.progress import COMPILING, begin_clock

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """The log of one stage. A context manager: leaving it writes the last line.

    Device scalars are fetched one step late, when the step that made them has long finished, so that logging never
    holds up the devices. Only process 0 writes.
    """

    def __init__(
        self, directory: str | Path, total: int, stage: str, resume_step: int = 0, *, tensorboard: bool = True
    ) -> None:
        """Open the log.

        Args:
            directory: the run's output folder; other stages' lines in its metrics.jsonl stay.
            total: training steps of this stage.
            stage: its name, in every line and in TensorBoard's tags.
            resume_step: the restored step; this stage's lines beyond it are dropped, and so is a line that a killed
                run left unfinished, so that the file has each step once.
            tensorboard: also write TensorBoard events, to tensorboard/STAGE in the same folder.

        Raises:
            UserError: naming file and line, when metrics.jsonl holds something else than JSON lines, or the file that
                cannot be written, here or later.
        """
        self.stage = stage
        self._pending: tuple[int, Mapping[str, Any], float] | None = None
        self._last = resume_step, time.perf_counter()
        self._active = jax.process_index() == 0
        self._refused = False
        if not self._active:
            return
        self._path = Path(directory) / METRICS_FILE
        self._events: _Events | None = None
        with self._disk_errors():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _drop_lines(self._path, stage, resume_step or -1)  # step 0 is a measurement before the first step
            self._file = self._path.open("a", encoding="utf-8")
        if tensorboard:
            with self._disk_errors():
                self._events = _Events(self._path.parent / "tensorboard" / stage, resume_step)
        interval = 0.5 if sys.stderr.isatty() else 30.0
        # The first step compiles, which the bar shows and leaves out of its rate.
        self._compiling = resume_step < total
        self._bar = tqdm(
            total=total,
            initial=resume_step,
            desc=f"{stage}: {COMPILING}" if self._compiling else stage,
            unit="step",
            mininterval=interval,
            dynamic_ncols=True,
        )

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Log the step that has just been started.

        Args:
            step: steps of this stage including it: the first is 1.
            metrics: scalars, on the devices or off. `seconds` is added: the mean time of a step since the last line.
        """
        now = time.perf_counter()
        before, then = self._last
        late, self._pending = self._pending, (step, metrics, (now - then) / max(step - before, 1))
        self._last = step, now
        if not self._active:
            return
        for value in metrics.values():
            if isinstance(value, jax.Array):
                value.copy_to_host_async()
        if late is not None:
            self._emit(*late)

    def flush(self) -> None:
        """Write everything down now, to disk: call it before a checkpoint is saved, so that no logged step is lost."""
        late, self._pending = self._pending, None
        if not self._active:
            return
        if late is not None:
            self._emit(*late)
        with self._disk_errors():
            os.fsync(self._file.fileno())
            if self._events is not None:
                self._events.flush()

    def close(self) -> None:
        """Write everything down and close the files."""
        if not self._active:
            return
        try:
            if not self._refused:
                self.flush()
        finally:
            self._bar.close()
            for file in (self._file, self._events):
                if file is not None:
                    with contextlib.suppress(OSError):  # the disk's refusal has been reported
                        file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _emit(self, step: int, metrics: Mapping[str, Any], seconds: float) -> None:
        values = {name: _number(value) for name, value in jax.device_get(dict(metrics)).items()}
        # JSON has no nan: a loss that was not finite, whose step was skipped, is null.
        line = {name: value if math.isfinite(value) else None for name, value in values.items()}
        record = {"stage": self.stage, "step": step, **line, "seconds": round(seconds, 6)}
        with self._disk_errors():
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
            if self._events is not None:
                self._events.write({f"{self.stage}/{name}": value for name, value in values.items()}, step)
        if self._compiling:
            self._compiling = False
            begin_clock(self._bar, self.stage, step)
        self._bar.update(step - self._bar.n)
        if "loss" in values:
            self._bar.set_postfix(loss=f"{values['loss']:.4g}", refresh=False)

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Report a refusal of the disk in one line; nothing more is written after it."""
        try:
            yield
        except OSError as error:
            self._refused = True
            raise UserError(f"{error.filename or self._path}: cannot be written ({error.strerror or error})") from None


class _Events:
    """TensorBoard's events of one stage, written in the thread that logs, which so learns of a full disk."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        """Begin a file; events beyond ``resume_step`` in earlier ones are hidden."""
        # Imported here because it imports PyTorch where that is installed.
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2

        folder.mkdir(parents=True, exist_ok=True)
        self._summary, self._event = summary.scalar, event_pb2.Event
        self._writer = event_file_writer.EventsWriter(str(folder / "events"))
        if resume_step:
            session = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._writer.write_event(event_pb2.Event(step=resume_step + 1, session_log=session))

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Write scalars by tag."""
        for tag, value in values.items():
            event = self._event(wall_time=time.time(), step=step, summary=self._summary(tag, value))
            self._writer.write_event(event)

    def flush(self) -> None:
        """Write all events to disk."""
        self._writer.flush()

    def close(self) -> None:
        """Flush, and close the file."""
        self._writer.close()


def _number(value: Any) -> int | float:
    """A Python number; float32 at the shortest decimal that reads back as the same float32."""
    if getattr(value, "dtype", None) is not None:
        return int(value) if value.dtype.kind in "iub" else float(str(value.astype("float32")))
    return value


def _drop_lines(path: Path, stage: str, resume_step: int) -> None:
    """Rewrite the file without an unfinished last line and without this stage's steps beyond `resume_step`."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    kept = []
    # Text after the last line break was cut short by a kill.
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
            beyond = record["stage"] == stage and record["step"] > resume_step
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{path}: line {number} is not a line of metrics: {line[:60]!r}") from error
        if not beyond:
            kept.append(line + "\n")
    repaired = path.with_suffix(".jsonl.tmp")
    try:
        repaired.write_text("".join(kept), encoding="utf-8")
        os.replace(repaired, path)
    finally:
        repaired.unlink(missing_ok=True)
