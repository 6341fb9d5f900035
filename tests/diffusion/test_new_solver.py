"""A solver that is registered from outside is one like the others: in tables, pipelines, headers, commands, images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import hypersd_jax as hs
from hypersd_jax import presets
from hypersd_jax.cli import main
from hypersd_jax.diffusion import SOLVERS, Request, Solver, register_solver
from hypersd_jax.diffusion.record import Table
from tests.helpers.tiny_model import SCHEDULER, tiny_model


def coefficients(request: Request) -> tuple[np.ndarray, Table]:
    """DDIM on timesteps that lie densest at the beginning."""
    schedule, n = request.schedule, int(request.steps or 0)
    t = np.round((schedule.num_train_timesteps - 1) * (1 - (np.arange(n) / n) ** 2)).astype(np.int64)
    then = np.append(schedule.alphas_cumprod[t[1:]], schedule.final_alpha_cumprod)
    return t, {
        "alpha": schedule.alpha[t],
        "sigma": schedule.sigma[t],
        "c_x0": np.sqrt(then),
        "c_eps": np.sqrt(1 - then),
        "c_noise": np.zeros(n),
    }


TOY = Solver(
    name="toy", coefficients=coefficients, webui_name="Toy", spacing="trailing", refused={"clip_sample": False}
)
TIMESTEPS = [999, 937, 749, 437]


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOLVERS, "toy", TOY)  # so that it is taken out again
    del SOLVERS["toy"]
    register_solver(TOY)


def test_the_table(registered: None) -> None:
    table = hs.diffusion.solver_table("toy", 4, scheduler_config=SCHEDULER)
    assert table["timesteps"].tolist() == TIMESTEPS
    ddim = hs.diffusion.solver_table("ddim", None, scheduler_config=SCHEDULER, timesteps=TIMESTEPS)
    for key in ddim:
        np.testing.assert_array_equal(table[key], ddim[key], err_msg=key)


def test_what_it_refuses(registered: None) -> None:
    with pytest.raises(hs.UserError, match=r"clip_sample=true is not supported by the toy sampler"):
        hs.diffusion.solver_table("toy", 4, scheduler_config={**SCHEDULER, "clip_sample": True})
    with pytest.raises(hs.UserError, match=r"the toy sampler has no eta"):
        hs.diffusion.solver_table("toy", 4, eta=0.5, scheduler_config=SCHEDULER)


def test_a_name_is_taken_once(registered: None) -> None:
    with pytest.raises(ValueError, match="'toy'"):
        register_solver(TOY)


def test_unregistered_it_is_unknown() -> None:
    with pytest.raises(hs.UserError, match=r"sampler: unknown value 'toy'"):
        hs.diffusion.solver_table("toy", 4, scheduler_config=SCHEDULER)


def test_a_header_may_name_it(registered: None) -> None:
    assert presets.from_header({"sampler": "toy", "steps": "4"}, "file").sampler == "toy"


def test_a_pipeline_samples_with_it(registered: None, tmp_path: Path) -> None:
    pipe = hs.Pipeline.from_pretrained(tiny_model(tmp_path / "model"))
    images, theirs = (
        pipe("red apple", guidance=0, output="latent", **options)
        for options in ({"sampler": "toy", "steps": 4}, {"sampler": "ddim", "timesteps": TIMESTEPS})
    )
    np.testing.assert_array_equal(images, theirs)


def test_the_command_samples_with_it(registered: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, output = tiny_model(tmp_path / "model"), tmp_path / "image.png"
    main(
        [
            "sample",
            "--model",
            str(model),
            *["--sampler", "toy", "--steps", "2", "--prompt", "x", "--output"],
            str(output),
        ]
    )
    assert "toy, 2 steps" in capsys.readouterr().err
    with Image.open(output) as image:
        assert "Sampler: Toy, Schedule type: SGM Uniform" in image.info["parameters"]
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    assert "dpmpp_2m, toy" in " ".join(capsys.readouterr().out.split())
