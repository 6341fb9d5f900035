"""The pipeline's promises that need no other implementation, on a tiny model."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax import adapters
from hypersd_jax.errors import UserError
from hypersd_jax.models import UNetConfig, unet
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.pipeline.plan import seed_noise
from hypersd_jax.weights.diffusers.component import save_params
from tests.helpers.compilations import Compilations
from tests.helpers.tiny_model import UNET, smaller, tiny_model

PROMPT = "red apple, fluent flat style"
CALL: dict[str, Any] = {"steps": 2, "guidance": 0.0, "output": "latent"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smaller(tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def pipe(model: Path) -> Pipeline:
    return Pipeline.from_pretrained(model)


def lora(pipe: Pipeline, rank: int, seed: int) -> dict[str, Any]:
    """A random LoRA of the whole UNet, on the host as a file's is."""
    rng = np.random.default_rng(seed)
    adapter = {}
    for path in adapters.target_paths(pipe.base.components.unet.shapes):
        *window, width, out = pipe.base.components.unet.shapes[path + ".kernel"].shape
        adapter[path] = {
            "down": rng.uniform(-1, 1, (*window, width, rank)).astype(np.float32) / np.sqrt(np.prod([*window, width])),
            "up": 0.02 * rng.standard_normal((rank, out)).astype(np.float32),
            "scale": np.ones((rank,), np.float32),
        }
    return {"unet": adapter}


@pytest.fixture
def clean(pipe: Pipeline):
    yield pipe
    pipe.unload_lora()


@pytest.fixture(scope="module")
def compilations() -> Compilations:
    return Compilations.counting()


def test_what_compiles_nothing(clean: Pipeline, compilations: Compilations) -> None:
    """Another prompt, seed, guidance above 1, eta, timesteps, LoRA of the same modules and bucket, LoRA scale."""
    clean.add_lora("a", lora(clean, 4, 0))
    call = {"steps": 2, "guidance": 3.0, "sampler": "tcd", "eta": 0.3, "output": "np"}
    first = clean(PROMPT, **call)
    before = compilations.count
    clean("a cat face", **call)
    clean(PROMPT, **{**call, "seed": 7})
    clean(PROMPT, **{**call, "guidance": 7.5})
    clean(PROMPT, "blob style", **call)
    clean(PROMPT, **{**call, "eta": 1.0})
    clean(PROMPT, **{**call, "timesteps": (899, 399)})
    clean.set_lora_scale("a", 0.5)
    clean(PROMPT, **call)
    clean.add_lora("a", lora(clean, 8, 5))
    clean(PROMPT, **call)
    clean.unload_lora("a")
    clean.add_lora("b", lora(clean, 6, 9))
    last = clean(PROMPT, **call)
    assert compilations.count == before
    assert np.abs(last - first).max() > 0


def test_an_image_depends_on_seed_prompt_and_index_alone(clean: Pipeline) -> None:
    prompts = [PROMPT, "a cat face", "lion, blob style"]
    together = clean(prompts, num_images=2, seed=5, **CALL)
    in_rounds = clean(prompts, num_images=2, seed=5, batch_size=4, **CALL)
    np.testing.assert_allclose(in_rounds, together, atol=2e-5)
    alone = clean(PROMPT, num_images=2, seed=5, **CALL)
    np.testing.assert_allclose(alone, together[:2], atol=2e-5)
    assert np.abs(together[0] - together[1]).max() > 0.1


def test_more_steps_extend_the_noise_and_none_is_generated_in_vain(clean: Pipeline) -> None:
    index = np.zeros(1, np.int64)

    def noise(steps: int, amount: float) -> tuple[np.ndarray, np.ndarray]:
        table = {"alpha": np.ones(steps), "c_noise": np.full(steps, amount)}
        return seed_noise(clean._programs, 3, index, index, (4, 4, 2), table)

    (start, short), (same_start, long), (_, none) = noise(2, 1.0), noise(5, 1.0), noise(2, 0.0)
    np.testing.assert_array_equal(start, same_start)
    np.testing.assert_array_equal(short, long[:2])
    assert np.abs(long[3] - long[4]).max() > 1
    assert not none.any()
    assert none.shape == short.shape


def test_lora_scale_changes_the_image_and_zero_does_not(clean: Pipeline) -> None:
    base = clean(PROMPT, **CALL)
    clean.add_lora("a", lora(clean, 4, 0), scale=0.0)
    np.testing.assert_allclose(clean(PROMPT, **CALL), base, atol=1e-5)
    clean.set_lora_scale("a", 0.5)
    half = clean(PROMPT, **CALL)
    clean.set_lora_scale("a", 1.0)
    whole = clean(PROMPT, **CALL)
    assert np.abs(half - base).max() > 1e-2
    assert np.abs(whole - half).max() > 1e-2


def test_fused_samples_as_unfused_and_comes_back_bit_for_bit(clean: Pipeline) -> None:
    clean.add_lora("a", lora(clean, 4, 0))
    clean.add_lora("b", lora(clean, 3, 2), scale=-0.4)
    kept = {name: np.asarray(value) for name, value in clean._params["unet"].items()}
    loose = clean(PROMPT, **CALL)
    clean.fuse_lora()
    np.testing.assert_allclose(clean(PROMPT, **CALL), loose, atol=5e-5)
    with pytest.raises(UserError, match="unfuse_lora first"):
        clean.set_lora_scale("a", 2.0)
    clean.unfuse_lora()
    for name, value in clean._params["unet"].items():
        np.testing.assert_array_equal(np.asarray(value), kept[name])
    np.testing.assert_array_equal(clean(PROMPT, **CALL), loose)


def test_header_settings_are_used_and_explicit_ones_win(clean: Pipeline) -> None:
    header = {"steps": "2", "sampler": "tcd", "timesteps": "[999, 499]", "eta": "0.5", "guidance": "0.0"}
    clean.add_lora("a", lora(clean, 4, 0), metadata=header)
    plan = clean.settings()
    assert (plan.steps, plan.sampler, plan.eta, plan.guidance, plan.timesteps) == (2, "tcd", 0.5, 0.0, (999, 499))
    plan = clean.settings(steps=4)
    assert (plan.steps, plan.sampler, plan.timesteps) == (4, "tcd", None)
    plan = clean.settings(sampler="lcm")
    assert (plan.sampler, plan.eta, plan.timesteps) == ("lcm", 0.0, None)
    plan = clean.settings(preset="hyper-sd15-4steps")
    assert (plan.steps, plan.sampler, plan.guidance) == (4, "ddim", 0.0)
    clean.unload_lora()
    plan = clean.settings()
    assert (plan.steps, plan.sampler, plan.guidance) == (25, "ddim", 7.5)


def test_callback_counts_the_steps(clean: Pipeline) -> None:
    seen: list[tuple[int, int]] = []
    clean([PROMPT] * 3, batch_size=2, callback=lambda step, steps: seen.append((step, steps)), **CALL)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_bfloat16_is_near_float32(clean: Pipeline, model: Path) -> None:
    low = Pipeline.from_pretrained(model, dtype="bfloat16")
    assert low.base.params["unet"]["conv_in.kernel"].dtype == jnp.bfloat16
    latents = np.random.default_rng(0).standard_normal((1, 8, 8, 4)).astype(np.float32)
    call = {"steps": 2, "guidance": 0.0, "latents": latents, "output": "np"}
    difference = low(PROMPT, **call) - clean(PROMPT, **call)
    assert np.sqrt(np.mean(difference**2)) < 0.03


def test_long_prompts_warn(clean: Pipeline) -> None:
    with pytest.warns(UserWarning, match="ignored: 'style"):
        clean("apple " * 22 + "style end", **CALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clean(PROMPT, **CALL)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"sampler": "dimm"}, "ddim"),
        ({"sampler": "tcd", "eta": 2.0}, "eta"),
        ({"output": "jpg"}, "output"),
        ({"num_images": 0}, "num_images"),
        ({"batch_size": 0}, "batch_size"),
        ({"height": 65}, "height"),
        ({"width": 0}, "width"),
        ({"latents": np.zeros((1, 4, 4, 4))}, "latents"),
        ({"latents": np.full((1, 8, 8, 4), np.nan)}, "latents"),
        ({"noise": np.zeros((1, 1, 8, 8, 4))}, "noise"),
        ({"timesteps": (100, 200)}, "timesteps"),
        ({"preset": "hyper-sd15-4step"}, "hyper-sd15-4steps"),
        ({"spacing": "trailling"}, "trailing"),
        ({"guidance": 3.0, "negative_prompt": ["a", "b", "c"]}, "negative_prompt"),
        ({"guidance": float("nan")}, "guidance"),
        ({"guidance": -1.0}, "guidance=-1 is negative"),
        ({"guidance": "high"}, "guidance"),
        ({"steps": 3, "timesteps": (999, 499)}, "timesteps has 2 values for steps=3"),
        ({"steps": None, "timesteps": "abc"}, "timesteps must be a list of integers"),
        ({"steps": None, "timesteps": 1.5}, "timesteps must be a list of integers"),
        ({"latents": [[1.0], [1.0, 2.0]]}, "latents"),
        ({"prompt": [None]}, "prompt must be text, not None"),
        ({"prompt": None}, "prompt must be text, not None"),
        ({"prompt": []}, "prompt: none given"),
        ({"negative_prompt": [3]}, "negative_prompt must be text, not 3"),
    ],
)
def test_bad_arguments_are_named(clean: Pipeline, arguments: dict[str, Any], names: str) -> None:
    with pytest.raises(UserError, match=names):
        clean(**{"prompt": PROMPT, **CALL, **arguments})


def test_guidance_of_a_lora_header_is_checked(clean: Pipeline) -> None:
    clean.add_lora("a", lora(clean, 4, 0), metadata={"guidance": "-2.0"})
    with pytest.raises(UserError, match="guidance=-2 is negative"):
        clean(PROMPT, steps=2)


def test_a_negative_prompt_without_guidance_warns(clean: Pipeline) -> None:
    with pytest.warns(UserWarning, match="negative_prompt is ignored: guidance=0"):
        clean(PROMPT, "blob style", **CALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clean(PROMPT, "", **CALL)


def test_negatives_of_which_some_are_none(clean: Pipeline) -> None:
    """Where the model's unconditional is zeros, None stays zeros beside another's text."""
    xl_like = Pipeline(clean.base.around(dataclasses.replace(clean.base.components, zero_unconditional=True)))
    mixed = xl_like.encode_prompts([PROMPT] * 2, [None, "x"])[1].context
    np.testing.assert_array_equal(mixed[0], 0)
    empty = clean.encode_prompts(["", "x"]).context
    np.testing.assert_array_equal(mixed[1], empty[1])
    np.testing.assert_array_equal(xl_like.encode_prompts([PROMPT] * 2, [None])[1].context, 0)
    np.testing.assert_array_equal(clean.encode_prompts([PROMPT] * 2, [None, "x"])[1].context, empty)


class Recorder:
    """A UNet that notes what it is traced with, and the guidance embeddings that it runs with."""

    def __init__(self, network: Any) -> None:
        self.network, self.shapes = network, network.shapes
        self.batches: list[int] = []
        self.seen: list[np.ndarray] = []

    def __call__(self, params: Any, x: jax.Array, *args: Any, **kwargs: Any) -> Any:
        self.batches.append(x.shape[0])
        jax.debug.callback(lambda value: self.seen.append(np.asarray(value)), kwargs["timestep_cond"])
        return self.network(params, x, *args, **kwargs)


def test_embedded_guidance(tmp_path: Path) -> None:
    """Guidance as the UNet's input: another image by one call a step, of the same program."""
    config = {**UNET, "time_cond_proj_dim": 7, "sample_size": [8, 6]}
    network = unet(UNetConfig.from_dict(config))
    save_params(tiny_model(tmp_path) / "unet", network.init(0), config=config, component_kind="unet")
    pipe = Pipeline.from_pretrained(tmp_path, dtype="float32")
    recorder = Recorder(pipe.base.components.unet)
    pipe = Pipeline(pipe.base.around(dataclasses.replace(pipe.base.components, unet=recorder)))
    assert pipe.native_size == (16, 12)
    first = pipe([PROMPT] * 2, **{**CALL, "guidance": 1.0})
    assert first.shape == (2, 8, 6, 4)
    traced = len(recorder.batches)
    last = pipe([PROMPT] * 2, **{**CALL, "guidance": 8.5})
    assert np.abs(last - first).max() > 1e-3
    assert set(recorder.batches) == {2}
    assert len(recorder.batches) == traced
    angles = 7500 * np.exp(-np.log(10000) / 2 * np.arange(3))
    assert len(recorder.seen) == 4  # two steps, twice
    expected = [*np.sin(angles), *np.cos(angles), 0]
    np.testing.assert_allclose(recorder.seen[-1], [expected] * 2, atol=1e-3)
    with pytest.warns(UserWarning, match="negative_prompt is ignored"):
        pipe(PROMPT, "x", **{**CALL, "guidance": 8.5})


def test_a_model_without_a_size(tmp_path: Path) -> None:
    file = tiny_model(tmp_path) / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "sample_size": None}))
    pipe = Pipeline.from_pretrained(tmp_path, dtype="float16")
    with pytest.raises(UserError, match=r"height must be given.*sample_size"):
        pipe(PROMPT, **CALL)
    images = pipe(PROMPT, height=16, width=24, **{**CALL, "output": "np"})
    assert images.shape == (1, 16, 24, 3)
    assert images.dtype == np.float32


def test_bad_models_and_names(clean: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        Pipeline.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"model_index\.json"):
        Pipeline.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="dtype"):
        Pipeline.from_pretrained("embedded", dtype="float31")
    with pytest.raises(UserError, match="no LoRA named 'x'"):
        clean.set_lora_scale("x", 1.0)
    with pytest.raises(UserError, match="finite"):
        clean.add_lora("a", lora(clean, 4, 0), scale=float("nan"))
    with pytest.raises(UserError, match="no LoRA is fused"):
        clean.unfuse_lora()
