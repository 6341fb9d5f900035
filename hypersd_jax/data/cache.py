"""Encoded pictures and captions on disk: shards of rows by key, and a manifest that says what they were made from.

    CACHE/manifest.json            {"version", "facts", "rows", "arrays", "shards": [{"file", "rows", "sha256"}]}
    CACHE/shard-00000.safetensors  "key" int64 (n,), and each array (n, ...)

A shard appears under its name only when it is whole, and the manifest lists only such shards, so that writing goes on
after any interruption where it stood.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  so that NumPy knows bfloat16
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from hypersd_jax.errors import UserError

VERSION = 1
MANIFEST = "manifest.json"
KEY = "key"

Arrays = dict[str, np.ndarray]


class CacheWriter:
    """Writes shards in order; what an earlier, interrupted run of the same facts wrote is kept."""

    def __init__(self, folder: Path, facts: Mapping[str, Any], keys: np.ndarray, shard_rows: int) -> None:
        """Open the folder, or create it.

        Args:
            folder: of the cache.
            facts: what decides the rows' contents: fingerprints of weights, data and settings; plain JSON.
            keys: (N,) int64, all rows of the finished cache in their order.
            shard_rows: rows a shard.

        Raises:
            UserError: the folder holds a cache of other facts, or is damaged, or cannot be written.
        """
        self.folder = folder
        self._keys = np.asarray(keys, np.int64)
        self._rows = shard_rows
        self._manifest: dict[str, Any] = {
            "version": VERSION,
            "facts": json.loads(json.dumps(dict(facts))),
            "rows": len(keys),
            "keys": hashlib.sha256(self._keys.tobytes()).hexdigest(),
            "shard_rows": shard_rows,
            "shards": [],
        }
        if (folder / MANIFEST).exists():
            found = _read_manifest(folder)
            for name in ("facts", "rows", "keys", "shard_rows"):
                require_same(folder, name, found.get(name), self._manifest[name])
            self._manifest = found
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder}: holds something that is not a cache; name a new folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._save_manifest()
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror})") from None

    @property
    def done(self) -> int:
        """Rows that are on disk."""
        return sum(int(shard["rows"]) for shard in self._manifest["shards"])

    def missing(self) -> Iterator[np.ndarray]:
        """The keys of each shard that is still to be written, in order; call `write` for one before the next."""
        for start in range(self.done, len(self._keys), self._rows):
            yield self._keys[start : start + self._rows]

    def write(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Write the rows of the next missing shard, ``{name: (n, ...)}``.

        Raises:
            UserError: naming the array whose numbers are not finite, or the disk's refusal.
        """
        number = len(self._manifest["shards"])
        keys = self._keys[self.done : self.done + self._rows]
        for name, array in arrays.items():
            if len(array) != len(keys):
                raise ValueError(f"{name} has {len(array)} rows, the shard {len(keys)}")
            if array.dtype.kind not in "iub" and not np.isfinite(array.astype(np.float32)).all():
                raise UserError(f"{self.folder}: {name} of shard {number} is not finite; check the model and the data")
        file = f"shard-{number:05d}.safetensors"
        temporary = self.folder / f".{file}.tmp"
        try:
            temporary.touch()
            mode = temporary.stat().st_mode  # what the umask allows; the library leaves files to their owner alone
            save_file({KEY: keys, **{k: np.ascontiguousarray(v) for k, v in arrays.items()}}, temporary)
            temporary.chmod(mode)
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            digest = _sha256(temporary)
            temporary.replace(self.folder / file)
            self._manifest["shards"].append({"file": file, "rows": len(keys), "sha256": digest})
            self._save_manifest()
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{self.folder / file}: cannot be written ({reason})") from None

    def _save_manifest(self) -> None:
        temporary = self.folder / f".{MANIFEST}.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(self._manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.folder / MANIFEST)


class Cache:
    """A finished cache; rows are read from the disk as they are asked for."""

    def __init__(self, folder: Path, *, verify: bool = False) -> None:
        """Open it.

        Args:
            folder: that `CacheWriter` filled.
            verify: also compare every shard with its checksum, which reads all of it.

        Raises:
            UserError: the folder is no cache, or an unfinished or damaged one.
        """
        self.folder = folder
        manifest = _read_manifest(folder)
        self.facts: dict[str, Any] = manifest["facts"]
        written = sum(int(shard["rows"]) for shard in manifest["shards"])
        if written != manifest["rows"]:
            raise UserError(f"{folder}: {written} of {manifest['rows']} rows are there; run `hypersd cache` to the end")
        self._files: list[Any] = []
        keys, shards, rows = [], [], []
        for number, shard in enumerate(manifest["shards"]):
            path = folder / shard["file"]
            if verify and path.exists() and _sha256(path) != shard["sha256"]:
                raise UserError(f"{path}: damaged, its checksum does not match; delete the cache and write it again")
            try:
                file = safe_open(path, framework="np")
                found = file.get_tensor(KEY)
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None
            if len(found) != shard["rows"]:
                raise UserError(f"{path}: has {len(found)} rows, the manifest says {shard['rows']}")
            self._files.append(file)
            keys.append(found)
            shards.append(np.full(len(found), number))
            rows.append(np.arange(len(found)))
        self._keys, self._shards, self._rows = (np.concatenate(each) for each in (keys, shards, rows))
        order = np.argsort(self._keys, kind="stable")
        self._keys, self._shards, self._rows = self._keys[order], self._shards[order], self._rows[order]
        self.names: tuple[str, ...] = tuple(name for name in self._files[0].keys() if name != KEY)  # noqa: SIM118

    def __len__(self) -> int:
        return len(self._keys)

    def require(self, facts: Mapping[str, Any]) -> None:
        """UserError naming the first fact in which the cache differs from this run's."""
        wanted = json.loads(json.dumps(dict(facts)))
        for name, value in wanted.items():
            require_same(self.folder, name, self.facts.get(name), value)

    def require_rows(self, keys: np.ndarray) -> None:
        """UserError unless all of these rows are there."""
        missing = np.setdiff1d(keys, self._keys)
        if len(missing):
            raise UserError(
                f"{self.folder}: row {int(missing[0])} is not in the cache, one of {len(missing)} that are missing"
            )

    def rows(self, keys: np.ndarray) -> Arrays:
        """Every array's rows of these keys (B,), in their order; a key that is not there is a UserError."""
        keys = np.asarray(keys, np.int64)
        places = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        if not np.array_equal(self._keys[places], keys):
            raise UserError(f"{self.folder}: row {int(keys[self._keys[places] != keys][0])} is not in the cache")
        found = {name: [self._row(name, place) for place in places] for name in self.names}
        return {name: np.stack(values) for name, values in found.items()}

    def _row(self, name: str, place: int) -> np.ndarray:
        row = int(self._rows[place])
        part: np.ndarray = self._files[self._shards[place]].get_slice(name)[row : row + 1]
        return part[0]


def require_same(folder: Path, name: str, found: Any, wanted: Any) -> None:
    """UserError that names the first thing in which a cache is another's."""
    if found == wanted:
        return
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in dict.fromkeys([*found, *wanted]):
            require_same(folder, key, found.get(key), wanted.get(key))
    raise UserError(f"{folder}: the cache was made with {name} {_short(found)}, this run has {_short(wanted)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["version"] != VERSION:
            raise UserError(f"{path}: version {found['version']} of the cache is not known here")
        if not isinstance(found["facts"], dict) or not isinstance(found["rows"], int):
            raise TypeError
        for shard in found["shards"]:
            str(shard["file"]), int(shard["rows"]), str(shard["sha256"])
    except FileNotFoundError:
        raise UserError(f"{folder}: not a cache ({MANIFEST} is missing)") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}: not a cache's manifest") from None
    return dict(found)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
