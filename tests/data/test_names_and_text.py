"""Names and captions that a careless reader would take for something else: each stands for what it says."""

from __future__ import annotations

import json
import os
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest

from hypersd_jax.config import DataConfig
from hypersd_jax.data import ImageTextSource, open_prompts, open_source
from hypersd_jax.errors import UserError
from tests.helpers.image_sets import caption, encoded, numbers, parquet, tar, with_metadata, with_sidecars


def opened(source: str | Path, **keys: object) -> ImageTextSource:
    found = open_source(DataConfig(source=str(source), **keys), resolution=8, seed=0)
    assert isinstance(found, ImageTextSource)
    return found


def epoch(source: ImageTextSource) -> list[int]:
    return sorted(numbers(source.batch(np.arange(len(source)))))


def captions(source: Path) -> list[str]:
    return sorted(opened(source).preview_prompts)


def opened_with_warning(source: str | Path, **keys: object) -> tuple[ImageTextSource, str]:
    """The source, and the one line that is said of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = opened(source, **keys)
    (line,) = (str(each.message) for each in caught)
    assert line.startswith(f"data.source: {source}: ")
    assert "\n" not in line
    return found, line


def shard(path: Path, here: range) -> Path:
    return parquet(path, {"image": [encoded(n) for n in here], "text": [caption(n) for n in here]})


# MARK: paths


@pytest.mark.parametrize("name", ["[artist] set", "{a,b}", "what?", "a*b", "x::y", "50% #1", "[a-c]", "tes't"])
@pytest.mark.parametrize("form", ["sidecars", "jsonl", "csv", "parquet", "tar"])
def test_an_existing_folder_is_taken_by_its_name(form: str, name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    if form == "sidecars":
        with_sidecars(folder, range(3))
    elif form == "parquet":
        shard(folder / "a.parquet", range(3))
    elif form == "tar":
        tar(folder / "a.tar", [{"png": encoded(n), "txt": caption(n).encode()} for n in range(3)])
    else:
        with_metadata(folder, range(3), form)
    assert epoch(opened(folder)) == [0, 1, 2]


@pytest.mark.parametrize("name", ["x[1].parquet", "x{1,2}.parquet", "x?.parquet", "x*.parquet", "x::1.parquet"])
def test_an_existing_file_is_taken_by_its_name_beside_those_that_it_would_match(name: str, tmp_path: Path) -> None:
    for other in ("x1.parquet", "x2.parquet"):
        shard(tmp_path / other, range(5, 7))
    shard(tmp_path / name, range(3))
    assert epoch(opened(tmp_path / name)) == [0, 1, 2]


def test_patterns_in_folders_with_brackets(tmp_path: Path) -> None:
    for number in range(3):
        shard(tmp_path / "[a] {b}" / f"part-{number}.parquet", range(number, number + 1))
    assert epoch(opened(tmp_path / "[a] {b}" / "part-{0..1}.parquet")) == [0, 1]
    assert epoch(opened(tmp_path / "[a] {b}" / "part-[12].parquet")) == [1, 2]
    with_sidecars(tmp_path / "days" / "one", range(2))
    with_sidecars(tmp_path / "days" / "two", range(2, 4))
    assert epoch(opened(tmp_path / "days" / "*")) == [0, 1, 2, 3]


def test_relative_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_sidecars(tmp_path / "set", range(3))
    shard(tmp_path / "a.parquet", range(2))
    monkeypatch.chdir(tmp_path)
    assert epoch(opened("set")) == epoch(opened("set/")) == epoch(opened("./set")) == [0, 1, 2]
    assert epoch(opened("a.parquet")) == epoch(opened("*.parquet")) == [0, 1]
    monkeypatch.chdir(tmp_path / "set")
    assert epoch(opened(".")) == [0, 1, 2]


# MARK: captions


@pytest.mark.parametrize(
    "text", ["007", "2", "2.0", "1e5", "false", "null", "NaN", "2024-01-05", "12:30", "0x10", "NA"]
)
@pytest.mark.parametrize("form", ["csv", "jsonl", "json", "parquet", "tar", "sidecars", "txt"])
def test_captions_stay_as_they_are_written(form: str, text: str, tmp_path: Path) -> None:
    rows = [{"file_name": "0001", "text": text}, {"file_name": "2024-01-05", "text": text}]
    for row in rows:
        (tmp_path / row["file_name"]).write_bytes(encoded(1))
    if form == "csv":
        (tmp_path / "metadata.csv").write_text("file_name,text\n" + "".join(f"{r['file_name']},{text}\n" for r in rows))
    elif form == "jsonl":
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    elif form == "json":
        (tmp_path / "table.json").write_text(json.dumps(rows))
    elif form == "parquet":
        parquet(tmp_path / "a.parquet", {name: [row[name] for row in rows] for name in rows[0]})
    elif form == "tar":
        tar(tmp_path / "a.tar", [{"png": encoded(1), "json": json.dumps({"caption": text}).encode()}] * 2)
    elif form == "sidecars":
        for name in ("a", "b"):
            (tmp_path / f"{name}.png").write_bytes(encoded(1))
            (tmp_path / f"{name}.txt").write_text(text)
    else:
        (tmp_path / "prompts.txt").write_text(f"{text}\n{text}\n")
        assert open_prompts(DataConfig(source=str(tmp_path / "prompts.txt")), seed=0).preview_prompts == [text, text]
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = opened(tmp_path / "table.json" if form == "json" else tmp_path)
        batch = source.batch(np.arange(2))
    assert batch.captions == source.preview_prompts == [text, text]
    assert batch.images.shape[0] == 2


@pytest.mark.parametrize("text", ["7", "2.50", "1e5", "-0", "false", "true"])
def test_json_values_that_are_no_strings_keep_their_spelling(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(1))
    (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "a.png", "text": {text}}}')
    assert captions(tmp_path) == [text]
    tar(tmp_path / "one" / "a.tar", [{"png": encoded(1), "json": f'{{"caption": {text}}}'.encode()}])
    assert [each.lower() for each in captions(tmp_path / "one")] == [text]


def test_fields_with_commas_line_breaks_and_quotes(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(1))
    (tmp_path / "metadata.csv").write_text('file_name,text\r\na.png,"one, ""two""\nthree"\r\n\r\n')
    assert captions(tmp_path) == ['one, "two" three']
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,one, two\n")
    with pytest.raises(UserError, match=r"metadata\.csv cannot be read: line 2 has 3 fields, the header 2"):
        opened(tmp_path)
    (tmp_path / "metadata.csv").write_text('file_name,text\na.png,"one\n')
    with pytest.raises(UserError, match=r"metadata\.csv cannot be read: line 2: unexpected end"):
        opened(tmp_path)


# MARK: encodings


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "table.json", "prompts.txt"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "cp1252", "utf-16", "utf-16-le"])
def test_one_rule_for_the_encoding_of_tables(name: str, encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(1))
    row = json.dumps({"file_name": "a.png", "text": "un café"}, ensure_ascii=False)
    texts = {
        "metadata.jsonl": row,
        "metadata.csv": "file_name,text\na.png,un café",
        "table.json": f"[{row}]",
        "prompts.txt": "un café\n",
    }
    (tmp_path / name).write_bytes(texts[name].encode(encoding))
    source = tmp_path if name.startswith("metadata") else tmp_path / name
    config = DataConfig(source=str(source))
    if encoding == "utf-8-sig":
        assert open_prompts(config, seed=0).preview_prompts == ["un café"]
        return
    with pytest.raises(UserError, match=rf"{name} cannot be read: line \d is not UTF-8 text \(byte 0x"):
        open_prompts(config, seed=0)


def test_a_caption_in_another_encoding_is_counted_and_named(tmp_path: Path) -> None:
    texts = [caption(0).encode("utf-8-sig"), caption(1).encode("utf-16"), "café".encode("cp1252"), caption(3).encode()]
    tar(tmp_path / "tar" / "a.tar", [{"png": encoded(n), "txt": text} for n, text in enumerate(texts)])
    with_sidecars(tmp_path / "files", range(4))
    for number, text in enumerate(texts):
        (tmp_path / "files" / f"{number}.txt").write_bytes(text)
    parquet(tmp_path / "table" / "a.parquet", {"image": [encoded(n) for n in range(4)], "text": texts})
    for form, names in {"tar": "a0001, a0002", "files": r"1\.png, 2\.png", "table": "row 1, row 2"}.items():
        with pytest.warns(UserWarning, match=rf"left out of 4 samples: 2 whose caption is not UTF-8 text \({names}\)"):
            source = opened(tmp_path / form)
        assert epoch(source) == [0, 3]


def test_a_broken_json_in_a_tar_is_counted_and_named(tmp_path: Path) -> None:
    texts = [b'{"caption": "picture 0"}', b'{"caption": "pic', b'{"caption": "picture 2"}']
    tar(tmp_path / "a.tar", [{"png": encoded(n), "json": text} for n, text in enumerate(texts)])
    source, line = opened_with_warning(tmp_path)
    assert "1 whose caption is not valid JSON (a0001)" in line
    assert epoch(source) == [0, 2]


# MARK: files


def test_linked_folders_are_followed_and_circles_are_not(tmp_path: Path) -> None:
    with_sidecars(tmp_path / "elsewhere", range(3))
    with_sidecars(tmp_path / "set", range(3, 5))
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "set" / "circle").symlink_to(tmp_path / "set", target_is_directory=True)
    assert epoch(opened(tmp_path / "set")) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("ending", [".JFIF", ".jpe", ".avif", ".apng", ".jp2", ".bmp", ".tif", ".ppm", ".gif"])
def test_every_ending_of_an_image_is_read(ending: str, tmp_path: Path) -> None:
    form = {".jpe": "JPEG", ".jfif": "JPEG", ".apng": "PNG", ".jp2": "JPEG2000", ".tif": "TIFF"}.get(
        ending.lower(), ending[1:].upper()
    )
    (tmp_path / f"a{ending}").write_bytes(encoded(1, form=form))
    (tmp_path / "a.txt").write_text("one")
    assert captions(tmp_path) == ["one"]
    if ending.islower() and ending != ".gif":
        tar(tmp_path / "tar" / "a.tar", [{ending[1:]: encoded(1, form=form), "txt": b"two"}])
        assert captions(tmp_path / "tar") == ["two"]


@pytest.mark.parametrize("later", [5, 1])
def test_images_of_a_tar_with_several_endings(later: int, tmp_path: Path) -> None:
    samples = [{"png" if n >= later else "jpg": encoded(n), "txt": caption(n).encode()} for n in range(8)]
    tar(tmp_path / "a.tar", samples)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert epoch(opened(tmp_path)) == epoch(opened(tmp_path, image_column="jpg")) == list(range(8))
    depth = [{"jpg": encoded(n), "png": encoded(9), "txt": caption(n).encode()} for n in range(3)]
    tar(tmp_path / "two" / "a.tar", depth)
    assert epoch(opened(tmp_path / "two")) == [0, 1, 2]
    assert opened(tmp_path / "two", image_column="png").batch(np.arange(3)).images[:, 0, 0, 0].max() > 178


def test_images_that_cannot_be_read_are_counted_and_named(tmp_path: Path) -> None:
    with_sidecars(tmp_path, range(2))
    for name in ("phone.heic", "new.JXL"):
        (tmp_path / name).write_bytes(b"x")
        (tmp_path / name).with_suffix(".txt").write_text("a caption")
    (tmp_path / "._0.png").write_bytes(b"what another system leaves")
    source, line = opened_with_warning(tmp_path)
    assert "2 of a format that is not read (new.JXL, phone.heic)" in line
    assert "._0" not in line
    assert epoch(source) == [0, 1]


def test_files_that_the_table_does_not_name_are_counted(tmp_path: Path) -> None:
    with_metadata(tmp_path / "jsonl", range(2))
    shard(tmp_path / "parquet" / "a.parquet", range(2))
    for form in ("jsonl", "parquet"):
        (tmp_path / form / "more").mkdir()
        (tmp_path / form / "more" / "9.png").write_bytes(encoded(9))
        source, line = opened_with_warning(tmp_path / form)
        assert line.endswith("files that are not used: 1 that the table does not name (9.png)")
        assert epoch(source) == [0, 1]
    (tmp_path / "jsonl" / "more" / "9.png").unlink()
    with_sidecars(tmp_path / "sidecars", range(2))
    (tmp_path / "sidecars" / "5.txt").write_text("lost")
    source, line = opened_with_warning(tmp_path / "sidecars")
    assert line.endswith("files that are not used: 1 text files without an image (5.txt)")


@pytest.mark.parametrize("of_image", ["NFC", "NFD"])
@pytest.mark.parametrize("form", ["sidecars", "metadata"])
def test_accents_composed_or_not(form: str, of_image: str, tmp_path: Path) -> None:
    other = {"NFC": "NFD", "NFD": "NFC"}[of_image]
    (tmp_path / unicodedata.normalize(of_image, "café.png")).write_bytes(encoded(1))
    if form == "sidecars":
        (tmp_path / unicodedata.normalize(other, "café.txt")).write_text(caption(1))
    else:
        row = {"file_name": unicodedata.normalize(other, "café.png"), "text": caption(1)}
        (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert epoch(opened(tmp_path)) == [1]


def test_file_names_of_windows(tmp_path: Path) -> None:
    (tmp_path / "one" / "two").mkdir(parents=True)
    (tmp_path / "one" / "two" / "a.png").write_bytes(encoded(1))
    row = {"file_name": "one\\two\\a.png", "text": caption(1)}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert epoch(opened(tmp_path)) == [1]


def test_a_name_that_is_not_utf8_is_counted(tmp_path: Path) -> None:
    with_sidecars(tmp_path, range(2))
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")).write_bytes(encoded(2))
    source, line = opened_with_warning(tmp_path)
    assert r"1 whose name is not UTF-8 ('caf\udce9.png')" in line
    assert epoch(source) == [0, 1]


# MARK: splits


@pytest.mark.parametrize("name", ["val.jsonl", "my-dev-set.parquet", "test.csv", "eval_2.tar", "my test set.parquet"])
def test_a_file_given_by_name_is_used(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if path.suffix == ".parquet":
        shard(path, range(3))
    elif path.suffix == ".tar":
        tar(path, [{"png": encoded(n), "txt": caption(n).encode()} for n in range(3)])
    else:
        (with_metadata(tmp_path, range(3), path.suffix[1:]) / f"metadata{path.suffix}").rename(path)
    assert epoch(opened(path)) == [0, 1, 2]
    if path.suffix in (".parquet", ".tar"):
        assert epoch(opened(tmp_path / f"{path.stem[:-1]}*{path.suffix}")) == [0, 1, 2]
        with pytest.raises(
            UserError, match=r"data\.split: .* has no files of a split 'train'; set data\.split to one of"
        ):
            opened(tmp_path)


def test_folders_of_other_splits_are_left_out_and_counted(tmp_path: Path) -> None:
    with_sidecars(tmp_path / "day", range(2))
    with_sidecars(tmp_path / "test", range(2, 4))
    with_sidecars(tmp_path / "more" / "Val", range(4, 5))
    source, line = opened_with_warning(tmp_path)
    assert line.endswith(
        "files that are not used: 1 in a folder called val (4.png), 2 in a folder called test (2.png, 3.png)"
    )
    assert epoch(source) == [0, 1]
    assert epoch(opened(tmp_path, split="test")) == [2, 3]
    assert epoch(opened(tmp_path / "test")) == [2, 3]
    with_sidecars(tmp_path / "train", range(5, 7))
    source, line = opened_with_warning(tmp_path)
    assert line.endswith("files that are not used: 2 outside the folder train (0.png, 1.png)")
    assert epoch(source) == [5, 6]


def test_a_folder_of_other_splits_alone_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with_metadata(tmp_path / "val", range(2))
    with pytest.raises(
        UserError, match=r"data\.split: all of .* is in folders of other splits; set data\.split to val$"
    ):
        opened(tmp_path)


# MARK: what changed under the same name


@pytest.mark.parametrize("form", ["sidecars", "jsonl", "parquet"])
def test_an_image_replaced_under_the_same_name_is_looked_at_again(form: str, tmp_path: Path) -> None:
    if form == "parquet":
        shard(tmp_path / "a.parquet", range(2))
    else:
        with_sidecars(tmp_path, range(2)) if form == "sidecars" else with_metadata(tmp_path, range(2))
    before = opened(tmp_path, min_size=10)
    assert opened(tmp_path).contents == before.contents
    if form == "parquet":
        parquet(tmp_path / "a.parquet", {"image": [encoded(0), encoded(1, (30, 9))], "text": [caption(0), caption(1)]})
    else:
        (tmp_path / "1.png").write_bytes(encoded(1, (30, 9)))
    source, line = opened_with_warning(tmp_path, min_size=10)
    assert "1 below 10 pixels" in line
    assert epoch(source) == [0]
    assert source.contents != before.contents
    assert source.identity == before.identity
