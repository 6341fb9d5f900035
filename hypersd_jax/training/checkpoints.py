"""Checkpoints of the trainable side: a `TrainState` and a dict of metadata, through Orbax.

A checkpoint appears under its final name only when it is complete, and carries a checksum of the state, so that what
`restore` returns is bit for bit what `save` was given, under whatever mesh.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from hypersd_jax.errors import UserError
from hypersd_jax.training.state import TrainState

Metadata = dict[str, Any]
"""JSON-serialisable metadata of a state: stage, counters, fingerprints of base and configuration, data position."""

KEPT = 2
"""The newest checkpoints of a stage that stay."""
HALF_WRITTEN = ".orbax-checkpoint-tmp"
"""In the names of folders that Orbax has not finished."""
QUIET_SECONDS = 1.0


class Checkpointer:
    """The newest checkpoints of one folder. A context manager: leaving it waits for the save in flight.

    In a run of several processes every process calls every method, and the folder is on storage that all of them see.
    """

    def __init__(self, directory: str | Path, keep: int = KEPT, *, read_only: bool = False) -> None:
        """Open or create the folder; what a killed save left half-written is removed.

        Args:
            directory: where the checkpoints live, one sub-folder a step.
            keep: how many of the newest stay.
            read_only: the folder is another run's, which may be saving: what is half-written there stays.

        Raises:
            UserError: the folder cannot be written.
        """
        self.directory = Path(directory).absolute()
        self._saving: ocp.AsyncResponse[bool] | None = None
        self._failed = False
        with self._disk_errors():
            self._orbax = ocp.training.Checkpointer(
                self.directory,
                preservation_policy=ocp.training.preservation_policies.LatestN(keep),
                cleanup_tmp_directories=not read_only,
            )
        self._quiet = _Quiet()

    def save(self, step: int, state: TrainState, metadata: Mapping[str, Any]) -> None:
        """Save as `step`, in place of a checkpoint of that step if there is one.

        Returns once the state has been copied off the devices, so the next step may donate it; it is written in the
        background, and errors surface at the next call.

        Raises:
            UserError: this save, or the one before, could not be written; `close` removes what it wrote.
        """
        self.wait()
        custom = {"facts": json.loads(json.dumps(dict(metadata))), "checksum": _checksum(state)}
        with self._disk_errors():
            self._saving = self._orbax.save_async(
                step, _by_name(state), force=True, overwrite=True, custom_metadata=custom
            )

    def latest(self) -> int | None:
        """Return the newest complete checkpoint's step."""
        self.wait()
        newest = self._orbax.latest
        return None if newest is None else newest.step

    def metadata(self, step: int | None = None) -> Metadata:
        """Read the metadata of a checkpoint (None: the newest) without its state.

        Raises:
            UserError: no such checkpoint, or a damaged one.
        """
        return self._read_metadata(self._resolve(step))[0]["facts"]

    def restore(self, step: int | None, like: TrainState) -> tuple[TrainState, Metadata]:
        """Read a checkpoint back.

        Args:
            step: which one; None takes the newest.
            like: shapes, dtypes and shardings wanted, as from `shardings.abstract`; the mesh may differ from the one
                that saved.

        Raises:
            UserError: naming the folder, when there is no such checkpoint, it is damaged, or its leaves differ from
                those of `like`.
        """
        step = self._resolve(step)
        folder = self.directory / str(step)
        wanted = _by_name(like)
        custom, saved = self._read_metadata(step)
        for name in sorted(wanted.keys() | saved.keys()):
            ours, theirs = (
                f"{leaf.dtype}{list(leaf.shape)}" if (leaf := leaves.get(name)) is not None else "absent"
                for leaves in (wanted, saved)
            )
            if ours != theirs:
                raise UserError(f"checkpoint {folder} does not fit this run: {name} is {theirs} there, {ours} here")
        try:
            leaves = self._orbax.load(step, wanted)
        except Exception as error:
            raise UserError(f"checkpoint {folder} is damaged: {_first_line(error)}; delete the folder") from error
        state = jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in wanted])
        if _checksum(state) != custom["checksum"]:
            raise UserError(f"checkpoint {folder} is damaged: its checksum does not match; delete the folder")
        return state, custom["facts"]

    def wait(self) -> None:
        """Block until the save in flight is complete on disk; raises what went wrong with it."""
        saving, self._saving = self._saving, None
        if saving is not None:
            with self._disk_errors():
                saving.result()

    def close(self) -> None:
        """Wait, and release the folder."""
        try:
            self.wait()
        finally:
            try:
                self._orbax.close()
            except Exception:
                if not self._failed:  # of a failed save, which has been reported, Orbax raises once more
                    raise
            finally:
                if self._failed:
                    self._remove_half_written()
                self._quiet.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Report a refusal of the disk in one line; `close` removes what it left half-written."""
        try:
            yield
        except Exception as error:
            reason = _refusal(error)
            if reason is None:
                raise
            self._failed = True
            raise UserError(
                f"{self.directory}: a checkpoint cannot be written ({reason}); those that are there stay, "
                f"and the same command resumes from the newest"
            ) from None

    def _remove_half_written(self) -> None:
        """Remove them until none is left for a while: threads of the save that failed still run."""
        if jax.process_index() != 0:
            return
        deadline = time.monotonic() + 10 * QUIET_SECONDS
        seen = time.monotonic()
        while time.monotonic() < min(seen + QUIET_SECONDS, deadline):
            for left in self.directory.glob(f"*{HALF_WRITTEN}*"):
                shutil.rmtree(left, ignore_errors=True)
                seen = time.monotonic()
            time.sleep(0.05)

    def _resolve(self, step: int | None) -> int:
        self.wait()
        steps = [each.step for each in self._orbax.checkpoints]
        if not steps:
            raise UserError(f"no checkpoint in {self.directory}")
        if step is None:
            return steps[-1]
        if step not in steps:
            raise UserError(f"no checkpoint of step {step} in {self.directory}, only of {steps}")
        return step

    def _read_metadata(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read what `save` wrote with the state, and the saved leaves' shapes by name."""
        try:
            found = self._orbax.metadata(step)
            custom, leaves = dict(found.custom_metadata), dict(found.metadata)
            if custom.keys() < {"facts", "checksum"}:
                raise ValueError("its metadata are missing")
        except Exception as error:
            folder = self.directory / str(step)
            raise UserError(f"checkpoint {folder} is damaged: {_first_line(error)}; delete the folder") from error
        return custom, leaves


def newest_step(directory: Path) -> int | None:
    """Find the step of the newest complete checkpoint in a folder, which need not exist, without opening it."""
    steps = [int(path.name) for path in directory.glob("*") if path.name.isdigit() and path.is_dir()]
    return max(steps, default=None)


class _Quiet(logging.Filter):
    """Drops what Orbax's threads log of a save that failed, hundreds of lines: its error is raised as well."""

    def __init__(self) -> None:
        super().__init__()
        logging.getLogger("absl").addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.levelno >= logging.ERROR and "orbax" in record.pathname)

    def end(self) -> None:
        logging.getLogger("absl").removeFilter(self)


def _refusal(error: BaseException) -> str | None:
    """The reason of the disk's refusal, in the system's words; None for another kind of error."""
    if isinstance(error, OSError) and error.errno:
        return error.strerror or str(error)
    # TensorStore says it in its own words: "... No space left on device [os_error_code='28'] ...".
    found = re.search(r"os_error_code='(\d+)'", str(error))
    if found:
        return os.strerror(int(found.group(1)))
    for inner in getattr(error, "exceptions", ()):  # of an exception group
        if reason := _refusal(inner):
            return reason
    cause = error.__cause__
    return _refusal(cause) if cause is not None else None


def check_metadata(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Compare a checkpoint's metadata with this run's; entries that `expected` lacks are not compared.

    Raises:
        UserError: naming every entry that differs, and both values.
    """
    wrong = [
        f"{key} is {found.get(key, 'absent')!r} there, {value!r} here"
        for key, value in expected.items()
        if key not in found or found[key] != value
    ]
    if wrong:
        raise UserError("the checkpoint belongs to another run: " + "; ".join(wrong))


def _by_name(state: TrainState) -> dict[str, Any]:
    """The leaves by name, in the tree's order: Orbax stores plain dicts without knowing our or optax's classes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _checksum(state: TrainState) -> int:
    """32-bit sum of the state's words, each leaf's times another odd number; independent of the sharding."""
    sums: list[Callable[[], int]] = []
    for leaf in jax.tree.leaves(state):  # all on their way before the first is waited for
        if leaf.is_fully_addressable:
            # One program over hundreds of leaves takes longer to compile than a small state to train.
            leaf.copy_to_host_async()
            sums.append(functools.partial(_sum_on_host, leaf))
        else:
            sums.append(functools.partial(int, _sum_on_devices(leaf)))
    return sum((2 * index + 1) * words() for index, words in enumerate(sums)) % 2**32


def _sum_on_host(leaf: jax.Array) -> int:
    values = np.ascontiguousarray(np.asarray(leaf))
    return int(np.sum(values.reshape(-1).view(f"uint{8 * values.itemsize}"), dtype=np.uint32))


@jax.jit
def _sum_on_devices(leaf: jax.Array) -> jax.Array:
    words = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}"))
    return jnp.sum(words.astype(jnp.uint32), dtype=jnp.uint32)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
