"""What a call samples with, where several sources have a say."""

from __future__ import annotations

import pytest

from hypersd_jax.diffusion import solver_table
from hypersd_jax.errors import UserError
from hypersd_jax.presets import BASE_SD, PRESETS, Preset, from_header, name_for_file, preset_for_file, resolve

HEADER = from_header(
    {"steps": "8", "sampler": "ddim", "timesteps": "[999, 874, 749, 624, 499, 374, 249, 124]", "eta": "0.0"}, "a file"
)


def test_a_spacing_voids_the_timesteps_of_a_header() -> None:
    for first in (Preset(spacing="leading"), PRESETS["hyper-sd15-8steps"]):
        plan = resolve([first, HEADER, BASE_SD])
        assert (plan.steps, plan.sampler, plan.spacing, plan.timesteps) == (8, "ddim", first.spacing, None)


def test_timesteps_void_the_spacing_of_a_preset() -> None:
    plan = resolve([Preset(timesteps=(999, 499), steps=2), PRESETS["hyper-sd15-2steps"], HEADER, BASE_SD])
    assert (plan.steps, plan.timesteps, plan.spacing) == (2, (999, 499), None)


@pytest.mark.parametrize(
    "entry", [{"steps": "[" * 10**5}, {"timesteps": "[1e999]"}, {"eta": "x" * 9000}, {"guidance": "9" * 5000 + "x"}]
)
def test_a_header_that_cannot_be_read_is_refused_in_a_line(entry: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"^a file: its header's sampling settings cannot be read \(.{1,210}\)$"):
        from_header(entry, "a file")


def test_a_header_alone_keeps_its_timesteps() -> None:
    plan = resolve([Preset(), HEADER, BASE_SD])
    assert plan.timesteps == HEADER.timesteps
    assert plan.guidance == BASE_SD.guidance


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_settles_everything_but_spacing_or_timesteps(name: str) -> None:
    plan = resolve([PRESETS[name], HEADER, BASE_SD])
    assert None not in (plan.steps, plan.sampler, plan.eta, plan.guidance)
    assert plan.spacing is None or plan.timesteps is None


SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
FILES = {
    "Hyper-SD15-1step-lora.safetensors": ("tcd", 1, 1.0, 0.0),
    "Hyper-SD15-2steps-lora.safetensors": ("ddim", 2, 0.0, 0.0),
    "Hyper-SD15-4steps-lora.safetensors": ("ddim", 4, 0.0, 0.0),
    "Hyper-SD15-8steps-lora.safetensors": ("ddim", 8, 0.0, 0.0),
    "Hyper-SD15-8steps-CFG-lora.safetensors": ("ddim", 8, 0.0, 7.5),
    "Hyper-SD15-12steps-CFG-lora.safetensors": ("ddim", 12, 0.0, 7.5),
    "Hyper-SDXL-1step-lora.safetensors": ("tcd", 1, 1.0, 0.0),
    "Hyper-SDXL-2steps-lora.safetensors": ("ddim", 2, 0.0, 0.0),
    "Hyper-SDXL-4steps-lora.safetensors": ("ddim", 4, 0.0, 0.0),
    "Hyper-SDXL-8steps-lora.safetensors": ("ddim", 8, 0.0, 0.0),
    "Hyper-SDXL-8steps-CFG-lora.safetensors": ("ddim", 8, 0.0, 5.0),
    "Hyper-SDXL-12steps-CFG-lora.safetensors": ("ddim", 12, 0.0, 5.0),
    "Hyper-SDXL-1step-Unet.safetensors": ("lcm", 1, 0.0, 0.0),
    "Hyper-SDXL-1step-Unet-Comfyui.fp16.safetensors": ("lcm", 1, 0.0, 0.0),
    "sdxl_lightning_1step_x0.safetensors": ("euler", 1, 0.0, 0.0),
    "sdxl_lightning_1step_unet_x0.safetensors": ("euler", 1, 0.0, 0.0),
    "sdxl_lightning_2step_lora.safetensors": ("euler", 2, 0.0, 0.0),
    "sdxl_lightning_4step.safetensors": ("euler", 4, 0.0, 0.0),
    "sdxl_lightning_8step_unet.safetensors": ("euler", 8, 0.0, 0.0),
    "lcm-lora-sdv1-5.safetensors": ("lcm", 4, 0.0, 0.0),
    "lcm-lora-sdxl/pytorch_lora_weights.safetensors": ("lcm", 4, 0.0, 0.0),
    "models--latent-consistency--lcm-lora-sdv1-5/snapshots/0a/pytorch_lora_weights.safetensors": ("lcm", 4, 0.0, 0.0),
    "TCD-SD15-LoRA.safetensors": ("tcd", 4, 0.3, 0.0),
    "models--h1t--TCD-SD21-base-LoRA/snapshots/0a/pytorch_lora_weights.safetensors": ("tcd", 4, 0.3, 0.0),
    "TCD-SDXL-LoRA/pytorch_lora_weights.safetensors": ("tcd", 4, 0.3, 0.0),
    "dmd2_sdxl_4step_lora.safetensors": ("lcm", 4, 0.0, 0.0),
    "dmd2_sdxl_4step_lora_fp16.safetensors": ("lcm", 4, 0.0, 0.0),
    "dmd2_sdxl_1step_unet_fp16.bin": ("lcm", 1, 0.0, 0.0),
}
TIMESTEPS = {
    "Hyper-SDXL-8steps-CFG-lora.safetensors": [999, 874, 749, 624, 499, 374, 249, 124],
    "Hyper-SD15-1step-lora.safetensors": [999],
    "Hyper-SDXL-1step-Unet.safetensors": [800],
    "sdxl_lightning_4step_lora.safetensors": [999, 749, 499, 249],
    "lcm-lora-sdxl.safetensors": [999, 759, 499, 259],
    "dmd2_sdxl_4step_lora.safetensors": [999, 749, 499, 249],
    "dmd2_sdxl_1step_unet.safetensors": [399],
}


@pytest.mark.parametrize("file", FILES)
def test_a_released_file_says_by_its_name_how_to_sample_it(file: str) -> None:
    for written in (file, f"loras/{file}", file.lower()):
        plan = resolve([Preset(), Preset(), preset_for_file(written), BASE_SD])
        assert (plan.sampler, plan.steps, plan.eta, plan.guidance) == FILES[file]
    assert (plan.prediction_type == "sample") == ("x0" in file)


@pytest.mark.parametrize("file", TIMESTEPS)
def test_the_timesteps_of_a_released_file(file: str) -> None:
    """Of any of the solvers, on SDXL's own scheduler_config.json, which says leading."""
    plan = resolve([preset_for_file(file), BASE_SD])
    table = solver_table(
        str(plan.sampler),
        plan.steps,
        eta=plan.eta or 0.0,
        spacing=plan.spacing,
        scheduler_config=SCHEDULER,
        timesteps=plan.timesteps,
    )
    assert table["timesteps"].tolist() == TIMESTEPS[file]


def test_every_preset_but_none_is_some_files() -> None:
    assert {name_for_file(file) for file in FILES} == set(PRESETS)


@pytest.mark.parametrize(
    "file",
    [
        "style.safetensors",
        "Hyper-SDXL-3steps-lora.safetensors",
        "Hyper-SD3-8steps-CFG-lora.safetensors",
        "Hyper-FLUX.1-dev-8steps-lora.safetensors",
        "my-Hyper-SDXL-8steps-lora-merged.safetensors",
        "lcm-lora-sdxl/style.safetensors",
        "loras/pytorch_lora_weights.safetensors",
        "LoRA hyper",
        "",
    ],
)
def test_any_other_file_says_nothing(file: str) -> None:
    assert name_for_file(file) is None
    assert preset_for_file(file) == Preset()


def test_a_header_comes_before_the_file_name() -> None:
    file = preset_for_file("Hyper-SDXL-8steps-CFG-lora.safetensors")
    plan = resolve([Preset(), from_header({"sampler": "tcd", "eta": "0.5"}, "a file"), file, BASE_SD])
    assert (plan.sampler, plan.eta, plan.steps, plan.guidance, plan.spacing) == ("tcd", 0.5, 8, 5.0, None)


def test_the_user_comes_before_both() -> None:
    file = preset_for_file("dmd2_sdxl_4step_lora.safetensors")
    plan = resolve([Preset(steps=8, guidance=1.5), Preset(), file, BASE_SD])
    assert (plan.sampler, plan.steps, plan.guidance, plan.timesteps) == ("lcm", 8, 1.5, None)


@pytest.mark.parametrize("sampler", ["euler", "euler_a", "dpmpp_2m"])
def test_a_sampler_without_eta_takes_none_from_elsewhere(sampler: str) -> None:
    for preset in (PRESETS["hyper-sdxl-1step"], PRESETS["tcd-lora-sd15"]):
        plan = resolve([Preset(sampler=sampler), preset, BASE_SD])
        assert (plan.sampler, plan.eta, plan.steps) == (sampler, None, preset.steps)


def test_the_timesteps_of_a_header_are_its_steps() -> None:
    plan = resolve([Preset(), from_header({"timesteps": "[999, 499]"}, "a file"), BASE_SD])
    assert (plan.steps, plan.timesteps, plan.spacing) == (2, (999, 499), None)
    plan = resolve([Preset(steps=4), from_header({"timesteps": "[999, 499]"}, "a file"), BASE_SD])
    assert (plan.steps, plan.timesteps) == (4, None)


def test_of_the_folders_only_the_nearest_and_the_cache_repository_count() -> None:
    file = "pytorch_lora_weights.safetensors"
    assert name_for_file(f"lcm-lora-sdxl/{file}") == "lcm-lora-sdxl"
    assert name_for_file(f"lcm-lora-sdxl/styles/{file}") is None
    cached = f"models--h1t--TCD-SDXL-LoRA/snapshots/0a/{file}"
    assert name_for_file(cached) == name_for_file(f"lcm-lora-sdxl/{cached}") == "tcd-lora-sdxl"
