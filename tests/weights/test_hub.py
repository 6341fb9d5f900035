"""Models and files by hub id, fetched from a hub on the loopback interface."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from hypersd_jax.bases import describe_base, load_base
from hypersd_jax.errors import UserError
from hypersd_jax.models import UNetConfig, unet
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.weights import convert_lora, open_tensors, write_lora
from hypersd_jax.weights.components import load_components
from hypersd_jax.weights.hub import (
    HubId,
    choose_lora,
    choose_model,
    fetch_configs,
    fetch_file,
    fetch_lora,
    fetch_model,
    parse_id,
)
from tests.helpers.hub_server import Files, HubServer, commit, folder_files, serving
from tests.helpers.lora_files import random_adapter
from tests.helpers.tiny_model import UNET, tiny_model

LORA: Files = {"a.safetensors": b"A", "sub/b.safetensors": b"BB", "adapter_config.json": b"{}"}
PEFT: Files = {"adapter_model.safetensors": b"P", "adapter_config.json": b"{}", "README.md": b"#"}


@pytest.fixture(scope="module")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A tiny model, with what repositories hold beside the files that are read."""
    files = folder_files(tiny_model(tmp_path_factory.mktemp("model") / "tiny"))
    beside = ("unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors", "v1.safetensors")
    more = ("vae/model.onnx", "flax_model.msgpack", "safety_checker/model.safetensors", "README.md", "v1.ckpt")
    return {**files, **dict.fromkeys((*beside, *more), b"never read")}


@pytest.fixture
def hub(model_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub, and huggingface_hub set to ask it and to keep its answers in this test's folder."""
    second = {**model_files, "README.md": b"second"}
    repos = {"some/model": {"main": model_files, "second": second}, "some/lora": {"main": LORA, "v2": {"c.ckpt": b""}}}
    with serving({**repos, "some/peft": {"main": PEFT}}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


def test_a_model_is_fetched_once(hub: HubServer, model_files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetch_model("some/model")
    wanted = {name for name, data in model_files.items() if data != b"never read"}
    assert hub.fetched == set(folder_files(folder)) == wanted
    assert all(folder_files(folder)[name] == model_files[name] for name in wanted)

    asked = len(hub.asked)
    assert fetch_model("some/model") == folder
    assert not [path for _, path, _ in hub.asked[asked:] if "/resolve/" in path]

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    assert fetch_model("some/model") == folder
    assert len(hub.asked) == asked


def test_a_fetched_model_loads(hub: HubServer, tmp_path: Path) -> None:
    components = load_components(fetch_model("some/model"), dtype=np.float32)
    assert components.folder == fetch_model("some/model")
    assert components.params["unet"].keys() == components.unet.shapes.keys()


def test_a_described_model_fetches_no_weights(hub: HubServer) -> None:
    """What it describes has the shapes and types of what is loaded."""
    described = describe_base("some/model", dtype=np.float32, resolution=16)
    assert "unet/config.json" in hub.fetched
    assert not [name for name in hub.fetched if name.endswith(".safetensors")]
    loaded = load_base("some/model", dtype=np.float32, resolution=16)
    for name, part in loaded.params.items():
        shapes = {path: (leaf.shape, leaf.dtype) for path, leaf in part.items()}
        assert {path: (leaf.shape, leaf.dtype) for path, leaf in described.params[name].items()} == shapes


def test_a_base_is_its_configurations(hub: HubServer, tmp_path: Path) -> None:
    """All that a LoRA is converted against; the LoRA too may be one of the hub's."""
    wanted = {f"{part}/config.json" for part in ("unet", "vae", "text_encoder")}
    folder = fetch_configs("some/model")
    assert hub.fetched == set(folder_files(folder)) == wanted
    assert fetch_configs(folder) == folder

    local, first, second = (tmp_path / f"{name}.safetensors" for name in ("local", "first", "second"))
    shapes = unet(UNetConfig.from_dict(UNET)).shapes
    write_lora(local, {"unet": random_adapter(shapes, 0)}, layout="peft")
    hub.repos["some/style"] = {"main": {"style.safetensors": local.read_bytes()}}
    convert_lora(local, first, "kohya", "some/model")
    assert hub.fetched == wanted
    convert_lora("some/style", second, "kohya", "some/model")
    assert hub.fetched == {*wanted, "style.safetensors"}
    with open_tensors(first) as one, open_tensors(second) as other:
        assert one.metadata == other.metadata
        assert one.keys() == other.keys()
        assert all(np.array_equal(one.read(key), other.read(key)) for key in one.keys())  # noqa: SIM118


def test_the_name_of_a_loaded_lora(hub: HubServer, tmp_path: Path) -> None:
    """A local file's stem; of the hub's, whose files are often called the same, the id."""
    pipe = Pipeline.from_pretrained(fetch_model("some/model"))
    file = tmp_path / "style.safetensors"
    write_lora(file, {"unet": random_adapter(pipe.base.shapes["unet"], 0)}, layout="peft")
    hub.repos["some/style"] = {"main": {"style.safetensors": file.read_bytes()}}
    for source in (file, "some/style", "some/style/style.safetensors"):
        pipe.load_lora(source)
    pipe.load_lora("some/style", name="mine")
    for name in ("style", "some/style", "some/style/style.safetensors", "mine"):
        pipe.unload_lora(name)
    assert not pipe._loras.adapters()


def test_revisions(hub: HubServer) -> None:
    for revision in ("second", commit("some/model", "second")):
        assert fetch_model(f"some/model@{revision}").name == commit("some/model", "second")
    assert fetch_model("some/model").name == commit("some/model", "main")
    with pytest.raises(UserError, match=r"^some/model@third: some/model has no revision third$"):
        fetch_model("some/model@third")


def test_the_token_arrives(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated.add("some/model")
    with pytest.raises(UserError, match=rf"^some/model: access is restricted; ask for it at {hub.url}/some/model, "):
        fetch_model("some/model")
    assert not hub.fetched or not folder_files(Path(constants.HF_HUB_CACHE) / "models--some--model" / "blobs")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert (fetch_model("some/model") / "model_index.json").is_file()
    assert hub.asked[-1][2] == f"Bearer {hub.token}"


def test_loras_and_files(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = fetch_file("some/lora/sub/b.safetensors")
    assert file.read_bytes() == b"BB"
    assert hub.fetched == {"sub/b.safetensors"}
    assert fetch_lora("some/lora/sub/b.safetensors") == file
    peft = fetch_lora("some/peft")
    assert peft.name == "adapter_model.safetensors"
    assert set(folder_files(peft.parent)) == {"adapter_model.safetensors", "adapter_config.json"}
    assert fetch_file("some/peft/adapter_model.safetensors") == peft
    assert fetch_model("some/lora/a.safetensors").read_bytes() == b"A"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch_lora("some/lora/sub/b.safetensors") == file
    assert fetch_lora("some/peft") == peft


def test_local_paths_win(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "some" / "lora" / "a.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"local")
    assert fetch_model("some/lora") == fetch_lora("some/lora") == Path("some/lora")
    assert fetch_file("some/lora/a.safetensors").read_bytes() == b"local"
    assert not hub.asked


@pytest.mark.parametrize(
    ("fetch", "source", "reason"),
    [
        (fetch_model, "some/nothing", r"no such file or folder, and no such model at http://127"),
        (fetch_model, "some/lora", "holds neither model_index.json nor config.json"),
        (fetch_model, "some/model/unet", "no such folder; on the hub a model is owner/name"),
        (fetch_model, "./models/sd15", "no such file or folder$"),
        (fetch_model, "sd15", "no such file or folder$"),
        (fetch_model, "some--more/model", "no such file or folder, and no valid hub id$"),
        (fetch_file, "some/lora/none.safetensors", "there is no such file$"),
        (fetch_file, "some/lora/adapter_config.json", "no such file, and not the hub's owner/name"),
        (fetch_file, "some/lora", "no such file, and not the hub's owner/name"),
        (fetch_file, "some/lora@v2/c.ckpt", "pickled weights are not read, because a pickle can run any code"),
        (fetch_lora, "some/lora/c.PTH", "pickled weights are not read"),
        (fetch_model, "some/model/unet/diffusion_pytorch_model.bin", "pickled weights are not read"),
        (fetch_configs, "some/model/v1.ckpt", "pickled weights are not read"),
        (fetch_configs, "some/lora", "holds no unet/config.json, so no model in diffusers' layout"),
        (fetch_configs, "sd15", "no such file or folder$"),
        (fetch_lora, "some/lora@v2", r"holds no \.safetensors file at its top"),
        (fetch_lora, "some/model/../a.safetensors", "no such file or folder$"),
    ],
)
def test_what_is_not_there(hub: HubServer, fetch: Callable[[str], Path], source: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        fetch(source)
    assert str(caught.value).startswith(f"{source}: ")
    assert "\n" not in str(caught.value)
    assert not hub.fetched


def test_no_network(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch_lora("some/lora/a.safetensors")
    closed = "http://127.0.0.1:1"  # a port on which nothing listens
    monkeypatch.setattr(constants, "ENDPOINT", closed)
    assert fetch_lora("some/lora/a.safetensors").read_bytes() == b"A"
    with pytest.raises(
        UserError, match=rf"^some/model: no such file .* is not in the cache and {closed} does not answer"
    ):
        fetch_model("some/model")
    with pytest.raises(UserError, match=r"^some/lora/sub/b\.safetensors: there is no such file \(offline"):
        fetch_file("some/lora/sub/b.safetensors")


def test_the_hub_is_down_or_refuses(hub: HubServer) -> None:
    hub.status = 500
    with pytest.raises(UserError, match=r"^some/model: .* is not in the cache and .* does not answer"):
        fetch_model("some/model")
    hub.status = 429
    with pytest.raises(UserError, match=r"^some/model: .* answered 429; try again later$"):
        fetch_model("some/model")


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub waits a second before it tries again."""
    monkeypatch.setattr(time, "sleep", lambda _: None)


@pytest.mark.usefixtures("no_pause")
def test_a_download_that_breaks_off_goes_on(hub: HubServer) -> None:
    hub.cut = 1
    assert fetch_file("some/lora/sub/b.safetensors").read_bytes() == b"BB"
    assert not hub.cut


@pytest.mark.usefixtures("no_pause")
def test_a_download_that_always_breaks_off(hub: HubServer) -> None:
    hub.cut = 1000
    with pytest.raises(UserError, match=r"^some/lora/sub/b\.safetensors: .*run the command again to resume$"):
        fetch_file("some/lora/sub/b.safetensors")


def test_half_a_model_in_the_cache(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetch_model("some/model")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^some/model: holds no .*vae/diffusion_pytorch_model\.safetensors \(offline"):
        fetch_model("some/model")


def test_the_environment_is_honoured(hub: HubServer, tmp_path: Path) -> None:
    """A process of its own: huggingface_hub reads these when it is imported."""
    code = "from hypersd_jax.weights.hub import fetch_lora; print(fetch_lora('some/lora/a.safetensors'))"
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    environment |= {"HF_TOKEN": "hf_environment", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    path = Path(done.stdout.strip())
    assert path.read_bytes() == b"A"
    assert path.is_relative_to(tmp_path / "home")
    assert {header for _, path, header in hub.asked if "some/lora" in path} == {"Bearer hf_environment"}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a/b", ("a/b", None, None)),
        ("a-1/b.c_2@main", ("a-1/b.c_2", "main", None)),
        ("a/b/c/d e.safetensors", ("a/b", None, "c/d e.safetensors")),
        ("a/b@v1.0/c.safetensors", ("a/b", "v1.0", "c.safetensors")),
        ("/a/b", None),
        ("../a/b", None),
        ("a", None),
        ("a/b/", None),
        ("a/b@", None),
        ("a b/c", None),
        ("a/b/./c.safetensors", None),
    ],
)
def test_ids(text: str, parts: tuple[str, str | None, str | None] | None) -> None:
    found = parse_id(text)
    assert found == (None if parts is None else HubId(repo=parts[0], revision=parts[1], file=parts[2]))
    assert found is None or str(found) == text


def test_one_variant_is_chosen() -> None:
    base = ["model_index.json", "unet/config.json", "tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/a.py"]
    unet = "unet/diffusion_pytorch_model"
    full, half, pickled = f"{unet}.safetensors", f"{unet}.fp16.safetensors", f"{unet}.bin"
    shards = [f"{unet}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = f"{unet}.safetensors.index.json"
    rest = ["tokenizer/merges.txt", "tokenizer/vocab.json"]
    assert choose_model([*base, full, half, pickled]) == [*base[:2], full, *rest]
    assert choose_model([*base, half, pickled]) == [*base[:2], half, *rest]
    assert choose_model([*base, half, *shards, index]) == [*base[:2], index, *shards, *rest]
    half_shards = [name.replace("model-", "model.fp16-") for name in shards]
    half_index = f"{unet}.safetensors.index.fp16.json"
    assert choose_model([*base, *half_shards, half_index]) == [*base[:2], half_index, *half_shards, *rest]
    with pytest.raises(UserError, match="only pickled weights"):
        choose_model([*base, pickled])
    with pytest.raises(UserError, match="complete"):
        choose_model([*base, shards[0], index])
    component = ["config.json", "diffusion_pytorch_model.safetensors"]
    assert choose_model([*component, "diffusion_pytorch_model.bin", "other.safetensors"]) == component


def test_one_lora_is_chosen() -> None:
    known = "pytorch_lora_weights.safetensors"
    assert choose_lora(["a.safetensors", known, "README.md"]) == [known]
    assert choose_lora(["a.safetensors", "sub/b.safetensors"]) == ["a.safetensors"]
    with pytest.raises(UserError, match=r"holds 4 files \(a\.safetensors, b\..*, c\..*, \.\.\.\); name one"):
        choose_lora([f"{name}.safetensors" for name in "abcd"])
