"""The examples run from top to bottom, and the outputs that the notebook is kept with are those of this code."""

from __future__ import annotations

import base64
import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.tiny_model import smaller, tiny_model

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "sampling.ipynb"


def load(path: Path) -> Any:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_mixture() -> None:
    """TSCD and DMD bring a toy's one step nearer to its data by the code that trains Stable Diffusion."""
    mixture = load(ROOT / "examples" / "mixture.py")
    found = mixture.run(400)
    far = {name: mixture.energy_distance(points[:500], found["data"][:500]) for name, points in found.items()}
    assert far["teacher, 50 steps"] < 0.02
    assert far["teacher, 1 step"] > 0.5
    assert far["TSCD, 1 step"] < 0.4
    assert far["TSCD then DMD, 1 step"] < 0.5 * far["TSCD, 1 step"]


@pytest.mark.parametrize("model", ["tiny", "embedded"])
def test_minimal_tscd(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ROOT / "examples" / "minimal_tscd.py"
    assert len(path.read_text().splitlines()) <= 120
    side, given = (64, []) if model == "embedded" else (16, ["--model", str(smaller(tiny_model(tmp_path / "model")))])
    monkeypatch.setattr("sys.argv", [str(path), *given, "--updates", "2", "--output", str(tmp_path)])
    load(path).main()
    assert Image.open(tmp_path / "before-and-after.png").size == (6 * side, 2 * side)
    assert (tmp_path / "student.safetensors").is_file()
    assert "loss: " in capsys.readouterr().out


nbformat = pytest.importorskip("nbformat", reason="the extra `examples`")
pytest.importorskip("nbclient", reason="the extra `examples`")
pytest.importorskip("ipykernel", reason="the extra `examples`")


def output_images(notebook: Any) -> dict[str, np.ndarray]:
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
    fresh = load(ROOT / "scripts" / "run_notebook.py").executed(NOTEBOOK, tmp_path)
    kept = nbformat.read(NOTEBOOK, as_version=4)
    shown, expected = output_images(fresh), output_images(kept)
    assert shown.keys() == expected.keys()
    assert len(shown) == 6
    for name, image in shown.items():
        assert image.shape == expected[name].shape, name
        assert image.std() > 30, name
        # Another processor or compiler rounds otherwise, and an image of few steps hardly amplifies it.
        assert np.abs(image - expected[name]).mean() < 1.0, name
    assert printed(fresh) == printed(kept)
    assert Image.open(tmp_path / "apple.png").size == (64, 64)
    assert (tmp_path / "run" / "loras" / "student.safetensors").is_file()
