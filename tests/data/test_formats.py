"""Every form that pairs are read from, from real files to images with their own captions."""

from __future__ import annotations

import functools
import http.server
import json
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest

from hypersd_jax.config import DataConfig
from hypersd_jax.data import ImageTextSource, open_source
from hypersd_jax.errors import UserError
from tests.helpers.image_sets import caption, encoded, numbers, parquet, tar, with_metadata, with_sidecars


def opened(source: str | Path, **keys: object) -> ImageTextSource:
    found = open_source(DataConfig(source=str(source), **keys), resolution=8, seed=0)
    assert isinstance(found, ImageTextSource)
    return found


def epoch(source: ImageTextSource) -> list[int]:
    """The images of the first epoch, sorted."""
    batch = source.batch(np.arange(len(source)))
    assert batch.images.shape[1:] == (8, 8, 3)
    return sorted(numbers(batch))


def webdataset(number: int) -> dict[str, bytes]:
    return {"jpg": encoded(number, form="PNG"), "txt": caption(number).encode()}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_folder_with_metadata(kind: str, tmp_path: Path) -> None:
    source = opened(with_metadata(tmp_path / "set", range(3), kind))
    assert epoch(source) == [0, 1, 2]
    assert source.preview_prompts == ["picture 0", "picture 1", "picture 2"]


def test_metadata_of_several_folders_and_splits(tmp_path: Path) -> None:
    with_metadata(tmp_path / "train" / "a", range(2))
    with_metadata(tmp_path / "train" / "b", range(2, 5))
    with_metadata(tmp_path / "test", range(5, 7))
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / ".cache" / "metadata.jsonl").write_text("{}")
    assert epoch(opened(tmp_path)) == [0, 1, 2, 3, 4]
    assert epoch(opened(tmp_path, split="test")) == [5, 6]
    with pytest.raises(UserError, match=r"data\.split: .* has no folder 'valid'"):
        opened(tmp_path, split="valid")


def test_two_metadata_files_of_one_folder_are_refused(tmp_path: Path) -> None:
    with_metadata(tmp_path, range(2))
    with_metadata(tmp_path, range(2), "csv")
    with pytest.raises(UserError, match=r"more than one of metadata\.jsonl"):
        opened(tmp_path)


def test_sidecars(tmp_path: Path) -> None:
    with_sidecars(tmp_path / "part [1]", range(3))
    with_sidecars(tmp_path / "two", range(3, 5))
    assert epoch(opened(tmp_path)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("cell", ["struct", "bytes", "path"])
def test_parquet(cell: str, tmp_path: Path) -> None:
    for shard, here in enumerate((range(2), range(2, 5))):
        cells: list[object] = [encoded(number) for number in here]
        if cell == "struct":
            cells = [{"bytes": data, "path": "x.png"} for data in cells]
        if cell == "path":
            for number in here:
                (tmp_path / f"{number}.png").write_bytes(encoded(number))
            cells = [f"{number}.png" for number in here]
        columns = {"image": cells, "text": [caption(number) for number in here]}
        parquet(tmp_path / f"train-{shard:05d}-of-00002.parquet", columns)
    parquet(tmp_path / "test-00000.parquet", {"image": [encoded(9)], "text": [caption(9)]})
    assert epoch(opened(tmp_path)) == [0, 1, 2, 3, 4]
    assert epoch(opened(tmp_path / "train-00001-of-00002.parquet")) == [2, 3, 4]
    assert epoch(opened(tmp_path / "train-*.parquet")) == [0, 1, 2, 3, 4]
    if cell != "path":
        assert epoch(opened(tmp_path, split="test")) == [9]


def test_parquet_that_datasets_wrote(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"picture": datasets.Image(), "words": datasets.Value("string")})
    rows = {"picture": [encoded(number) for number in range(3)], "words": [caption(number) for number in range(3)]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"has no images: none of its columns \(picture, words\) .*data\.image_column"):
        opened(tmp_path)
    assert epoch(opened(tmp_path, image_column="picture", caption_column="words")) == [0, 1, 2]
    with pytest.raises(UserError, match=r"data\.caption_column: .* has no column 'text'; it has picture, words"):
        opened(tmp_path, image_column="picture", caption_column="text")


def test_a_table_beside_its_images(tmp_path: Path) -> None:
    folder = with_metadata(tmp_path, range(3))
    (folder / "metadata.jsonl").rename(folder / "pairs.jsonl")
    assert epoch(opened(folder / "pairs.jsonl")) == [0, 1, 2]


def test_csv_captions_that_look_like_nothing(tmp_path: Path) -> None:
    with_metadata(tmp_path, range(1), "csv")
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,null\n0.png,NA\n")
    assert sorted(opened(tmp_path).preview_prompts) == ["NA", "null"]


@pytest.mark.parametrize("pattern", [".", "part-0.tar", "part-{0..1}.tar", "part-*.tar", "part-{0,1}.tar"])
def test_webdataset(pattern: str, tmp_path: Path) -> None:
    for shard, here in enumerate((range(2), range(2, 5))):
        tar(tmp_path / f"part-{shard}.tar", map(webdataset, here))
    assert epoch(opened(tmp_path / pattern)) == ([0, 1] if pattern == "part-0.tar" else [0, 1, 2, 3, 4])


def test_webdataset_with_captions_in_json(tmp_path: Path) -> None:
    def sample(number: int) -> dict[str, bytes]:
        facts = {"caption": caption(number), "original": {"caption": [caption(number)]}, "width": 20}
        return {"png": encoded(number), "json": json.dumps(facts).encode()}

    tar(tmp_path / "a.tar", map(sample, range(3)))
    assert epoch(opened(tmp_path)) == [0, 1, 2]
    assert epoch(opened(tmp_path, caption_column="json.original.caption")) == [0, 1, 2]


@pytest.mark.parametrize("form", ["jsonl", "sidecars", "parquet", "tar", "file"])
def test_file_systems_of_fsspec(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    # The suite is offline, by which datasets understands every file system but the local one.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    if form == "parquet":
        parquet(
            tmp_path / "a.parquet", {"image": [encoded(n) for n in range(3)], "text": [caption(n) for n in range(3)]}
        )
    elif form == "tar":
        tar(tmp_path / "a.tar", map(webdataset, range(3)))
    elif form == "sidecars":
        with_sidecars(tmp_path, range(3))
    else:
        with_metadata(tmp_path, range(3))
    if form == "file":
        assert epoch(opened(f"file://{tmp_path}")) == [0, 1, 2]
        return
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path) + "/", f"/{form}/", recursive=True)
    try:
        assert epoch(opened(f"memory://{form}")) == [0, 1, 2]
    finally:
        memory.rm(f"/{form}", recursive=True)


def test_web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aiohttp", reason="fsspec reads web addresses with it")
    import datasets

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with_metadata(tmp_path, range(3))
    for shard in range(2):
        tar(tmp_path / f"part-{shard}.tar", [webdataset(shard)])
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        try:
            assert epoch(opened(f"{address}/metadata.jsonl")) == [0, 1, 2]
            assert epoch(opened(f"{address}/part-{{0..1}}.tar")) == [0, 1]
            assert epoch(opened(f"{address}/part-1.tar?download=true")) == [1]
            with pytest.raises(UserError, match=r"part-9\.tar cannot be read"):
                opened(f"{address}/part-9.tar")
        finally:
            server.shutdown()


def test_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(name: str, *, revision: str | None, split: str) -> datasets.Dataset:
        asked.append((name, revision, split))
        if name == "owner/none":
            raise FileNotFoundError("Dataset 'owner/none' doesn't exist\nsecond line")
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        rows = {"image": [encoded(number) for number in range(3)], "text": [caption(number) for number in range(3)]}
        return datasets.Dataset.from_dict(rows, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    assert epoch(opened("owner/pictures")) == [0, 1, 2]
    assert epoch(opened("hf://datasets/owner/pictures@v1", split="test")) == [0, 1, 2]
    assert asked == [("owner/pictures", None, "train"), ("owner/pictures", "v1", "test")]
    with pytest.raises(UserError, match=r"data\.source: owner/none is no local path, .*doesn't exist\)$"):
        opened("owner/none")
    monkeypatch.undo()
    with_metadata(tmp_path / "owner" / "pictures", range(2))
    monkeypatch.chdir(tmp_path)
    assert epoch(opened("owner/pictures")) == [0, 1]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.png": encoded(0)}, "has no captioned images"),
        ({"notes.md": b"x"}, "has no captioned images"),
        ({}, "is an empty folder"),
        ({"metadata.jsonl": b'{"text": "a"}'}, "has no images"),
        ({"metadata.jsonl": b'{"file_name": "a.png"}'}, "has no captions"),
        ({"metadata.jsonl": b"not json"}, "cannot be read"),
        ({"a.parquet": b"PAR1 broken"}, "cannot be read"),
        ({"a.tar": b"broken"}, "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_said_in_a_line(files: dict[str, bytes], message: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        opened(tmp_path)
    assert str(raised.value).startswith(f"data.source: {tmp_path}")
    assert "\n" not in str(raised.value)


def test_unknown_file_system() -> None:
    with pytest.raises(UserError, match=r"data\.source: nosuch://x cannot be reached"):
        opened("nosuch://x")
