"""The structure term of feedback stages: its loss and gradient by hand, a whole run, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypersd_jax import adapters
from hypersd_jax.config import DataConfig
from hypersd_jax.data import open_source
from hypersd_jax.distill import draw_trajectory
from hypersd_jax.distill.structure import InstanceTargets, instance_loss
from hypersd_jax.errors import UserError
from hypersd_jax.inputs.instance_targets import instance_targets
from hypersd_jax.models.solov2 import SoloV2Output, resize
from hypersd_jax.rewards import REWARDS, LoadedReward
from hypersd_jax.rewards.solov2 import LoadedSoloV2
from hypersd_jax.stages import structure, train
from hypersd_jax.stages.kinds import STUDENT
from hypersd_jax.stages.streams import Draw, drawn_from
from hypersd_jax.weights import write_lora
from tests.helpers.instances import NETWORK, annotated_folder, content, tiny_solo
from tests.helpers.quick import quick_jit
from tests.helpers.score_runs import TOLERANCE, ByHand, Opened, counted, open_stage, randomised, recipe, relative_error
from tests.helpers.short_runs import records, sample_cheaply

SIZE = (16, 22)
BOXES = [
    [(2, 4, 12, 6), (3, 12, 8, 4)],
    [(0, 3, 16, 16)],
    [(8, 6, 6, 10), (1, 0, 5, 14)],
    [(3, 8, 10, 6)],
]
STAGE = """
  - {{name: liked, kind: feedback, updates: 1, batch_size: 4, learning_rate: 1.0e-2, times: [999, 749, 499, 249],
     rank: 2, guidance: 1.0, anchor: null, late_steps: 2,
     feedback: {{rewards: [{{name: plain, path: x, margin: 2.0}}], guards: null}},
     structure: {{path: {path}, annotations: {folder}/instances.json, weight: 0.5, start: 800,
                  positives: 64, instances: 4}}}}
"""
TIMES = (749, 499, 249)


def _pooled(params: Any, images: jax.Array) -> SoloV2Output:
    """A network that compiles in no time: the colours of each cell and of each mask's pixel, mixed."""

    def mixed(side: int, name: str) -> jax.Array:
        return resize(images, (side, side)) @ params[name]

    cells = [tuple(mixed(side, name) for side in NETWORK.grids) for name in ("categories", "kernels")]
    return SoloV2Output(cells[0], cells[1], mixed(images.shape[1] // 4, "features"))


RANDOM = np.random.default_rng(0)
WIDTHS = {"categories": NETWORK.classes, "kernels": 4, "features": 4}
MIXING = {name: 4 * RANDOM.standard_normal((3, width), np.float32) for name, width in WIDTHS.items()}
CHEAP = LoadedSoloV2(config=NETWORK, network=_pooled, params=MIXING)  # type: ignore[arg-type]


@pytest.fixture(scope="module", autouse=True)
def _networks() -> Iterator[None]:
    """A reward that needs no network, the images' mean; and one in place of SOLOv2, by the path ``cheap``."""
    plain = LoadedReward(
        model=lambda params, images, ids: jnp.mean(images, axis=(1, 2, 3)),
        params={},
        tokenize=lambda texts: np.zeros((len(texts), 0), np.int32),
    )
    original = structure.open_network
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(REWARDS, "plain", lambda path: plain)
        patch.setattr(structure, "open_network", lambda path: CHEAP if path == "cheap" else original(path))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = annotated_folder(tmp_path_factory.mktemp("data"), SIZE, BOXES)
    tiny_solo(found / "solo")
    return found


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, model: Path, folder: Path) -> Opened:
    where, stages = tmp_path_factory.mktemp("structure"), STAGE.format(folder=folder, path="cheap")
    return open_stage(recipe(where, model, stages, source=str(folder / "images")), "distilled")


@pytest.fixture(params=["cheap", "solov2"])
def given(opened: Opened, folder: Path, request: pytest.FixtureRequest) -> Opened:
    """With the cheap network, and with a tiny SOLOv2, which takes far longer to compile."""
    return opened if request.param == "cheap" else with_solov2(opened, folder)


def with_solov2(opened: Opened, folder: Path) -> Opened:
    config = dataclasses.replace(opened.stage.structure, path=str(folder / "solo"))
    return dataclasses.replace(opened, stage=dataclasses.replace(opened.stage, structure=config))


def drawn_step(opened: Opened, key: jax.Array) -> Any:
    shape = ByHand(opened).shape
    return draw_trajectory(drawn_from(key, Draw.STRUCTURE), shape, 3, opened.batch["indices"], last=2)


@pytest.fixture(scope="module")
def key(opened: Opened) -> jax.Array:
    """One whose gradient is not at the last step."""
    return next(key for key in map(jax.random.key, range(20)) if int(drawn_step(opened, key).step) == 1)


def targets(opened: Opened) -> InstanceTargets:
    """Made by hand: 16 x 22 pixels are cropped to 16 x 16 from column 3 on, and seen as 32 x 32."""
    images = np.asarray(opened.run.source.batch(np.arange(4)).images)  # type: ignore[union-attr]
    found = []
    for pixels in images:
        masks = (pixels[..., :2] > 127).transpose(2, 0, 1).repeat(2, axis=1).repeat(2, axis=2)
        order = [
            channel for channel in np.argsort([-mask.sum() for mask in masks], kind="stable") if masks[channel].any()
        ]
        grids: Any = {"grids": NETWORK.grids, "scale_ranges": NETWORK.scale_ranges}
        found.append(instance_targets(order, masks[order], **grids, positives=64, instances=4))
    return InstanceTargets(*map(np.stack, zip(*found, strict=True)))


def trajectory(hand: ByHand, factors: Any, drawn: Any) -> np.ndarray:
    """Where the step with the gradient begins: from noised latents, along the deterministic trajectory."""
    x = hand.noise(np.asarray(hand.batch["latents"], np.float64), np.asarray(drawn.noise, np.float64), TIMES[0])
    for t, s in pairwise(TIMES[: int(drawn.step) + 1]):
        x = hand.ddim(x, hand.unet(x, t, factors)[0], t, s)
    return x


def term(opened: Opened) -> Any:
    """The stage's term of factors, frozen arrays, batch and key, and its metrics."""

    def value(factors: Any, frozen: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, Any]:
        found, metrics, calls = structure.structure_term(
            opened.run.base, opened.stage, {STUDENT: factors}, frozen, batch, key
        )
        return found, {**metrics, "calls": calls}

    return value


def test_its_loss_by_hand(given: Opened, key: jax.Array) -> None:
    hand, base, drawn = ByHand(given), given.run.base, drawn_step(given, key)
    x = trajectory(hand, hand.adapter(given.start), drawn)  # the second LoRA begins at zero
    x0 = hand.clean(x, hand.unet(x, TIMES[1], hand.adapter(given.start))[0], TIMES[1])
    decode = quick_jit(lambda params, x: base.decode(params, base.unscale(x)))
    images = np.clip(np.asarray(decode(dict(base.params["vae"]), x0.astype(np.float32))) * 0.5 + 0.5, 0, 1)
    loaded = structure.open_network(given.stage.structure.path)
    seen = quick_jit(loaded.network)(dict(loaded.params), resize(jnp.asarray(images), (32, 32)))
    wanted = instance_loss(seen.categories, seen.kernels, seen.features, targets(given))
    factors = given.kind.trainable(given.run, 0, given.stage)[STUDENT]
    value, metrics = quick_jit(term(given))(factors, given.frozen, given.batch, key)
    assert float(value) == pytest.approx(0.5 * float(wanted.total), rel=TOLERANCE)
    for name, number in (("", wanted.total), ("_category", wanted.category), ("_mask", wanted.mask)):
        assert float(metrics[f"structure{name}"]) == pytest.approx(float(number), rel=TOLERANCE)
    assert float(wanted.mask) > 0.1
    assert metrics["structure_left_out"] == 0
    assert metrics["calls"] == 2.0


def test_the_gradient_is_that_of_the_whole_chain(given: Opened, key: jax.Array) -> None:
    """Of one step, the decoder and the network; the steps before it have none, nor has the first LoRA."""
    hand, base, drawn = ByHand(given), given.run.base, drawn_step(given, key)
    own = randomised(given.kind.trainable(given.run, 0, given.stage)[STUDENT], 3)
    scales = {path: jnp.ones(2) for path in own}

    def both(factors: Any) -> Any:
        return adapters.concatenate([hand.adapter(given.start), adapters.join(factors, scales)])

    x = jnp.asarray(trajectory(hand, both(own), drawn), jnp.float32)
    alpha, sigma = (jnp.asarray(each, jnp.float32) for each in hand.at(TIMES[1]))
    loaded = structure.open_network(given.stage.structure.path)

    def by_hand(factors: Any, params: Any, x: Any, targets: InstanceTargets) -> jax.Array:
        times = np.full((len(x),), TIMES[1], np.int32)
        eps = base.components.unet(dict(base.params["unet"]), x, times, hand.cond.context, adapter=both(factors))
        images = base.decode(dict(base.params["vae"]), base.unscale((x - sigma * eps) / alpha)) * 0.5 + 0.5
        seen = loaded.network(params, resize(jnp.clip(images, 0.0, 1.0), (32, 32)))
        return 0.5 * instance_loss(seen.categories, seen.kernels, seen.features, targets).total

    wanted = quick_jit(jax.grad(by_hand))(own, dict(loaded.params), x, targets(given))
    found = quick_jit(jax.grad(term(given), has_aux=True))(own, given.frozen, given.batch, key)[0]
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found))
    assert relative_error(found, wanted) < TOLERANCE


def test_the_targets_are_of_the_cropped_images(opened: Opened) -> None:
    for ours, theirs in zip(opened.batch["structure_targets"], targets(opened), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), theirs)


def test_its_calls_are_counted(opened: Opened) -> None:
    for metrics, whole, half in counted(opened, 0, [jax.random.key(seed) for seed in range(3)]):
        assert (metrics["calls"], half) == (whole, 0)


def traced(opened: Opened, stage: Any, key: jax.Array) -> Any:
    """Shapes of the term and its metrics."""
    opened = dataclasses.replace(opened, stage=stage)
    factors = opened.kind.trainable(opened.run, 0, stage)[STUDENT]
    return jax.eval_shape(term(opened), factors, opened.frozen, opened.batch, key)


def test_the_steps_are_those_from_its_start_on(opened: Opened, key: jax.Array) -> None:
    for start, steps in ((999, 4), (800, 3), (749, 3), (300, 1)):
        stage = dataclasses.replace(opened.stage, structure=dataclasses.replace(opened.stage.structure, start=start))
        assert stage.structure_steps == steps
    assert traced(opened, stage, key)[0].shape == ()  # of one step, though there are two late ones


def test_a_file_of_solov2_is_read_and_looked_with(opened: Opened, folder: Path, key: jax.Array) -> None:
    given = with_solov2(opened, folder)
    given.kind.check(given.run, given.stage, ["distilled"])
    assert structure.open_network(str(folder / "solo")).config == NETWORK
    value, metrics = traced(given, given.stage, key)
    assert value.shape == metrics["structure_mask"].shape == ()


# MARK: a whole run


def test_a_run_with_accumulation(tmp_path: Path, model: Path, folder: Path, opened: Opened) -> None:
    """On a LoRA that there is, of images in a folder: the term is added to the rewards, and the second LoRA moves."""
    start = tmp_path / "start.safetensors"
    write_lora(start, {"unet": jax.device_get(opened.run.teacher("previous"))})
    overrides = (f"lora.start={start}", "stages.liked.updates=2", "stages.liked.accumulate=2")
    config = recipe(
        tmp_path, model, STAGE.format(folder=folder, path="cheap"), *overrides, source=str(folder / "images")
    )
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        sample_cheaply(patch)
        output = train(config)
    lines = records(output)
    assert [(line["stage"], line["step"]) for line in lines] == [("liked", 1), ("liked", 2)]
    for line in lines:
        assert line["structure"] == pytest.approx(line["structure_category"] + 3 * line["structure_mask"], rel=1e-5)
        assert line["loss"] == pytest.approx(line["feedback"] + 0.5 * line["structure"], rel=1e-5)
        assert line["structure_left_out"] == 0
        assert line["grad_norm"] > 0
    names = {path.name for path in (output / "loras").glob("*.safetensors")}
    assert names == {"liked.safetensors", "liked.feedback.safetensors"}


# MARK: refusals


def checked(opened: Opened, **changes: Any) -> None:
    stage = dataclasses.replace(opened.stage, structure=dataclasses.replace(opened.stage.structure, **changes))
    opened.kind.check(opened.run, stage, ["distilled"])


def test_what_is_left_out_is_said(opened: Opened, tmp_path: Path) -> None:
    found = content(SIZE, BOXES)
    for entry in found["annotations"][:2]:
        entry["iscrowd"] = 1
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(found))
    with pytest.warns(UserWarning, match=r"liked.structure.annotations: .*: 2 crowds are left out, 1 of 4 images have"):
        checked(opened, annotations=str(path))


@pytest.mark.parametrize(
    ("key", "content", "line"),
    [
        ("path", None, "no such file"),
        ("path", "{", "not a safetensors file"),
        ("annotations", None, "no such file"),
        ("annotations", "{", "not valid JSON"),
        ("annotations", "{}", "is not in COCO's format: 'categories' is missing"),
    ],
)
def test_files_that_are_missing_or_broken(
    opened: Opened, tmp_path: Path, key: str, content: str | None, line: str
) -> None:
    file = tmp_path / "given"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError) as raised:
        checked(opened, **{key: str(file)})
    assert str(raised.value).startswith(f"stages.liked.structure.{key}: {file}")
    assert line in str(raised.value)
    assert "\n" not in str(raised.value)


def test_annotations_of_other_images_or_categories(opened: Opened, tmp_path: Path) -> None:
    few, many = content(SIZE, BOXES[:2]), content(SIZE, BOXES)
    many["categories"].append({"id": 99})
    fewer = content(SIZE, [[] for _ in BOXES])
    fewer["categories"].pop()  # the others would be numbered anew
    for name, written, line in (
        ("few.json", few, r"few.json: 2 of 4 images are not in it: \d.png, \d.png"),
        ("many.json", many, "many.json: 4 categories, but the network has 3"),
        ("fewer.json", fewer, "fewer.json: 2 categories, but the network has 3"),
    ):
        (tmp_path / name).write_text(json.dumps(written))
        with pytest.raises(UserError, match=f"stages.liked.structure.annotations: .*{line}"):
            checked(opened, annotations=str(tmp_path / name))


def test_two_images_of_one_name(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """In folders of their own; the annotations say nothing of these."""
    names = dict(opened.run.source.files)
    first = next(iter(names))
    names[max(names) + 1] = f"elsewhere/{Path(names[first]).name}"
    monkeypatch.setitem(opened.run.source.__dict__, "files", names)
    with pytest.raises(UserError, match=r"annotations: .*: 2 images of data.source are called \w+\.png"):
        checked(opened)


def test_data_that_has_no_image_files(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opened.run, "source", open_source(DataConfig(), resolution=16, seed=0))
    with pytest.raises(UserError, match=r"liked.structure.annotations: the images of data.source=.* are no files"):
        checked(opened)
    cached = dataclasses.replace(opened.run.config.data, cache="cache")
    monkeypatch.setattr(opened.run, "config", dataclasses.replace(opened.run.config, data=cached))
    with pytest.raises(UserError, match=r"liked.structure: it needs the images themselves, without data.cache"):
        checked(opened)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("structure.start=200", "structure.start=200: below all of times [999, 749, 499, 249]"),
        ("structure.weight=0", "weight must be above 0"),
        ("structure.instances=0", "positives and instances must be at least 1"),
        ("data_free=true", "data_free: the structure term needs images"),
        ("structure={path: a}", "structure.annotations is missing"),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, override: str, line: str) -> None:
    with pytest.raises(UserError) as raised:
        recipe(tmp_path, tmp_path, STAGE.format(folder=tmp_path, path="x"), f"stages.liked.{override}")
    assert line in str(raised.value)
