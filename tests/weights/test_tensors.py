"""Safetensors files: what is read lazily, what is refused, and that a write is all or nothing."""

from __future__ import annotations

import json
import pickle
import struct
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from hypersd_jax.errors import UserError
from hypersd_jax.weights import open_tensors, save_tensors
from hypersd_jax.weights.tensors import replacing

TYPES = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int8", "uint8", "bool"]


def _dtype(name):
    return np.dtype(getattr(ml_dtypes, name, None) or name)


@pytest.mark.parametrize("name", TYPES)
def test_round_trip_of_every_type(tmp_path, name):
    array = np.arange(-6, 6).reshape(3, 4).astype(_dtype(name))
    save_tensors(tmp_path / "a.safetensors", {"before": np.ones(3, np.float32), "x": array, "scalar": array[0, 0]})
    with open_tensors(tmp_path / "a.safetensors") as file:
        assert set(file.keys()) == {"before", "x", "scalar"}
        assert file.shape("x") == (3, 4)
        assert file.dtype("x") == array.dtype
        assert file.read("x").dtype == array.dtype
        assert file.read("x").tobytes() == array.tobytes()
        assert file.shape("scalar") == file.read("scalar").shape == ()


def test_metadata_and_views(tmp_path):
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    save_tensors(tmp_path / "deep" / "er" / "a.safetensors", {"t": array.T, "s": array[:, ::2]}, {"who": "me"})
    file = open_tensors(tmp_path / "deep" / "er" / "a.safetensors")
    assert file.metadata == {"who": "me"}
    np.testing.assert_array_equal(file.read("t"), array.T)
    np.testing.assert_array_equal(file.read("s"), array[:, ::2])
    save_tensors(tmp_path / "b.safetensors", {"t": array})
    assert open_tensors(tmp_path / "b.safetensors").metadata == {}


def test_keys_follow_the_bytes_of_the_file(tmp_path):
    save_tensors(tmp_path / "a.safetensors", {name: np.zeros(4, np.float32) for name in "cab"})
    with safe_open(tmp_path / "a.safetensors", framework="np") as file:
        assert open_tensors(tmp_path / "a.safetensors").keys() == list(file.offset_keys())


def test_arrays_outlive_the_file_and_a_closed_file_says_so(tmp_path):
    save_tensors(tmp_path / "a.safetensors", {"x": np.arange(5.0)})
    with open_tensors(tmp_path / "a.safetensors") as file:
        array = file.read("x")
        with pytest.raises(KeyError, match="no tensor y"):
            file.read("y")
    np.testing.assert_array_equal(array, np.arange(5.0))
    with pytest.raises(ValueError, match="closed"):
        file.read("x")


@pytest.mark.parametrize("name", ["float32", "float8_e4m3fn"])
def test_nothing_is_read_before_it_is_asked_for(tmp_path, name):
    megabyte = np.zeros(2**20, np.uint8).view(_dtype(name))
    save_tensors(tmp_path / "a.safetensors", {f"x{i}": megabyte for i in range(16)})
    tracemalloc.start()
    file = open_tensors(tmp_path / "a.safetensors")
    for key in file.keys():  # noqa: SIM118 - not a mapping
        file.read(key)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * 2**20


def _good(path):
    save_tensors(path, {"x": np.arange(100, dtype=np.float32), "y": np.zeros((3, 4), np.float16)})
    return path.read_bytes()


def _header(content: bytes, data: bytes = b""):
    return struct.pack("<Q", len(content)) + content + data


def _entry(**changes):
    return json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}).encode()


BAD = {
    "empty": (b"", "is empty"),
    "three bytes": (b"abc", "is not a safetensors file"),
    "cut in the data": (lambda path: _good(path)[:-9], r"is truncated: it has \d+ of \d+ bytes"),
    "cut in the header": (lambda path: _good(path)[:40], "is truncated within its header"),
    "bytes after the end": (lambda path: _good(path) + b"x", "is not a valid safetensors file"),
    "git-lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00ff\nsize 12345\n",
        "is a Git LFS pointer, not the weights",
    ),
    "web page": (b"<!DOCTYPE html><html><title>404</title></html>", "is a web page"),
    "web page after blanks": (b"\n\n  <html></html>", "is a web page"),
    "JSON": (b'{"error": "Repository not found"}', "is not a safetensors file"),
    "noise": (bytes(range(255, 0, -1)) * 4, "is not a safetensors file"),
    "header is no JSON": (_header(b"hello there, this is no JSON at all"), "is not a safetensors file"),
    "header is nested deeply": (_header(b'{"a":' * 10**5), "is not a safetensors file|truncated within its header"),
    "offsets are texts": (_header(_entry(data_offsets=["0", "8"]), bytes(8)), "is not a valid safetensors file"),
    "offsets are few": (_header(_entry(data_offsets=[8]), bytes(8)), "is not a valid safetensors file"),
    "offsets are null": (_header(_entry(data_offsets=None), bytes(8)), "is not a valid safetensors file"),
    "header is a list": (_header(b"[1, 2]"), "is not a safetensors file"),
    "shape and bytes disagree": (_header(_entry(shape=[3]), bytes(8)), "is not a valid safetensors file"),
    "unknown type": (_header(_entry(dtype="Q7"), bytes(8)), "is not a valid safetensors file"),
    "pickle under a false name": (pickle.dumps({"x": 1}), "pickled weights are not read"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named_in_one_line(tmp_path, case):
    content, message = BAD[case]
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content(path) if callable(content) else content)
    with pytest.raises(UserError, match=message) as caught:
        open_tensors(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_folder_and_pickles(tmp_path):
    with pytest.raises(UserError, match=r"gone\.safetensors: no such file"):
        open_tensors(tmp_path / "gone.safetensors")
    with pytest.raises(UserError, match="is a folder"):
        open_tensors(tmp_path)
    with zipfile.ZipFile(tmp_path / "zip.safetensors", "w") as archive:
        archive.writestr("archive/data.pkl", b"x")
    with pytest.raises(UserError, match="pickled weights are not read"):
        open_tensors(tmp_path / "zip.safetensors")
    for name in ("a.bin", "a.pt", "a.pth", "a.ckpt", "a.CKPT"):
        _good(tmp_path / name)
        with pytest.raises(UserError, match=rf"{name}: pickled .* use the \.safetensors file"):
            open_tensors(tmp_path / name)


def test_a_header_that_begins_like_a_pickle_is_read(tmp_path):
    # 0x0280 bytes of header: the file starts with 80 02, the magic of pickle protocol 2.
    path = tmp_path / "a.safetensors"
    header = _entry()
    path.write_bytes(_header(header + b" " * (0x280 - len(header)), np.ones(2, np.float32).tobytes()))
    assert path.read_bytes()[:2] == b"\x80\x02"
    np.testing.assert_array_equal(open_tensors(path).read("x"), [1, 1])


def test_more_axes_than_an_array_can_have(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(_header(_entry(shape=[2] + [1] * 299), bytes(8)))
    with pytest.raises(UserError, match=r"a\.safetensors: tensor x has 300 axes"):
        open_tensors(path).read("x")


def _write_half(path):
    with replacing(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError


def test_files_are_as_readable_as_any_other(tmp_path):
    """The writer of safetensors would leave them to their owner alone."""
    (tmp_path / "plain").write_text("")
    save_tensors(tmp_path / "a.safetensors", {"a": np.zeros(2, np.float32)}, {})
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.safetensors"
    before = _good(path)
    with pytest.raises(UserError, match="cannot be written"):
        save_tensors(path, {"x": np.zeros(3, np.complex128)})
    with pytest.raises(RuntimeError):
        _write_half(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be written"):
        save_tensors(tmp_path / "file" / "a.safetensors", {"x": np.zeros(1)})
    with pytest.raises(UserError, match="is a folder"):
        save_tensors(tmp_path, {"x": np.zeros(1)})


def test_one_row_of_a_tensor(tmp_path):
    values = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
    save_tensors(
        tmp_path / "a.safetensors", {"x": values.astype(ml_dtypes.bfloat16), "ids": np.arange(4, dtype=np.int32)}
    )
    with open_tensors(tmp_path / "a.safetensors") as file:
        for row in range(4):
            np.testing.assert_array_equal(file.read_row("x", row), values[row].astype(ml_dtypes.bfloat16))
            assert file.read_row("ids", row) == row
        assert file.read_row("x", 0).dtype == ml_dtypes.bfloat16
