"""`hypersd convert reward`: PyTorch's files as safetensors, and every refusal in one line with nothing left behind."""

from __future__ import annotations

import collections
import importlib
import pickle

import ml_dtypes
import numpy as np
import pytest

import hypersd_jax as hs
from hypersd_jax.cli import main
from hypersd_jax.errors import UserError
from hypersd_jax.weights.tensors import open_tensors

torch = pytest.importorskip("torch")


def state():
    """A transposed view, a shared tensor, a half and an integer."""
    weight = torch.arange(6.0).reshape(2, 3)
    return collections.OrderedDict(
        {
            "a.weight": weight.T,
            "b.weight": weight,
            "scale": torch.tensor(4.5, dtype=torch.bfloat16),
            "n": torch.arange(3),
        }
    )


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("archive", [False, True])
def test_flat_and_wrapped_files_old_and_new(tmp_path, capsys, wrapped, archive):
    content = {"state_dict": state(), "epoch": 3, "optimizer": {"lr": 0.1}} if wrapped else state()
    torch.save(content, tmp_path / "in.pt", _use_new_zipfile_serialization=archive)
    main(["convert", "reward", str(tmp_path / "in.pt"), str(tmp_path / "out.safetensors")])
    assert capsys.readouterr().out == f"{tmp_path / 'out.safetensors'}\n"
    with open_tensors(tmp_path / "out.safetensors") as file:
        found = {key: file.read(key) for key in file.keys()}  # noqa: SIM118
    assert found.keys() == state().keys()
    np.testing.assert_array_equal(found["a.weight"], np.arange(6.0).reshape(2, 3).T)
    assert found["a.weight"].dtype == np.float32
    assert (found["scale"].dtype, float(found["scale"])) == (ml_dtypes.bfloat16, 4.5)
    np.testing.assert_array_equal(found["n"], np.arange(3))


class Code:
    """What a pickle may hold: a call."""

    def __reduce__(self):
        return print, ("this must not be run",)


BAD = {
    "code": (lambda path: path.write_bytes(pickle.dumps({"w": Code()})), "cannot be read as the weights"),
    "module": (lambda path: torch.save(torch.nn.Linear(2, 2), path), "cannot be read as the weights"),
    "text": (lambda path: path.write_text("<html>"), "cannot be read as the weights"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read as the weights"),
    "list": (lambda path: torch.save([torch.zeros(2)], path), "holds 'list', not a dictionary of tensors"),
    "nothing": (lambda path: torch.save({}, path), "holds no tensors"),
    "number": (lambda path: torch.save({"w": torch.zeros(2), "lr": 3}, path), "lr is no tensor under a name"),
    "sparse": (lambda path: torch.save({"w": torch.eye(2).to_sparse()}, path), "w is sparse or quantized"),
    "complex": (
        lambda path: torch.save({"w": torch.zeros(2, dtype=torch.complex64)}, path),
        "w is of type torch.complex64",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files(tmp_path, capsys, kind):
    write, message = BAD[kind]
    write(tmp_path / "in.pt")
    with pytest.raises(SystemExit) as ended:
        main(["convert", "reward", str(tmp_path / "in.pt"), str(tmp_path / "out.safetensors")])
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert message in printed.err
    assert len(printed.err.splitlines()) == 1
    assert printed.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["in.pt"]


def test_names(tmp_path):
    from hypersd_jax.rewards.conversion import convert_reward

    with pytest.raises(UserError, match=r"none\.pt: no such file$"):
        convert_reward(tmp_path / "none.pt", tmp_path / "out.safetensors")
    with pytest.raises(UserError, match=r"is a folder, expected a file$"):
        convert_reward(tmp_path, tmp_path / "out.safetensors")
    with pytest.raises(UserError, match=r"out\.pt: the name of the file to write must end in \.safetensors$"):
        convert_reward(tmp_path / "none.pt", tmp_path / "out.pt")


def test_without_torch(tmp_path, monkeypatch):
    from hypersd_jax.rewards.conversion import convert_reward

    def missing(name):
        raise ImportError(name)

    torch.save(state(), tmp_path / "in.pt")
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UserError, match=r"^reading a PyTorch file takes torch: pip install 'hypersd_jax\[torch\]'$"):
        convert_reward(tmp_path / "in.pt", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("name", ["clip", "aesthetic", "pickscore", "hpsv2", "imagereward"])
def test_rewards_read_no_pytorch_file(tmp_path, name):
    (tmp_path / "weights.pt").write_bytes(b"x")
    for path in (tmp_path / "weights.pt", tmp_path):
        with pytest.raises(UserError, match=r"weights\.pt: .*`hypersd convert reward \S+\.pt \S+\.safetensors`"):
            hs.rewards.load(name, path)
