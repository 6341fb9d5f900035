"""What draws: the images of `hypersd sample`, by programs that are all compiled before the first visitor comes."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np
import pytest

from hypersd_jax.errors import UserError
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.serving.engine import Abandoned, probes
from hypersd_jax.serving.request import STUDENT, TEACHER, Request
from tests.helpers.compilations import Compilations
from tests.helpers.live import Canvas

SAME = 1e-6


@pytest.fixture(scope="module")
def requests(canvas: Canvas) -> dict[str, Request]:
    """One of each mode."""
    return {probe.mode: probe for probe in probes(canvas.offer)}


def test_nothing_is_compiled_after_the_start(canvas: Canvas) -> None:
    """Whatever a request may change: prompt, negative, seed, steps, guidance, strength, scales, mode, teacher."""
    rng, counter = random.Random(0), Compilations.counting()
    for probe in probes(canvas.offer):
        for steps in range(1, 9):
            request = dataclasses.replace(
                probe,
                prompt="cat " * rng.randrange(40),
                negative=rng.choice(["", "blue"]),
                seed=rng.randrange(2**32),
                steps=steps,
                guidance=rng.uniform(1.1, 20) if probe.guided else rng.choice([0.0, 1.0]),
                strength=rng.choice([1.0, rng.uniform(1 / steps, 1)]),
                control_scale=rng.uniform(0, 2),
                loras={name: rng.uniform(-2, 2) for name in canvas.offer.loras},
            )
            canvas.engine.draw(request)
        canvas.engine.draw(request, TEACHER)
    assert counter.count == 0


def test_a_student_draws_what_a_pipeline_does(canvas: Canvas, requests: dict[str, Request], live_files: Any) -> None:
    pipe = Pipeline.from_pretrained(live_files.model)
    for text in live_files.lora:
        file, _, scale = text.rpartition("@")
        pipe.load_lora(file, float(scale))
    request = dataclasses.replace(requests["text"], loras=canvas.offer.loras, guidance=0.0, seed=9, steps=3)
    drawn = canvas.engine.draw(request)
    expected = pipe("a", steps=3, guidance=0.0, sampler="tcd", seed=9, output="np")[0]
    np.testing.assert_allclose(drawn.image, expected, atol=SAME)
    pipe.unload_lora()
    expected = pipe("a", "b", seed=9, output="np")[0]
    np.testing.assert_allclose(canvas.engine.draw(request, TEACHER).image, expected, atol=SAME)


def test_each_setting_changes_the_image(canvas: Canvas, requests: dict[str, Request]) -> None:
    changes: dict[str, dict[str, Any]] = {
        "text": {"prompt": "b", "seed": 2, "steps": 5, "loras": {"fast": 0.5, "style": 0.0}, "negative": "c"},
        "image": {"strength": 0.5},
        "control": {"control_scale": 0.2},
    }
    for mode, each in changes.items():
        request = dataclasses.replace(requests[mode], guidance=3.0, steps=4, strength=1.0)
        before = canvas.engine.draw(request).image
        assert np.array_equal(before, canvas.engine.draw(request).image)
        for name, value in each.items():
            after = canvas.engine.draw(dataclasses.replace(request, **{name: value})).image
            assert np.abs(after - before).max() > 1e-4, name


def test_the_kept_part_of_an_inpainted_picture_stays(canvas: Canvas, requests: dict[str, Request]) -> None:
    """Its upper half is painted anew; the lower one is what the autoencoder makes of the picture."""
    request = dataclasses.replace(requests["inpaint"], strength=1.0, guidance=0.0)
    first, second = (canvas.engine.draw(dataclasses.replace(request, seed=seed)).image for seed in (1, 2))
    apart = np.abs(first - second).mean(axis=(1, 2))
    assert apart[:6].min() > 10 * apart[-4:].max()


def test_what_is_not_wanted_ends_after_a_step(canvas: Canvas, requests: dict[str, Request]) -> None:
    asked = []

    def wanted() -> bool:
        asked.append(1)
        return len(asked) < 3

    with pytest.raises(Abandoned):
        canvas.engine.draw(dataclasses.replace(requests["text"], steps=8), wanted=wanted)
    assert len(asked) == 3


def test_images_that_are_not_finite_are_an_error(
    canvas: Canvas, requests: dict[str, Request], monkeypatch: Any
) -> None:
    pipe = canvas.engine._pipes[STUDENT, False]
    generate = pipe.generate

    def broken(*arguments: Any, **more: Any) -> Any:
        images, settings = generate(*arguments, **more)
        return images * np.nan, settings

    monkeypatch.setattr(pipe, "generate", broken)
    with pytest.raises(UserError, match="not finite"):
        canvas.engine.draw(requests["text"])


def test_a_pipeline_beside_another_shares_its_programs(canvas: Canvas) -> None:
    """And none of its LoRAs: what it draws is the base's."""
    pipe = canvas.engine._pipes[STUDENT, False]
    counter = Compilations.counting()
    beside = pipe.beside()
    call: dict[str, Any] = {"steps": 2, "guidance": 3.0, "output": "np", "callback": lambda *_: None}
    drawn = beside("a", **call)
    assert counter.count == 0
    assert np.abs(drawn - pipe("a", **call)).max() > 1e-4
    assert beside.base.params is pipe.base.params
