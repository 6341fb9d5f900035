"""The process of a command: no home folder, other encodings, a closed pipe."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import hypersd_jax as hs
from hypersd_jax import paths
from hypersd_jax.errors import UserError
from hypersd_jax.models.unet import UNetConfig, unet
from hypersd_jax.paths import cache_folder, expanded
from hypersd_jax.weights.lora import write_lora
from tests.helpers.image_sets import with_sidecars
from tests.helpers.lora_files import random_adapter
from tests.helpers.tiny_model import UNET, tiny_model

ROOT = Path(__file__).parents[2]
# A user id without an entry, as in a container.
NOBODY = """
import pwd, sys
def unknown(uid):
    raise KeyError(uid)
pwd.getpwuid = unknown
from hypersd_jax.cli import main
"""
RECIPE = """
output_dir: out
model: {model}
data: {{source: {data}, min_size: 9, resolution: 16}}
lora: {{rank: 2}}
log: {{tensorboard: false}}
stages:
  - {{name: a, k: 1, updates: 1, batch_size: 2, solver_steps: 2}}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny-model")


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    """Without a home folder, and with a temporary one of its own."""
    dropped = ("HOME", "XDG_CACHE_HOME", "HF_HOME", "MPLCONFIGDIR")
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    (tmp_path / "temporary").mkdir(exist_ok=True)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**kept, "TMPDIR": str(tmp_path / "temporary"), "PYTHONPATH": path, **more}


def test_sampling_without_a_home_in_a_locale_of_ascii_under_a_name_that_is_not_utf8(
    model: Path, tmp_path: Path
) -> None:
    variables = environment(tmp_path, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    del variables["JAX_COMPILATION_CACHE_DIR"]
    arguments = ["sample", "--model", str(model), "--prompt", "café", "--steps", "1", "--guidance", "0"]
    command = [sys.executable, "-c", f"{NOBODY}\nmain()", *arguments, "--output", b"caf\xe9-\xc3\xa9.png"]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert done.stdout == b"caf\xe9-\xc3\xa9.png\n"
    assert b"Traceback" not in done.stderr
    folder = tmp_path / "temporary" / f"hypersd_jax-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert any((folder / "jax").iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"temporary", "caf\udce9-é.png"}

    pipe = hs.Pipeline.from_pretrained(model)
    expected = np.asarray(pipe("café", steps=1, guidance=0)[0], int)
    found = np.asarray(Image.open(tmp_path / "caf\udce9-é.png"), int)
    assert np.abs(expected - found).max() <= 1


def test_a_survey_and_a_cache_without_a_home(model: Path, tmp_path: Path) -> None:
    data = with_sidecars(tmp_path / "data", range(4))
    (tmp_path / "r.yaml").write_text(RECIPE.format(model=model, data=data))
    command = [sys.executable, "-c", f"{NOBODY}\nmain()", "cache", "--config", "r.yaml", "--output", "cache"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert (tmp_path / "cache" / "manifest.json").exists()
    surveys = tmp_path / "temporary" / f"hypersd_jax-{os.getuid()}" / "image-sizes"
    assert {path.suffix for path in surveys.iterdir()} == {".npy"}
    assert not (tmp_path / "~").exists()


def test_a_closed_pipe_is_quiet() -> None:
    for arguments, status in ((["doctor"], 1), (["--help"], 0), (["train", "--help"], 0), (["train", "x=1"], 2)):
        read, write = os.pipe()
        os.close(read)
        command = [sys.executable, "-m", "hypersd_jax", *arguments]
        done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
        os.close(write)
        assert done.returncode == status
        assert "Traceback" not in done.stderr
        assert "BrokenPipe" not in done.stderr
        assert done.stderr.count("\n") == (1 if status == 2 else 0)


def test_closed_and_full_outputs() -> None:
    command = f"{sys.executable} -m hypersd_jax"
    shell = {"cwd": ROOT, "shell": True, "capture_output": True, "text": True, "check": False}
    done = subprocess.run(f"{command} train x=1 2>&-", **shell)
    assert (done.returncode, done.stdout) == (2, "")
    done = subprocess.run(f"{command} --version >&-", **shell)
    assert done.returncode == 0
    if Path("/dev/full").exists():
        done = subprocess.run(f"{command} doctor >/dev/full", **shell)
        assert done.returncode == 1
        assert done.stderr == "hypersd: the output: No space left on device\n"


def test_where_caches_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder("jax") == tmp_path / "home" / ".cache" / "hypersd_jax" / "jax"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("jax") == tmp_path / "xdg" / "hypersd_jax" / "jax"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which does not count, by its specification
    assert cache_folder("jax") == tmp_path / "home" / ".cache" / "hypersd_jax" / "jax"
    (tmp_path / "home").write_text("a file: nothing can be written below it")
    private = tmp_path / f"hypersd_jax-{os.getuid()}"
    assert cache_folder("jax") == private / "jax"
    private.chmod(0o777)  # others could put programs there
    assert cache_folder("jax") is None
    private.rmdir()
    private.symlink_to(tmp_path)
    assert cache_folder("jax") is None


def test_a_home_folder_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    assert paths.home() is None
    with pytest.raises(UserError, match="~/x: the home folder is not known; set HOME"):
        expanded("~/x")
    assert expanded("x/~") == "x/~"


def test_the_home_folder_in_python(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    (home / "model").symlink_to(model)
    shapes = unet(UNetConfig.from_dict(UNET), dtype=jnp.float32).shapes
    write_lora("~/a.safetensors", {"unet": random_adapter(shapes, 0)})
    hs.convert_model("~/model", "~/tuned", "diffusers", loras=[("~/a.safetensors", 1.0)])
    with pytest.warns(UserWarning, match="~/model.safetensors: only this package reads these"):
        hs.convert_model("~/model", "~/model.safetensors", "single-file")
    hs.extract_lora("~/model", "~/tuned", "~/b.safetensors", rank=2)
    hs.convert_lora("~/b.safetensors", "~/c.safetensors", "peft", base="~/model")
    hs.merge_loras([("~/a.safetensors", 0.5), ("~/c.safetensors", 1)], "~/d.safetensors", base="~/model")
    assert hs.save_images([Image.new("RGB", (8, 8))], "~/e.png") == [home / "e.png"]
    written = ["a.safetensors", "b.safetensors", "c.safetensors", "d.safetensors", "e.png", "model"]
    assert sorted(path.name for path in home.iterdir()) == [*written, "model.safetensors", "tuned"]
    pipe = hs.Pipeline.from_pretrained("~/model")
    pipe.load_vae("~/model/vae")
    pipe.load_lora("~/a.safetensors")
    pipe.set_lora_scale("a", 0.5)  # named by its stem, like any local file
    with pytest.raises(UserError, match=r"^~/nothing: no such file or folder"):
        pipe.load_lora("~/nothing")
    assert not Path("~").exists()
    Path("~model").symlink_to(model)  # what exists as it is spelled
    hs.Pipeline.from_pretrained("~model")
