"""The notebook runs from top to bottom, and the outputs that it is kept with are those of this code."""

from __future__ import annotations

import base64
import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "sampling.ipynb"

nbformat = pytest.importorskip("nbformat", reason="the extra `examples`")
pytest.importorskip("nbclient", reason="the extra `examples`")
pytest.importorskip("ipykernel", reason="the extra `examples`")


def load_runner() -> Any:
    spec = importlib.util.spec_from_file_location("run_notebook", ROOT / "scripts" / "run_notebook.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pictures(notebook: Any) -> dict[str, np.ndarray]:
    """What cells show, by cell."""
    found = {}
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if data := output.get("data", {}).get("image/png"):
                found[cell.id] = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"), np.float32)
    return found


def printed(notebook: Any) -> str:
    streams = [
        output for cell in notebook.cells for output in cell.get("outputs", ()) if output.get("name") == "stdout"
    ]
    return "".join("".join(output["text"]) for output in streams)


def test_what_is_kept() -> None:
    kept = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(kept)
    counts = [cell.execution_count for cell in kept.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    outputs = [output for cell in kept.cells for output in cell.get("outputs", ())]
    assert {output.output_type for output in outputs} == {"stream", "execute_result"}
    assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}
    assert NOTEBOOK.stat().st_size < 400_000
    assert str(ROOT) not in NOTEBOOK.read_text(encoding="utf-8")


def test_it_runs_from_top_to_bottom(tmp_path: Path) -> None:
    fresh = load_runner().executed(NOTEBOOK, tmp_path)
    kept = nbformat.read(NOTEBOOK, as_version=4)
    shown, expected = pictures(fresh), pictures(kept)
    assert shown.keys() == expected.keys()
    assert len(shown) == 6
    for name, picture in shown.items():
        assert picture.shape == expected[name].shape, name
        assert picture.std() > 30, name
        # Another processor or compiler rounds otherwise, and a picture of few steps hardly amplifies it.
        assert np.abs(picture - expected[name]).mean() < 1.0, name
    assert printed(fresh) == printed(kept)
    assert Image.open(tmp_path / "apple.png").size == (64, 64)
    assert (tmp_path / "run" / "loras" / "student.safetensors").is_file()
