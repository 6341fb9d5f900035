"""``hypersd publish``: the folder that it writes, and the upload to a hub on the loopback interface."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from huggingface_hub import constants
from PIL import Image

from hypersd_jax import cli
from hypersd_jax.models.unet import UNetConfig, unet
from hypersd_jax.weights.lora import write_lora
from tests.helpers.hub_server import HubServer, folder_files, serving
from tests.helpers.infotext import parse, text_of
from tests.helpers.lora_files import random_adapter
from tests.helpers.tiny_model import UNET, tiny_model

RECIPE = """
output_dir: {output}
model: {model}
data: {{source: {data}, resolution: 16}}
lora: {{rank: 4}}
stages:
  - {{name: two, k: 2, solver_steps: 8, updates: 6, batch_size: 4, learning_rate: 1.0e-2}}
  - {{name: unified, kind: dmd, steps: [1, 2, 4], updates: 4, batch_size: 4, learning_rate: 1.0e-2}}
  - {{name: unmade, kind: dmd, updates: 4, batch_size: 4, learning_rate: 1.0e-2}}
"""
HEADERS = {
    "two": {"sampler": "ddim", "steps": "2", "eta": "0.0", "guidance": "0.0", "timesteps": "[999, 499]"},
    "unified": {"sampler": "tcd", "steps": "1", "eta": "0.3", "guidance": "0.0", "timesteps": "[999]"},
}
ROW = {
    "model": "two",
    "steps": 2,
    "sampler": "ddim",
    "n": 64,
    "distance": 0.125,
    "protocol": "4f" * 32,
}
TOKEN = "hf_loopback"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with two LoRAs of a tiny model, and one stage that has none yet."""
    root = tmp_path_factory.mktemp("run")
    model, folder = tiny_model(root / "secret place" / "tiny"), root / "out"
    (folder / "loras").mkdir(parents=True)
    (folder / "config.yaml").write_text(RECIPE.format(output=folder, model=model, data="emoji"))
    shapes = unet(UNetConfig.from_dict(UNET), dtype=jnp.float32).shapes
    for seed, (name, header) in enumerate(HEADERS.items()):
        adapter = {"unet": random_adapter(shapes, seed, scale=0.3)}
        write_lora(folder / "loras" / f"{name}.safetensors", adapter, metadata=header)
    (folder / "results.json").write_text(json.dumps([ROW]))
    Image.new("RGB", (32, 16)).save(folder / "grid.png")
    (folder / "report.html").write_text("with paths")
    return folder


@pytest.fixture(scope="module")
def published(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("published") / "fast"
    cli.main(["publish", str(run), "owner/fast", "--dry-run", "--output", str(target), "--license=mit", "--images=2"])
    return target


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(["publish", *arguments])
    printed = capsys.readouterr()
    assert stop.value.code == 2
    # huggingface_hub shows its progress, and that it tries again.
    lines = [line for line in printed.err.splitlines() if line.startswith("hypersd: ")]
    assert len(lines) == 1
    assert TOKEN not in printed.err + printed.out
    return lines[0]


def test_the_folder(published: Path) -> None:
    beside = [f"{name}{end}" for name in HEADERS for end in (".safetensors", ".comfyui.json", ".a1111.txt")]
    images = [f"images/{name}-{number}.png" for name in HEADERS for number in (0, 1)]
    names = {".hypersd_publish", "README.md", "results.json", "grid.png", *beside, *images}
    assert set(folder_files(published)) == names
    assert json.loads((published / "results.json").read_text()) == [ROW]


def test_the_card(published: Path) -> None:
    text = (published / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    matter = yaml.safe_load(head)
    assert (matter["license"], matter["library_name"]) == ("mit", "diffusers")
    assert {"lora", "text-to-image", "tscd", "dmd"} <= set(matter["tags"])
    assert "base_model" not in matter  # a folder has no address
    assert "| `two.safetensors` | ddim | 2 | 999, 499 | 0 | 0 | 4 |" in body
    assert "| `unified.safetensors` | tcd | 1 (also 2, 4) | 999 | 0.3 | 0 | 4 |" in body
    assert f"Protocol `{ROW['protocol']}`" in body
    assert "| 0.125 |" in body
    assert "TCD's eta 0.3 has no node here" in body
    for file in re.findall(r"!\[[^]]*\]\(([^)]+)\)", body):
        assert (published / file).is_file(), file
    assert "secret place" not in text
    assert not any(str(part) in text for part in (published.parent, published.parents[1]))


def test_a_reference_image_is_what_the_card_says(
    published: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Image 1, by its prompt and seed, sampled again by the ordinary command."""
    image = published / "images" / "two-1.png"
    text = parse(text_of(image))
    assert (text.loras, text.values["Seed"], text.values["Steps"]) == ([("two", 1.0)], "1", "2")
    model = str(run.parent / "secret place" / "tiny")
    call = ["--model", model, "--lora", str(published / "two.safetensors"), f"--seed={text.values['Seed']}"]
    cli.main(["sample", *call, f"--prompt={text.bare_prompt}", "--output", str(tmp_path / "again.png")])
    first, again = (np.asarray(Image.open(path)) for path in (image, tmp_path / "again.png"))
    np.testing.assert_array_equal(first, again)


def test_the_commands_of_the_card_parse(published: Path) -> None:
    (block,) = re.findall(r"^```sh\n(.*?)^```", (published / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = block.strip().splitlines()
    assert len(lines) == 2
    for line, name in zip(lines, HEADERS, strict=True):
        options = cli._parser().parse_args(shlex.split(line)[1:])
        assert options.lora == [f"owner/fast/{name}.safetensors"]


def test_again_into_the_same_folder_and_not_into_anothers(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "to"
    call = [str(run), "owner/fast", "--dry-run", "--license=mit", "--images=0", "--output", str(target)]
    cli.main(["publish", *call])
    printed = capsys.readouterr()
    assert "left out: unmade: nothing exported yet" in printed.err
    assert all(Path(line).is_file() for line in printed.out.splitlines())
    (target / "two.safetensors").unlink()
    cli.main(["publish", *call])
    assert (target / "two.safetensors").is_file()
    (target / ".hypersd_publish").unlink()
    assert refused(capsys, *call).endswith("holds other files; name a new folder")
    assert not list(tmp_path.glob(".*"))


def test_the_licence_is_never_invented(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = [str(run), "owner/fast", "--dry-run", "--images=0", "--output", str(tmp_path / "to")]
    assert "--license is missing: the licence of the base" in refused(capsys, *call)
    assert "--license a b: must be an id" in refused(capsys, *call, "--license", "a b")
    cli.main(["publish", *call, "--base-model", "stabilityai/stable-diffusion-xl-base-1.0"])
    matter = yaml.safe_load((tmp_path / "to" / "README.md").read_text().split("---\n")[1])
    assert (matter["license"], matter["base_model"]) == ("openrail++", "stabilityai/stable-diffusion-xl-base-1.0")
    card = run.parent / "secret place" / "tiny" / "README.md"
    card.write_text("---\nlicense: cc0-1.0\n---\nA tiny model.")
    try:
        cli.main(["publish", *call])
    finally:
        card.unlink()
    text = (tmp_path / "to" / "README.md").read_text()
    assert "`cc0-1.0`, that which the base model's own card states." in text


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serving({}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # whose storage is another server
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def call(run: Path, tmp_path: Path) -> list[str]:
    return [str(run), "owner/fast", "--license=mit", "--images=0", "--output", str(tmp_path / "to")]


def test_what_is_uploaded_is_the_folder(
    hub: HubServer, call: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["publish", *call, "--private"])
    assert capsys.readouterr().out == f"{hub.url}/owner/fast\n"
    local = {name: data for name, data in folder_files(tmp_path / "to").items() if name != ".hypersd_publish"}
    assert hub.repos["owner/fast"]["main"] == local
    assert hub.private == {"owner/fast"}
    assert [(repo, set(files)) for repo, files in hub.commits] == [("owner/fast", set(local))]
    cli.main(["publish", *call])  # again, into the repository that is there
    assert len(hub.commits) == 2


def test_a_public_repository_is_not_made_private(
    hub: HubServer, call: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repos["owner/fast"] = {"main": {}}
    assert "is there already and public" in refused(capsys, *call, "--private")
    assert not hub.commits


@pytest.mark.parametrize(
    ("part", "status", "words"),
    [
        ("create", 401, "answered 401; the token is not valid"),
        ("create", 403, "answered 403; the token may not write there"),
        ("commit", 500, "answered 500"),
        ("objects/batch", 403, "answered 403"),
    ],
)
def test_a_failed_upload_is_one_line(
    part: str, status: int, words: str, hub: HubServer, call: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    hub.refused = {part: status}
    line = refused(capsys, *call)
    assert line.startswith(f"hypersd: owner/fast: not uploaded: {hub.url} ")
    assert words in line
    assert not hub.commits


def test_without_a_token_or_a_network(
    hub: HubServer, call: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(capsys, *call)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    assert "uploading needs a token" in refused(capsys, *call)
    assert not (tmp_path / "to").exists()
    assert hub.asked == []
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 does not answer" in refused(capsys, *call)


def test_a_run_without_loras(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text((run / "config.yaml").read_text())
    line = refused(capsys, str(tmp_path / "run"), "owner/fast", "--dry-run", "--license=mit")
    assert "holds no LoRA to publish (two: nothing exported yet;" in line
