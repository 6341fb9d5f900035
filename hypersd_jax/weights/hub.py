"""Models and files by their id on the Hugging Face hub, fetched once and read from its cache from then on.

An id is `owner/name`, or `owner/name@revision` for a branch, a tag or a commit; a file in it is
`owner/name/path/to/file.safetensors`, or `owner/name@revision/path/to/file.safetensors`. A local path of the same
spelling wins. Endpoint, cache, token and offline mode are huggingface_hub's: HF_ENDPOINT, HF_HOME, HF_TOKEN or a login,
HF_HUB_OFFLINE. Nothing but safetensors and the JSON and text beside them is ever fetched.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hypersd_jax.errors import UserError
from hypersd_jax.paths import HubId, expanded, require_id
from hypersd_jax.paths import parse_id as parse_id
from hypersd_jax.weights.diffusers.component import HALF, STEMS
from hypersd_jax.weights.keys import Kind
from hypersd_jax.weights.tensors import PICKLE_SUFFIXES, pickle_message

COMPONENTS: dict[str, Kind] = {"unet": "unet", "vae": "vae", "text_encoder": "clip", "text_encoder_2": "clip"}
"""Folders of a model that hold weights."""

TEXT_FOLDERS = ("scheduler", "tokenizer", "tokenizer_2")
TEXT_SUFFIXES = (".json", ".txt")
LORA_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
LORA_CONFIG = "adapter_config.json"

_SHARD = re.compile(r"-\d{5}-of-(?P<count>\d{5})(\.\w+)?\.safetensors$")


Choice = Callable[[Iterable[str]], list[str]]
"""Names the files to fetch among all of a repository's; what its UserError says goes after the id."""


def fetch_model(source: str | os.PathLike[str]) -> Path:
    """Find the folder or file of a model, or of one component such as a ControlNet or an autoencoder.

    Args:
        source: a local path, returned with its ``~`` replaced, an id, or the id of a single .safetensors file. Of a
            folder's weights one variant is fetched: the full ones, or those in float16 where there are no others,
            which is what `component_files` reads.

    Raises:
        UserError: one line naming the id, where there is no such thing, no access to it, no network, or where its
            weights are only pickled.
    """
    if (local := _local(source)) is not None:
        return local
    found = _require_id(source)
    if found.file is not None and found.file.endswith(".safetensors"):
        return fetch_file(source)
    if found.file is not None:
        raise UserError(f"{source}: no such folder; on the hub a model is owner/name, without a path inside")
    return _snapshot(found, choose_model)[0]


def fetch_description(source: str | os.PathLike[str]) -> Path:
    """Fetch of a model all but its weights, which must be there to fetch; else as `fetch_model`.

    Of a single file by id all is fetched: what it is stands in its header.
    """
    found = None if _local(source) else _require_id(source)
    return fetch_model(source) if found is None or found.file else _snapshot(found, choose_description)[0]


def fetch_configs(source: str | os.PathLike[str]) -> Path:
    """Fetch a model's configurations alone, which is enough for its shapes; else as `fetch_model`."""
    found = None if _local(source) else _require_id(source)
    return fetch_model(source) if found is None or found.file else _snapshot(found, choose_configs)[0]


def fetch_lora(source: str | os.PathLike[str]) -> Path:
    """A LoRA's file: a local path, its ``~`` replaced, an id, or a file in it; raises as `fetch_model` does."""
    if (local := _local(source)) is not None:
        return local
    found = _require_id(source)
    return fetch_file(source) if found.file else _first(_snapshot(found, choose_lora))


def fetch_file(source: str | os.PathLike[str]) -> Path:
    """One safetensors file: a local path, its ``~`` replaced, or a file by id; raises as `fetch_model` does."""
    if (local := _local(source)) is not None:
        return local
    found = _require_id(source)
    file = found.file
    if file is None or not file.endswith(".safetensors"):
        raise UserError(f"{source}: no such file, and not the hub's owner/name/path/to/file.safetensors")

    def choose(files: Iterable[str]) -> list[str]:
        names = set(files)
        if file not in names:
            raise UserError("there is no such file")
        # A PEFT adapter's scale is in a file in its folder.
        return [file, *({(Path(file).parent / LORA_CONFIG).as_posix()} & names)]

    return _first(_snapshot(found, choose))


def choose_model(files: Iterable[str]) -> list[str]:
    """Choose the files of a repository that make up a model, or its one component; UserError without a name."""
    names = set(files)
    if "model_index.json" not in names:
        if "config.json" not in names:
            raise UserError("holds neither model_index.json nor config.json, so no model in diffusers' layout")
        return ["config.json", *_weights(names, "", STEMS["unet"])]
    chosen = ["model_index.json"]
    for folder, kind in COMPONENTS.items():
        if f"{folder}/config.json" in names:
            chosen += [f"{folder}/config.json", *_weights(names, f"{folder}/", STEMS[kind])]
    text = {name for name in names if name.startswith(tuple(f"{folder}/" for folder in TEXT_FOLDERS))}
    return chosen + sorted(name for name in text if name.count("/") == 1 and name.endswith(TEXT_SUFFIXES))


def choose_description(files: Iterable[str]) -> list[str]:
    """Choose of `choose_model`'s files those that hold no weights, which must be there; UserError without a name."""
    return [name for name in choose_model(files) if not name.endswith(".safetensors")]


def choose_configs(files: Iterable[str]) -> list[str]:
    """The configurations of a repository's networks; UserError without a name."""
    names = set(files)
    chosen = [f"{folder}/config.json" for folder in COMPONENTS if f"{folder}/config.json" in names]
    if "unet/config.json" not in chosen:
        raise UserError("holds no unet/config.json, so no model in diffusers' layout")
    return chosen


def choose_lora(files: Iterable[str]) -> list[str]:
    """Choose the files of a repository that make up its LoRA; UserError without a name, and where it holds several."""
    names = {name for name in files if "/" not in name}
    tensors = sorted(name for name in names if name.endswith(".safetensors"))
    known = [name for name in LORA_FILES if name in tensors] or tensors
    if not known:
        raise UserError("holds no .safetensors file at its top; name one as owner/name/path/to/file.safetensors")
    if len(known) > 1 and known[0] not in LORA_FILES:
        listed = ", ".join(known[:3]) + (", ..." if len(known) > 3 else "")
        raise UserError(f"holds {len(known)} files ({listed}); name one as owner/name/{known[0]}")
    return [known[0], *({LORA_CONFIG} & names)]


def _weights(names: set[str], folder: str, stem: str) -> list[str]:
    """The files of one component: single or in shards, full or else in float16."""
    for part in ("", f".{HALF}"):
        single, index = f"{folder}{stem}{part}.safetensors", f"{folder}{stem}.safetensors.index{part}.json"
        if single in names:
            return [single]
        if index in names:
            shards = sorted(
                name for name in names if name.startswith(folder + stem) and (f".{HALF}" in name) == bool(part)
            )
            matches = [match for name in shards if (match := _SHARD.search(name))]
            if matches and {int(match["count"]) for match in matches} == {len(matches)}:
                return [index, *(match.string for match in matches)]
    where = f"{folder}{stem}.safetensors"
    if any(name.startswith(f"{folder}{stem}") and name.endswith((".bin", ".ckpt")) for name in names):
        raise UserError(f"holds no {where}, only pickled weights, which are not read because they can run any code")
    raise UserError(f"holds no (complete) {where}")


def _local(source: str | os.PathLike[str]) -> Path | None:
    """The path of what exists here, its ``~`` replaced; None for what does not."""
    path = expanded(Path(source))
    return path if os.path.exists(path) else None


def _require_id(source: str | os.PathLike[str]) -> HubId:
    found = require_id(source)
    if found.file and Path(found.file).suffix.lower() in PICKLE_SUFFIXES:
        raise UserError(pickle_message(source))
    return found


def _snapshot(found: HubId, choose: Choice) -> tuple[Path, list[str]]:
    """The folder that holds the chosen files of a repository, and their names."""
    from huggingface_hub import HfApi, snapshot_download  # slow to import, and local paths do without

    with _explained(found):
        try:
            listing = HfApi().model_info(found.repo, revision=found.revision).siblings or []
        except (OSError, HTTPError) as error:
            if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
                raise
            return _cached(found, choose)
        chosen = _choose(found, choose, (file.rfilename for file in listing))
        patterns = [glob.escape(name) for name in chosen]
        return Path(snapshot_download(found.repo, revision=found.revision, allow_patterns=patterns)), chosen


def _first(snapshot: tuple[Path, list[str]]) -> Path:
    folder, chosen = snapshot
    return folder / chosen[0]


def _cached(found: HubId, choose: Choice) -> tuple[Path, list[str]]:
    """Find what an earlier call has fetched, for when the hub cannot be reached."""
    from huggingface_hub import snapshot_download

    # No patterns: what is missing is decided below, by the files that are there.
    folder = Path(snapshot_download(found.repo, revision=found.revision, allow_patterns=[], local_files_only=True))
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    try:
        return folder, _choose(found, choose, files)
    except UserError as error:
        raise UserError(f"{error} (offline, from the cache: fetch it once with a network)") from None


def _choose(found: HubId, choose: Choice, files: Iterable[str]) -> list[str]:
    try:
        return choose(files)
    except UserError as error:
        raise UserError(f"{found}: {error}") from None


@contextmanager
def _explained(found: HubId) -> Iterator[None]:
    """Turn an exception of huggingface_hub into one line."""
    endpoint = constants.ENDPOINT
    try:
        yield
    except GatedRepoError:
        reason = (
            f"access is restricted; ask for it at {endpoint}/{found.repo}, then set HF_TOKEN or run `hf auth login`"
        )
    except RepositoryNotFoundError:
        reason = f"no such file or folder, and no such model at {endpoint}; a private one needs HF_TOKEN"
    except RevisionNotFoundError:
        reason = f"{found.repo} has no revision {found.revision}"
    except LocalEntryNotFoundError:
        why = f"{endpoint} does not answer (no network, HF_HUB_OFFLINE, or the hub is down)"
        reason = f"no such file or folder; as a hub id, it is not in the cache and {why}"
    except HFValidationError:
        reason = "no such file or folder, and no valid hub id"
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = f"{endpoint} answered {status}; {'check HF_TOKEN' if status in (401, 403) else 'try again later'}"
    except HTTPError as error:
        reason = f"the download from {endpoint} broke off ({type(error).__name__}); run the command again to resume"
    except OSError as error:
        reason = f"cannot be fetched ({error.strerror or error})"
    else:
        return
    raise UserError(f"{found}: {reason}")
