"""Full fine-tuning: an autoencoder and a teacher from nothing, resumed, and read by diffusers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hypersd_jax.config import Config, load_config, save_config
from hypersd_jax.data import EmojiSource, signed
from hypersd_jax.errors import UserError
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.stages import train
from hypersd_jax.stages.autoencoder import reconstructed
from hypersd_jax.weights.tensors import open_tensors
from tests.helpers.short_runs import share_steps

RECIPE = """
output_dir: {output}
model: {{source: {model}, fresh: {fresh}}}
data: {{source: emoji, resolution: 16}}
log: {{checkpoint_every: 2, tensorboard: false, compilation_cache: false}}
evaluation: {{samples: 0, batch_size: 8}}
stages:
  - {{name: s, kind: {kind}, updates: {updates}, batch_size: 8, learning_rate: 2.0e-3, ema: 0.5}}
"""
WEIGHTS = {
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        share_steps(patch)
        yield


def recipe(folder: Path, model: Path, kind: str, *, fresh: str = "[]", updates: int = 4) -> Config:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(output=folder / "out", model=model, kind=kind, fresh=fresh, updates=updates))
    return load_config(path)


def save(config: Config, folder: Path) -> Path:
    save_config(config, folder / "saved.yaml")
    return folder / "saved.yaml"


def weights(folder: Path, part: str) -> dict[str, np.ndarray]:
    with open_tensors(folder / WEIGHTS[part]) as file:
        return {key: file.read(key) for key in file.keys()}  # noqa: SIM118


def changed(a: Path, b: Path, part: str) -> bool:
    first, second = weights(a, part), weights(b, part)
    assert first.keys() == second.keys()
    return any(not np.array_equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("kind", "trained"),
    [("autoencoder", ("vae",)), ("teacher", ("unet", "text_encoder"))],
    ids=("autoencoder", "teacher"),
)
def test_a_stage_trains_its_parts_and_no_others_and_resumes_to_the_same_weights(kind, trained, model, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    whole = train(recipe(tmp_path / "a", model, kind))
    for part in WEIGHTS:
        assert changed(model, whole / "model", part) == (part in trained), part
    assert (whole / "samples" / "s.png").is_file()
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["skipped"] == 0 and line["loss"] > 0 for line in lines)
    # Stopped after two updates: the last checkpoints are gone, and the model was never written.
    half = tmp_path / "b" / "out"
    shutil.copytree(whole, half)
    shutil.rmtree(half / "model")
    shutil.rmtree(half / "checkpoints" / "s" / "4")
    (half / "config.yaml").unlink()
    train(recipe(tmp_path / "b", model, kind))
    for part in trained:
        assert not changed(whole / "model", half / "model", part), part


def test_fresh_parts_need_no_weights_and_learn(model, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(model, bare)
    (bare / WEIGHTS["vae"]).unlink()
    folder = train(recipe(tmp_path, bare, "autoencoder", fresh="[vae]", updates=60))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["psnr"] > lines[0]["psnr"] + 2.0
    pipe = Pipeline.from_pretrained(folder / "model")
    images = EmojiSource(resolution=16, seed=5).batch(np.arange(64)).images
    mean, logvar = pipe.base.components.vae(dict(pipe.base.params["vae"]), signed(images), method="encode")
    scaled = pipe.base.components.scale(mean)
    assert 0.7 < float(np.sqrt(np.var(scaled) + np.mean(np.exp(logvar)) * pipe.base.components.scale(1.0) ** 2)) < 1.3
    assert pipe.base.components.vae_config.scaling_factor != 0.2
    before, after = reconstructed(pipe.base, images)
    assert before.shape == after.shape == (64, 16, 16, 3)


def test_the_decoder_alone(model, tmp_path):
    """Decoding changes; the latents, and the scale at which the UNet sees them, do not."""
    config = load_config(save(recipe(tmp_path, model, "autoencoder"), tmp_path), ["stages.s.part=decoder"])
    folder = train(config)
    before, after = weights(model, "vae"), weights(folder / "model", "vae")
    moved = {key for key in before if not np.array_equal(before[key], after[key])}
    assert moved
    assert {key.split(".")[0] for key in moved} == {"decoder", "post_quant_conv"}
    still = {key.split(".")[0] for key in before.keys() - moved}
    assert still >= {"encoder", "quant_conv"}
    scales = [
        json.loads((path / "vae" / "config.json").read_text())["scaling_factor"] for path in (model, folder / "model")
    ]
    assert scales[0] == scales[1]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(line["update_norm"] > 0 for line in lines)


def test_a_stage_changes_what_the_unet_predicts_and_the_model_says_so(model, tmp_path):
    """The same run as that of a model whose scheduler says so itself, weights bit for bit."""
    said = tmp_path / "said"
    shutil.copytree(model, said)
    file = said / "scheduler" / "scheduler_config.json"
    given = json.loads(file.read_text())
    assert given["prediction_type"] == "epsilon"
    file.write_text(json.dumps({**given, "prediction_type": "v_prediction"}))
    folders = []
    for source, overrides in ((model, ["stages.s.prediction_type=v_prediction"]), (said, [])):
        target = tmp_path / f"from-{source.name}"
        target.mkdir()
        folders.append(train(load_config(save(recipe(target, source, "teacher", updates=2), target), overrides)))
    for folder in folders:
        written = json.loads((folder / "model" / "scheduler" / "scheduler_config.json").read_text())
        assert written == {**given, "prediction_type": "v_prediction"}
        assert Pipeline.from_pretrained(folder / "model").schedule.prediction_type == "v_prediction"
    for part in ("unet", "text_encoder"):
        assert not changed(folders[0] / "model", folders[1] / "model", part)
    sampled = [(folder / "samples" / "s.png").read_bytes() for folder in folders]
    assert sampled[0] == sampled[1]


def test_what_is_refused(model, tmp_path):
    with pytest.raises(UserError, match=r"model.fresh: 'vea' is not a part of the model; did you mean vae"):
        train(recipe(tmp_path, model, "autoencoder", fresh="[vea]"))
    for kind, override, reason in (
        ("autoencoder", "data.resolution=15", "data.resolution=15 must be a multiple of the autoencoder's 2"),
        ("autoencoder", "data.cache=c", "data.cache: stages.s trains the autoencoder"),
        ("teacher", "data.cache=nowhere", "data.cache: nowhere: not a cache"),
    ):
        with pytest.raises(UserError, match=reason):
            train(load_config(save(recipe(tmp_path, model, kind), tmp_path), [override]))
    path = tmp_path / "mixed.yaml"
    path.write_text(
        "output_dir: out\nstages:\n- {name: a, kind: teacher, updates: 1, batch_size: 1}\n"
        "- {name: b, k: 1, updates: 1, batch_size: 1}\n"
    )
    with pytest.raises(UserError, match="stages: those that train an adapter"):
        load_config(path)
    path.write_text("output_dir: out\nstages:\n- {name: a, kind: teecher, updates: 1, batch_size: 1}\n")
    with pytest.raises(UserError, match=r"stages.0.kind='teecher' is not valid; did you mean teacher"):
        load_config(path)
    assert not (tmp_path / "out").exists()
