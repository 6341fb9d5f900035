"""ComfyUI workflows and the web UI's settings: nodes with the inputs that ComfyUI asks for, and right numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hypersd_jax.diffusion import Schedule
from hypersd_jax.interop.beside import write_beside
from hypersd_jax.interop.comfyui import workflow
from hypersd_jax.interop.recipe import Recipe, base_name, make_recipe, simple, trailing
from hypersd_jax.interop.webui import webui_settings, webui_text
from hypersd_jax.weights.components import assets
from hypersd_jax.weights.families import SCHEDULERS
from tests.helpers.infotext import parse

# Required inputs and outputs of ComfyUI's nodes, as their INPUT_TYPES / define_schema and RETURN_TYPES say.
NODES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "CheckpointLoaderSimple": ({"ckpt_name": str}, ("MODEL", "CLIP", "VAE")),
    "LoraLoader": (
        {"model": "MODEL", "clip": "CLIP", "lora_name": str, "strength_model": float, "strength_clip": float},
        ("MODEL", "CLIP"),
    ),
    "ModelSamplingDiscrete": ({"model": "MODEL", "sampling": str, "zsnr": bool}, ("MODEL",)),
    "CLIPTextEncode": ({"text": str, "clip": "CLIP"}, ("CONDITIONING",)),
    "EmptyLatentImage": ({"width": int, "height": int, "batch_size": int}, ("LATENT",)),
    "KSampler": (
        {
            "model": "MODEL",
            "seed": int,
            "steps": int,
            "cfg": float,
            "sampler_name": str,
            "scheduler": str,
            "positive": "CONDITIONING",
            "negative": "CONDITIONING",
            "latent_image": "LATENT",
            "denoise": float,
        },
        ("LATENT",),
    ),
    "SamplerCustom": (
        {
            "model": "MODEL",
            "add_noise": bool,
            "noise_seed": int,
            "cfg": float,
            "positive": "CONDITIONING",
            "negative": "CONDITIONING",
            "sampler": "SAMPLER",
            "sigmas": "SIGMAS",
            "latent_image": "LATENT",
        },
        ("LATENT", "LATENT"),
    ),
    "KSamplerSelect": ({"sampler_name": str}, ("SAMPLER",)),
    "SamplerEulerAncestral": ({"eta": float, "s_noise": float}, ("SAMPLER",)),
    "ManualSigmas": ({"sigmas": str}, ("SIGMAS",)),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ("IMAGE",)),
    "SaveImage": ({"images": "IMAGE", "filename_prefix": str}, ()),
}
SD15 = {**SCHEDULERS["sd1"], "prediction_type": "epsilon"}


def recipe(name: str = "fast", *, family: str = "sd_v1", **stated: Any) -> Recipe:
    """Of a LoRA of ours whose header states this."""
    header = {key: value if isinstance(value, str) else json.dumps(value) for key, value in stated.items()}
    return make_recipe(
        Path(f"{name}.safetensors"),
        {"hypersd_jax": "1", **header} if header else {},
        base="owner/base",
        family=family,
        scheduler_config=SD15,
        size=(512, 768),
        prompt="a lighthouse",
    )


def checked(nodes: Any) -> dict[str, dict[str, Any]]:
    """``{node: inputs}`` of a workflow whose nodes have all inputs, of the right types, and whose links lead back."""
    found = json.loads(json.dumps(nodes))
    for name, node in found.items():
        inputs, _ = NODES[node["class_type"]]
        assert node["inputs"].keys() == inputs.keys(), node["class_type"]
        assert node["_meta"]["title"]
        for key, wanted in inputs.items():
            value = node["inputs"][key]
            if isinstance(wanted, str):
                source, output = value
                assert int(source) < int(name)
                assert NODES[found[source]["class_type"]][1][output] == wanted
            else:
                assert type(value) is wanted, (node["class_type"], key)
    assert list(found.values())[-1]["class_type"] == "SaveImage"
    return {node["class_type"]: node["inputs"] for node in found.values()}


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_simple_schedule_is_the_trailing_one(steps: int) -> None:
    assert simple(steps) == trailing(steps)
    nodes = checked(workflow(recipe(sampler="ddim", steps=steps, eta=0.0, guidance=0.0)))
    assert "ManualSigmas" not in nodes
    chosen = nodes["KSampler"]
    shown = [chosen[key] for key in ("steps", "sampler_name", "scheduler", "cfg", "denoise", "seed")]
    assert shown == [steps, "euler", "simple", 1.0, 1.0, 0]
    assert nodes["EmptyLatentImage"] == {"width": 512, "height": 768, "batch_size": 1}
    assert nodes["LoraLoader"]["lora_name"] == "fast.safetensors"
    assert nodes["CheckpointLoaderSimple"] == {"ckpt_name": "base.safetensors"}


@pytest.mark.parametrize(
    ("stated", "sampler", "timesteps"),
    [
        ({"sampler": "tcd", "steps": 4, "eta": 0.0}, "euler", (999, 759, 499, 259)),
        ({"sampler": "tcd", "steps": 4, "eta": 1.0}, "lcm", (999, 759, 499, 259)),
        ({"sampler": "lcm", "steps": 4, "timesteps": [999, 749, 499, 259]}, "lcm", (999, 749, 499, 259)),
        ({"sampler": "lcm", "steps": 1, "timesteps": [800]}, "lcm", (800,)),
    ],
)
def test_other_timesteps_are_noise_levels(stated: dict[str, Any], sampler: str, timesteps: tuple[int, ...]) -> None:
    nodes = checked(workflow(recipe(guidance=0.0, **stated)))
    assert nodes["KSamplerSelect"] == {"sampler_name": sampler}
    schedule = Schedule.from_config(SD15)
    levels = [schedule.sigma[t] / schedule.alpha[t] for t in timesteps]
    written = [float(text) for text in nodes["ManualSigmas"]["sigmas"].split(", ")]
    np.testing.assert_allclose(written, [*levels, 0.0], rtol=1e-6)
    assert nodes["SamplerCustom"]["add_noise"] is True


def test_ddim_with_eta_is_the_ancestral_sampler() -> None:
    """Both add noise of the same deviation, eta sqrt(s'^2 (s^2 - s'^2) / s^2) between levels s and s'."""
    made = recipe(sampler="ddim", steps=4, eta=0.5, guidance=0.0)
    nodes = checked(workflow(made))
    assert nodes["SamplerEulerAncestral"] == {"eta": 0.5, "s_noise": 1.0}
    abar = Schedule.from_config(SD15).alphas_cumprod[[999, 749]]
    ours = 0.5 * np.sqrt((1 - abar[1]) / (1 - abar[0]) * (1 - abar[0] / abar[1])) / np.sqrt(abar[1])
    s, then = made.levels[:2]
    assert ours == pytest.approx(0.5 * np.sqrt(then**2 * (s**2 - then**2) / s**2), rel=1e-5)


def test_what_has_no_node_is_said() -> None:
    nodes = workflow(recipe(sampler="tcd", steps=4, eta=0.3, guidance=0.0))
    assert nodes is not None
    checked(nodes)
    titles = [node["_meta"]["title"] for node in nodes.values()]
    assert "tcd, 4 steps (TCD's eta 0.3 has no node here, this is eta 0)" in titles


def test_a_style_lora_gets_the_many_step_default_and_released_ones_their_own() -> None:
    nodes = checked(workflow(recipe("style")))
    assert nodes["KSampler"]["steps"] == 25
    assert nodes["KSampler"]["cfg"] == 7.5
    nodes = checked(workflow(recipe("Hyper-SDXL-1step-Unet", family="sdxl_base_v1-0")))
    assert nodes["KSamplerSelect"] == {"sampler_name": "lcm"}
    nodes = checked(workflow(recipe("sdxl_lightning_1step_unet_x0", family="sdxl_base_v1-0")))
    assert nodes["ModelSamplingDiscrete"]["sampling"] == "x0"


@pytest.mark.parametrize(
    ("stated", "sampler", "schedule", "notes"),
    [
        ({"sampler": "ddim", "steps": 4, "eta": 0.0}, "Euler", "Simple", 0),
        ({"sampler": "ddim", "steps": 4, "eta": 0.5}, "Euler a", "Simple", 0),
        ({"sampler": "tcd", "steps": 2, "eta": 1.0}, "LCM", "Simple", 0),
        ({"sampler": "tcd", "steps": 4, "eta": 0.3}, "Euler", "Simple", 2),
        ({"sampler": "euler", "steps": 4}, "Euler", "Uniform", 0),
    ],
)
def test_the_web_uis_settings(stated: dict[str, Any], sampler: str, schedule: str, notes: int) -> None:
    made = recipe(guidance=0.0, **stated)
    assert len(webui_settings(made).notes) == notes
    text = parse(webui_text(made, lora_hash="0123"))
    assert (text.bare_prompt, text.loras) == ("a lighthouse", [("fast", 1.0)])
    shown = {key: text.values[key] for key in ("Steps", "Sampler", "Schedule type", "CFG scale", "Size-1", "Model")}
    assert shown == {
        "Steps": str(stated["steps"]),
        "Sampler": sampler,
        "Schedule type": schedule,
        "CFG scale": "1",
        "Size-1": "512",
        "Model": "base",
    }
    assert text.values["Lora hashes"] == "fast: 0123"


def test_files_beside_a_lora(tmp_path: Path) -> None:
    file = tmp_path / "a.b.safetensors"
    file.write_bytes((2).to_bytes(8, "little") + b"{}data")
    written = write_beside(file, recipe("a.b", sampler="ddim", steps=4, guidance=0.0))
    assert [path.name for path in written] == ["a.b.comfyui.json", "a.b.a1111.txt"]
    checked(json.loads(written[0].read_text()))
    assert parse(written[1].read_text()).values["Lora hashes"].startswith("a.b: 3a6eb079")


def test_names_of_bases(tmp_path: Path) -> None:
    cached = tmp_path / "models--owner--some--name" / "snapshots" / "abc"
    names = [base_name(source) for source in ("embedded", assets() / "teacher", cached, "owner/name", tmp_path / "x")]
    assert names == ["embedded", "embedded", "owner/some--name", "owner/name", "x"]
