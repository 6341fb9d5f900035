"""What a call samples with, where several sources have a say."""

from __future__ import annotations

import pytest

from hypersd_jax.presets import BASE_SD, PRESETS, Preset, from_header, resolve

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


def test_a_header_alone_keeps_its_timesteps() -> None:
    plan = resolve([Preset(), HEADER, BASE_SD])
    assert plan.timesteps == HEADER.timesteps
    assert plan.guidance == BASE_SD.guidance


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_settles_everything_but_spacing_or_timesteps(name: str) -> None:
    plan = resolve([PRESETS[name], HEADER, BASE_SD])
    assert None not in (plan.steps, plan.sampler, plan.eta, plan.guidance)
    assert plan.spacing is None or plan.timesteps is None
