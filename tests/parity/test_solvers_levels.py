"""Euler, ancestral Euler and DPM-Solver++(2M) against the diffusers scheduler of the same name."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hypersd_jax.diffusion import SPACINGS, State, solver_table

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from tests.helpers.solver_runs import CONFIGS, error, inputs, make_scheduler, network, one_step, ours, theirs

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers

STEPS = (1, 2, 3, 4, 6, 8, 12, 25)
SOLVERS = ("euler", "euler_a", "dpmpp_2m")
RESPACED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
SD = CONFIGS["sd15"]
CASES = [
    (solver, prediction)
    for solver, prediction in itertools.product(SOLVERS, ("epsilon", "v_prediction", "sample"))
    if (solver, prediction) != ("euler_a", "sample")  # diffusers has not got it
]


def compare(name, config, steps, monkeypatch, *, spacing=None, custom=None, tolerance=1e-5):
    """Timesteps, the first latents' scale and the last latents; returns what a test may look at further."""
    scheduler = make_scheduler(name, config, **({"timestep_spacing": spacing} if spacing else {}))
    if custom is None:
        scheduler.set_timesteps(steps)
    else:
        scheduler.set_timesteps(timesteps=list(custom))
    table = solver_table(name, steps, spacing=spacing, scheduler_config=config, timesteps=custom)
    # fractional ones are interpolated by diffusers in float32 logarithms
    np.testing.assert_allclose(table["timesteps"], scheduler.timesteps.numpy(), rtol=0, atol=2e-3)
    np.testing.assert_allclose(table["init_noise_sigma"], float(scheduler.init_noise_sigma), rtol=2e-6)
    latents, noise = inputs(len(table["timesteps"]))  # fewer than `steps` where lambda_min_clipped cuts
    reference = theirs(scheduler, latents, noise, monkeypatch)
    result = error(ours(table, latents, noise, config["prediction_type"]), reference[-1])
    assert result < tolerance, f"{name} {steps} {config} {spacing}: {result:.2e}"
    return table, reference


@pytest.mark.parametrize(("name", "prediction"), CASES)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_end_to_end(name, prediction, spacing, monkeypatch):
    for steps in STEPS:
        compare(name, {**SD, "prediction_type": prediction}, steps, monkeypatch, spacing=spacing)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("config", ["sd15", "sdxl", "saved_euler", "linear"])
def test_the_configurations_own_spacing(name, config, monkeypatch):
    """SD 1.5's file names none, so the class's linspace holds; SDXL's says leading, whatever class reads it."""
    for steps in STEPS:
        compare(name, {"prediction_type": "epsilon", **CONFIGS[config]}, steps, monkeypatch)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("how", RESPACED)
def test_respaced_levels(name, prediction, how, monkeypatch):
    config = {**SD, "prediction_type": prediction, how: True}
    for steps, spacing in itertools.product(STEPS, SPACINGS):
        compare(name, config, steps, monkeypatch, spacing=spacing)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
@pytest.mark.parametrize("how", RESPACED)
def test_respaced_timesteps_at_many_step_counts(name, how):
    """DPM-Solver's are whole numbers: an error of one unit in the last place could make one timestep another."""
    config = {**SD, "prediction_type": "epsilon", how: True}
    scheduler = make_scheduler(name, config)
    for steps in [*range(1, 60), 100, 250]:
        scheduler.set_timesteps(steps)
        found = solver_table(name, steps, scheduler_config=config)["timesteps"]
        np.testing.assert_allclose(found, scheduler.timesteps.numpy(), rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("euler", {"interpolation_type": "log_linear"}),
        ("euler", {"interpolation_type": "log_linear", "use_karras_sigmas": True}),
        ("euler", {"final_sigmas_type": "sigma_min"}),
        ("euler", {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 12.0}),
        ("euler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
        ("euler", {"timestep_type": "continuous"}),
        ("dpmpp_2m", {"final_sigmas_type": "sigma_min"}),
        ("dpmpp_2m", {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
        ("dpmpp_2m", {"final_sigmas_type": "sigma_min", "lower_order_final": False, "euler_at_final": True}),
        ("dpmpp_2m", {"euler_at_final": True, "use_karras_sigmas": True}),
        ("dpmpp_2m", {"solver_type": "heun"}),
        ("dpmpp_2m", {"solver_type": "bh2"}),
        ("dpmpp_2m", {"solver_type": "logrho"}),
        ("dpmpp_2m", {"solver_order": 1}),
        ("dpmpp_2m", {"lambda_min_clipped": -2.0}),
        ("dpmpp_2m", {"lambda_min_clipped": -np.inf, "use_lu_lambdas": False}),
    ],
)
def test_settings_that_are_honoured(name, settings, monkeypatch):
    config = {"prediction_type": "epsilon", **SD, **settings}
    for steps, spacing in itertools.product((1, 2, 3, 8, 14, 15, 25), SPACINGS):
        compare(name, config, steps, monkeypatch, spacing=spacing)


@pytest.mark.parametrize("name", SOLVERS)
def test_zero_terminal_snr(name, monkeypatch):
    """The first level is 4096; from there to 0 diffusers' Euler step is a float32 difference, good to 2^-12."""
    config = {**CONFIGS["zero_snr"], "prediction_type": "v_prediction"}
    for steps in (1, 2, 4, 8, 25):
        tolerance = 1e-5 if name == "dpmpp_2m" else 1e-3
        table, _ = compare(name, config, steps, monkeypatch, spacing="trailing", tolerance=tolerance)
        assert round(float(table["init_noise_sigma"])) == (1 if name == "dpmpp_2m" else 4096)
        if steps == 1:  # at alpha = 2^-12 the clean latents are all but -v
            latents, noise = inputs(1)
            v = network(np, latents, np.full(2, 999.0, np.float64))
            assert error(ours(table, latents, noise, "v_prediction"), latents / 4096 - v) < 1e-6


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
@pytest.mark.parametrize("custom", [[800], [999, 500], [999, 749, 499, 249], [900, 700, 30, 10], [999, 0]])
def test_custom_timesteps(name, custom, monkeypatch):
    compare(name, CONFIGS["sdxl"], len(custom), monkeypatch, custom=custom)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("config", ["sd15", "sdxl"])
def test_each_step_from_the_same_latents(name, config, monkeypatch):
    """One row at a time from diffusers' own trajectory, so that errors neither add up nor cancel."""
    settings = {"prediction_type": "epsilon", **CONFIGS[config]}
    table, reference = compare(name, settings, 8, monkeypatch)
    latents, noise = inputs(8)
    before = [latents * table["init_noise_sigma"], *reference]
    for i in range(8):
        row = {key: value[i : i + 1] for key, value in table.items() if value.ndim}
        x0 = clean_estimate(table, i - 1, before[i - 1]) if i else np.zeros_like(latents)
        found = one_step(row, State(before[i], x0), noise[i : i + 1])
        assert error(found.x, reference[i]) < 1e-5


def clean_estimate(table, i, x):
    """x_0 of step i at latents x, in float64."""
    x_in = table["c_in"][i].astype(np.float64) * x
    eps = network(np, x_in, np.full(len(x), table["timesteps"][i], np.float64))
    return ((x_in - table["sigma"][i] * eps) / table["alpha"][i]).astype(np.float32)


def test_float64_by_hand():
    """DPM-Solver++(2M) as the paper writes it, in float64: the whole trajectory of an exact Gaussian denoiser."""
    config = {**SD, "prediction_type": "epsilon"}
    table = solver_table("dpmpp_2m", 12, scheduler_config=config)
    alpha, sigma = table["alpha"].astype(np.float64), table["sigma"].astype(np.float64)
    alpha, sigma = np.append(alpha, 1.0), np.append(sigma, 0.0)
    x, x0_before, spread = 1.0, 0.0, 0.5
    got, got_before = 1.0, 0.0
    for i in range(12):
        gain = alpha[i] * spread**2 / (alpha[i] ** 2 * spread**2 + sigma[i] ** 2)
        x0, got_x0 = gain * x, gain * got
        with np.errstate(divide="ignore"):
            lam = np.log(alpha[max(i - 1, 0) : i + 2]) - np.log(sigma[max(i - 1, 0) : i + 2])
        h = lam[-1] - lam[-2]
        data = x0
        if 0 < i < 11:
            r = (lam[1] - lam[0]) / h
            data = (1 + 1 / (2 * r)) * x0 - x0_before / (2 * r)
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * np.expm1(-h) * data
        row = {key: np.float64(value[i]) for key, value in table.items() if value.ndim}
        got = row["c_x0"] * got_x0 + row["c_x"] * got + row["c_x0_prev"] * got_before
        x0_before, got_before = x0, got_x0
        np.testing.assert_allclose(got, x, rtol=2e-6)
