"""A whole model written back: the same weights and pictures, in one step or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax.errors import UserError
from hypersd_jax.weights.components import load_components
from hypersd_jax.weights.model_folder import save_model
from tests.helpers.tiny_model import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


def test_there_and_back(model: Path, tmp_path: Path) -> None:
    components = load_components(model, dtype=jnp.float32)
    shifted = {**components.params["unet"]}
    shifted["conv_in.bias"] = shifted["conv_in.bias"] + 1.5
    save_model(components, tmp_path / "new" / "copy", params={**components.params, "unet": shifted})
    again = load_components(tmp_path / "new" / "copy", dtype=jnp.float32)
    for name, weights in components.params.items():
        for path, value in weights.items():
            wanted = value + 1.5 if (name, path) == ("unet", "conv_in.bias") else value
            np.testing.assert_array_equal(again.params[name][path], wanted, err_msg=path)
    files = {str(p.relative_to(model)) for p in model.rglob("*") if p.is_file()}
    assert {str(p.relative_to(tmp_path / "new" / "copy")) for p in (tmp_path / "new" / "copy").rglob("*.*")} == files
    assert json.loads((tmp_path / "new" / "copy" / "model_index.json").read_text()) == json.loads(
        (model / "model_index.json").read_text()
    )
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["copy"]


def test_what_is_there_is_not_touched(model: Path, tmp_path: Path) -> None:
    components = load_components(model, dtype=jnp.float32)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match="mine: exists already"):
        save_model(components, tmp_path / "mine")
    with pytest.raises(UserError, match="cannot be written"):
        save_model(components, tmp_path / "mine" / "notes.txt" / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
