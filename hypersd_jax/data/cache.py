"""Encoded images and captions on disk: shards of examples by key, and a manifest of what they were made from.

    CACHE/manifest.json            {"version", "facts", "rows", "arrays", "shards": [{"file", "rows", "sha256"}]}
    CACHE/shard-00000.safetensors  "key" int64 (n,), and each array (n, ...)

A shard appears under its name only when it is complete, and the manifest lists only such shards, so that writing
resumes after any interruption.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hypersd_jax.errors import UserError
from hypersd_jax.weights.tensors import TensorFile, open_tensors, replacing, save_tensors

VERSION = 1
MANIFEST = "manifest.json"
KEY = "key"
LOCK = ".lock"
"""The file by which a process marks a folder that it writes to."""

Arrays = dict[str, np.ndarray]


class CacheWriter:
    """Writes shards in order; what an earlier, interrupted run with the same metadata wrote is kept."""

    def __init__(self, folder: Path, metadata: Mapping[str, Any], keys: np.ndarray, shard_rows: int) -> None:
        """Open the folder, or create it.

        Args:
            folder: of the cache.
            metadata: what decides the examples' contents: fingerprints of weights, data and settings; plain JSON.
            keys: (N,) int64, all examples of the finished cache in their order.
            shard_rows: examples a shard.

        Raises:
            UserError: the folder holds a cache with other metadata, or is damaged, or cannot be written.
        """
        self.folder = folder
        self._keys = np.asarray(keys, np.int64)
        self._rows = shard_rows
        self._manifest: dict[str, Any] = {
            "version": VERSION,
            "facts": json.loads(json.dumps(dict(metadata))),
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
        elif folder.exists() and (not folder.is_dir() or any(path.name != LOCK for path in folder.iterdir())):
            raise UserError(f"{folder}: holds something that is not a cache; name a new folder")
        self._save_manifest()
        for unfinished in folder.glob(".*.tmp"):  # of a process that was killed while it wrote
            unfinished.unlink()

    @property
    def done(self) -> int:
        """Count the examples that are on disk."""
        return sum(int(shard["rows"]) for shard in self._manifest["shards"])

    def missing(self) -> Iterator[np.ndarray]:
        """Yield the keys of each shard that is missing, in order; call `write` for one before the next."""
        for start in range(self.done, len(self._keys), self._rows):
            yield self._keys[start : start + self._rows]

    def write(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Write the examples of the next missing shard, ``{name: (n, ...)}``.

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
        save_tensors(self.folder / file, {KEY: keys, **arrays})
        digest = _sha256(self.folder / file)
        self._manifest["shards"].append({"file": file, "rows": len(keys), "sha256": digest})
        self._save_manifest()

    def _save_manifest(self) -> None:
        with replacing(self.folder / MANIFEST) as temporary:
            temporary.write_text(json.dumps(self._manifest, indent=1), encoding="utf-8")


class Cache:
    """A finished cache; examples are read from the disk as they are asked for."""

    def __init__(self, folder: Path, *, verify: bool = False) -> None:
        """Open it.

        Args:
            folder: that `CacheWriter` filled.
            verify: also compare every shard with its checksum, which reads all of it: `hypersd cache` ends so.

        Raises:
            UserError: the folder is no cache, or an unfinished or damaged one.
        """
        self.folder = folder
        manifest = _read_manifest(folder)
        self.metadata: dict[str, Any] = manifest["facts"]
        written = sum(int(shard["rows"]) for shard in manifest["shards"])
        if written != manifest["rows"]:
            raise UserError(f"{folder}: {written} of {manifest['rows']} rows are there; run `hypersd cache` to the end")
        self._files: list[TensorFile] = []
        keys, shards, rows = [], [], []
        for number, shard in enumerate(manifest["shards"]):
            path = folder / shard["file"]
            if verify and path.exists() and _sha256(path) != shard["sha256"]:
                raise UserError(f"{path}: damaged, its checksum does not match; delete the cache and write it again")
            file = open_tensors(path)
            found = file.read(KEY) if KEY in file.keys() else np.zeros(0, np.int64)  # noqa: SIM118
            if len(found) != shard["rows"]:
                raise UserError(f"{path}: has {len(found)} rows, the manifest says {shard['rows']}")
            self._files.append(file)
            keys.append(found)
            shards.append(np.full(len(found), number))
            rows.append(np.arange(len(found)))
        self._keys, self._shards, self._rows = (np.concatenate(each) for each in (keys, shards, rows))
        order = np.argsort(self._keys, kind="stable")
        self._keys, self._shards, self._rows = self._keys[order], self._shards[order], self._rows[order]
        self.names: tuple[str, ...] = tuple(sorted(set(self._files[0].keys()) - {KEY}))

    def __len__(self) -> int:
        return len(self._keys)

    def require(self, metadata: Mapping[str, Any]) -> None:
        """Require this run's metadata of the cache; a UserError names the first entry that differs."""
        wanted = json.loads(json.dumps(dict(metadata)))
        for name, value in wanted.items():
            require_same(self.folder, name, self.metadata.get(name), value)

    def require_rows(self, keys: np.ndarray) -> None:
        """Require the examples of these keys; a UserError names one that is missing."""
        missing = np.setdiff1d(keys, self._keys)
        if len(missing):
            raise UserError(
                f"{self.folder}: row {int(missing[0])} is not in the cache, one of {len(missing)} that are missing"
            )

    def rows(self, keys: np.ndarray) -> Arrays:
        """Read every array's entries of these keys (B,), in their order; a key that is not there is a UserError."""
        keys = np.asarray(keys, np.int64)
        indices = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        if not np.array_equal(self._keys[indices], keys):
            raise UserError(f"{self.folder}: row {int(keys[self._keys[indices] != keys][0])} is not in the cache")
        shards, rows = self._shards[indices], self._rows[indices]
        return {
            name: np.stack([self._files[shard].read_row(name, row) for shard, row in zip(shards, rows, strict=True)])
            for name in self.names
        }


def require_same(folder: Path, name: str, found: Any, wanted: Any) -> None:
    """Require one entry of a cache's metadata to be this run's, which a UserError names otherwise."""
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
