"""Captions longer than the text encoder reads: counted once for a run, with an example, and not one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hypersd_jax import compilation
from hypersd_jax.cli import main
from tests.helpers.tiny_model import smaller, tiny_model

# The tiny model's encoder reads 22 tokens; a character of these is three. Not one caption has as many characters.
HAN = "".join(chr(0x4E05 + 37 * i) for i in range(9))
CAPTIONS = ["red apple", f"{HAN} one", f"{HAN} two", f"{HAN} three"]
RECIPE = """
output_dir: {output}
model: {model}
data: {{source: {data}, resolution: 16}}
lora: {{rank: 4}}
log: {{tensorboard: false, compilation_cache: false}}
evaluation: {{samples: 0, batch_size: 4}}
stages:
  - {{name: two, k: 2, solver_steps: 4, updates: 3, batch_size: 4}}
  - {{name: one, k: 1, solver_steps: 4, updates: 3, batch_size: 4}}
"""
LINE = (
    "hypersd: warning: 3 captions are longer than the 22 tokens that the text encoder reads; ignored, for example of "
)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(compilation, "use_compilation_cache", lambda: None)
    data = tmp_path / "data"
    data.mkdir()
    for number, caption in enumerate(CAPTIONS):
        Image.fromarray(np.full((16, 16, 3), 60 * number, np.uint8)).save(data / f"{number}.png")
        (data / f"{number}.txt").write_text(caption, encoding="utf-8")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(output=tmp_path / "out", model=smaller(tiny_model(tmp_path / "model")), data=data))
    return path


@pytest.mark.filterwarnings("default")
def test_a_cache_and_a_run_of_two_stages_say_it_once(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert max(map(len, CAPTIONS)) < 22
    cache = config.parent / "cache"
    main(["cache", "--config", str(config), "--output", str(cache), "--batch-size", "3"])
    for command in ([], ["train", "--config", str(config)]):
        if command:
            main(command)
        said = [line for line in capsys.readouterr().err.splitlines() if "longer than" in line]
        assert len(said) == 1
        assert LINE in said[0]
        assert said[0].split(LINE)[1].startswith(f"'{HAN} ")
        assert said[0].split(": ")[-1].startswith(f"'{HAN[7]}")
