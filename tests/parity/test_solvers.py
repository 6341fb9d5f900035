"""DDIM, TCD and LCM against the diffusers scheduler of the same name, on the same latents, noise and tiny network."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hypersd_jax.diffusion import SPACINGS, Schedule, solver_table

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from tests.helpers.solver_runs import CONFIGS, error, inputs, make_scheduler, ours, theirs

STEPS = (1, 2, 3, 4, 6, 8, 12, 25, 50)
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SOLVERS = ("ddim", "tcd", "lcm")


def compare(name, config, steps, prediction, monkeypatch, *, eta=None, spacing=None, custom=None, tolerance=1e-5):
    config = {**config, "prediction_type": prediction}
    overrides = {"timestep_spacing": spacing or "trailing"} if name == "ddim" else {}
    scheduler = make_scheduler(name, config, **overrides)
    if custom is None:
        scheduler.set_timesteps(steps)
    else:
        scheduler.set_timesteps(timesteps=list(custom))
    table = solver_table(name, steps, eta=eta or 0.0, spacing=spacing, scheduler_config=config, timesteps=custom)
    np.testing.assert_array_equal(table["timesteps"], scheduler.timesteps.numpy())
    latents, noise = inputs(steps)
    reference = theirs(scheduler, latents, noise, monkeypatch, eta)
    result = error(ours(table, latents, noise, prediction), reference[-1])
    assert result < tolerance, f"{name} {steps} {prediction} eta={eta} {spacing}: {result:.2e}"
    return table, reference


# the models' own prediction types, and the other two on the first schedule (all three have the same betas)
MODELS = [
    ("sd15", "epsilon"),
    ("sd15", "v_prediction"),
    ("sd15", "sample"),
    ("sd21", "v_prediction"),
    ("sdxl", "epsilon"),
]


@pytest.mark.parametrize(("config", "prediction"), MODELS)
@pytest.mark.parametrize("spacing", [None, "leading", "linspace"])
def test_ddim_end_to_end(config, prediction, spacing, monkeypatch):
    # "leading" and "linspace" end at t = 1 or 0, where diffusers' float32 sigma = sqrt(1 - abar) is off by 1.3e-5
    for steps, eta in itertools.product(STEPS, (0.0, 0.3, 1.0)):
        tolerance = 1e-4 if spacing else 1e-5
        compare("ddim", CONFIGS[config], steps, prediction, monkeypatch, eta=eta, spacing=spacing, tolerance=tolerance)


@pytest.mark.parametrize(("config", "prediction"), [*MODELS, ("saved_euler", "epsilon")])
def test_tcd_end_to_end(config, prediction, monkeypatch):
    for steps, eta in itertools.product(STEPS, (0.0, 0.3, 1.0)):
        compare("tcd", CONFIGS[config], steps, prediction, monkeypatch, eta=eta)


@pytest.mark.parametrize(("config", "prediction"), [*MODELS, ("saved_euler", "epsilon")])
def test_lcm_end_to_end(config, prediction, monkeypatch):
    for steps in STEPS:
        compare("lcm", CONFIGS[config], steps, prediction, monkeypatch)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("config", ["sd15", "linear", "cosine"])
def test_each_step_from_the_same_latents(name, config, monkeypatch):
    """One row at a time from diffusers' own trajectory, so that errors neither add up nor cancel."""
    eta = None if name == "lcm" else 0.3
    settings = CONFIGS[config]
    tolerance = 1e-4 if config == "cosine" else 1e-5  # abar_999 = 2e-9 there: 1/alpha = 2e4 in diffusers' float32
    table, reference = compare(name, settings, 8, "epsilon", monkeypatch, eta=eta, tolerance=tolerance)
    latents, noise = inputs(8)
    for i, x in enumerate([latents, *reference[:-1]]):
        row = {key: value if value.ndim == 0 else value[i : i + 1] for key, value in table.items()}
        assert error(ours(row, x, noise[i : i + 1], "epsilon"), reference[i]) < tolerance


@pytest.mark.parametrize("name", ["ddim", "lcm"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("config", ["clipped", "linear"])
def test_clip_sample(name, prediction, config, monkeypatch):
    eta = None if name == "lcm" else 0.3
    for steps in (1, 4, 8):
        compare(name, CONFIGS[config], steps, prediction, monkeypatch, eta=eta)


def test_absent_clip_sample_takes_the_default_of_the_solvers_class(monkeypatch):
    table, _ = compare("ddim", CONFIGS["saved_euler"], 4, "epsilon", monkeypatch, eta=0.0)
    assert np.all(table["clip"] == 1)
    assert np.all(np.isinf(solver_table("lcm", 4, scheduler_config=CONFIGS["saved_euler"])["clip"]))


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_zero_terminal_snr(name, prediction, monkeypatch):
    eta = None if name == "lcm" else 0.3
    for steps in (1, 2, 4, 8, 25):
        compare(name, CONFIGS["zero_snr"], steps, prediction, monkeypatch, eta=eta)


@pytest.mark.parametrize("name", ["tcd", "lcm"])
@pytest.mark.parametrize("custom", [[800], [999, 500], [999, 749, 499, 249], [900, 700, 30, 10], [999, 0]])
def test_custom_timesteps(name, custom, monkeypatch):
    for eta in (None,) if name == "lcm" else (0.0, 0.3, 1.0):
        compare(name, CONFIGS["sdxl"], len(custom), "epsilon", monkeypatch, eta=eta, custom=custom)


@pytest.mark.parametrize("name", ["tcd", "lcm"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_the_origin_solvers_on_spaced_grids(name, spacing, monkeypatch):
    """diffusers has these grids for them only as lists; a spacing by name is the same table."""
    scheduler = make_scheduler("ddim", CONFIGS["sdxl"], timestep_spacing=spacing)
    for steps in STEPS:
        scheduler.set_timesteps(steps)
        custom, eta = scheduler.timesteps.tolist(), None if name == "lcm" else 0.3
        # "leading" and "linspace" end at t = 1 or 0, as in `test_ddim_end_to_end`
        listed, _ = compare(
            name, CONFIGS["sdxl"], steps, "epsilon", monkeypatch, eta=eta, custom=custom, tolerance=1e-4
        )
        spaced = solver_table(name, steps, eta=eta or 0.0, spacing=spacing, scheduler_config=CONFIGS["sdxl"])
        for key, value in listed.items():
            np.testing.assert_array_equal(spaced[key], value)


@pytest.mark.parametrize("name", ["tcd", "lcm"])
@pytest.mark.parametrize("origin", [30, 40, 100])
def test_other_origin_grids(name, origin, monkeypatch):
    config = {**CONFIGS["sd15"], "original_inference_steps": origin}
    for steps in (1, 4, 8, 12):
        compare(name, config, steps, "epsilon", monkeypatch, eta=None if name == "lcm" else 0.3)


def test_lcm_timestep_scaling(monkeypatch):
    for steps in (1, 4):
        compare("lcm", {**CONFIGS["sd15"], "timestep_scaling": 0.01}, steps, "epsilon", monkeypatch)


def test_spaced_grids():
    schedulers = {s: make_scheduler("ddim", CONFIGS["sd15"], timestep_spacing=s) for s in SPACINGS}
    for spacing, steps in itertools.product(SPACINGS, [*range(1, 130), *range(130, 1000, 37)]):
        scheduler = schedulers[spacing]
        scheduler.set_timesteps(steps)
        grid = solver_table("ddim", steps, spacing=spacing, scheduler_config=CONFIGS["sd15"])["timesteps"]
        # diffusers appends timestep -1 to some trailing grids, by rounding
        np.testing.assert_array_equal(grid, scheduler.timesteps.numpy()[:steps])


@pytest.mark.parametrize("config", ["sd15", "linear", "cosine", "zero_snr"])
def test_schedule_arrays(config):
    settings = {**CONFIGS[config], "prediction_type": "v_prediction"}
    expected = make_scheduler("ddim", settings).alphas_cumprod.numpy()
    # diffusers accumulates in float32; shifting to zero SNR then cancels digits near t = 999
    np.testing.assert_allclose(Schedule.from_config(settings).alphas_cumprod, expected, rtol=2e-5, atol=1e-7)


def test_trained_betas(monkeypatch):
    betas = np.linspace(0.0005, 0.02, 1000).tolist()
    compare("ddim", {**CONFIGS["sd15"], "trained_betas": betas}, 4, "epsilon", monkeypatch, eta=0.0)
