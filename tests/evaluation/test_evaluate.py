"""``hypersd evaluate`` on a tiny model: the rows by hand, what is drawn only once, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from hypersd_jax import compilation
from hypersd_jax.cli import main
from hypersd_jax.data import COLOURS, evaluation_images, evaluation_list
from hypersd_jax.errors import UserError
from hypersd_jax.evaluation import (
    COLUMNS,
    Column,
    Item,
    derangement,
    diversity,
    evaluate,
    features,
    frechet_distance,
    generator,
    kernel_distance,
    make_model,
    register_column,
    sample,
)
from hypersd_jax.evaluation import samples as samples_module
from hypersd_jax.evaluation.samples import load_run
from hypersd_jax.evaluation.sources import folder_images, training_images
from hypersd_jax.pipeline import Pipeline
from hypersd_jax.weights.lora import write_lora
from tests.helpers.lora_files import random_adapter
from tests.helpers.small_features import small_features
from tests.helpers.tiny_model import tiny_model

N, STEPS, MANY, FURTHER = 4, 2, 3, 1_000_000
FILES = ["cache", "grid.png", "report.html", "results.json", "results.md", "run.json"]


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    with small_features() as patch:
        patch.setattr(generator, "MANY_STEPS", MANY)
        patch.setattr(generator, "FURTHER_SEEDS", (FURTHER,))
        patch.setattr(samples_module, "CHUNK", 2)
        patch.setattr(samples_module, "SEEN_AT_A_TIME", 4)  # few images need no batches of 32
        patch.setattr(compilation, "use_compilation_cache", lambda: None)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("evaluated") / "model")


@pytest.fixture(scope="module")
def lora(model: Path) -> Path:
    shapes = Pipeline.from_pretrained(model).base.components.unet.shapes
    path = model.parent / "student.safetensors"
    write_lora(path, {"unet": random_adapter(shapes, 1, scale=0.5)})
    return path


def run(model: Path, output: Path, *more: Any) -> list[dict[str, Any]]:
    arguments = ["evaluate", "--model", model, "--n", N, "--batch-size", 2, "--output", output, *more]
    main([str(argument) for argument in arguments])
    return json.loads((output / "results.json").read_text())


@pytest.fixture(scope="module")
def output(model: Path, lora: Path) -> Path:
    folder = model.parent / "out"
    run(model, folder, "--steps", STEPS, "--sampler", "ddim", "--guidance", 1, "--lora", f"{lora}@0.5")
    return folder


@pytest.fixture(scope="module")
def rows(output: Path) -> dict[str, dict[str, Any]]:
    found = json.loads((output / "results.json").read_text())
    assert len(found) == 4
    return dict(zip(("floor", "real", "reference", "student"), found, strict=True))


def looked(images: np.ndarray) -> np.ndarray:
    return features(images, batch_size=4)


def middles(images: np.ndarray) -> np.ndarray:
    """The middle quarters of 16 px images, enlarged to 16 px."""
    large = jax.image.resize(images[:, 4:12, 4:12].astype(np.float32), (len(images), 16, 16, 3), "cubic")
    return np.clip(np.asarray(large) / 255.0, 0.0, 1.0)


def generated(model: Path, seeds: list[int], **settings: Any) -> np.ndarray:
    """The list's prompts from these seeds, uint8, from latents made here."""
    pipe = settings.pop("pipe", None) or Pipeline.from_pretrained(model)
    latents = np.stack([jax.random.normal(jax.random.key(seed), (8, 8, 4), jnp.float32) for seed in seeds])
    prompts = [item.prompt for item in evaluation_list(N)]
    images = pipe(prompts, latents=latents, sampler="ddim", output="np", stepwise=True, **settings)
    return np.round(images * 255).astype(np.uint8)


def test_the_rows_by_hand(model: Path, lora: Path, rows: dict[str, dict[str, Any]]) -> None:
    pipe = Pipeline.from_pretrained(model)
    seeds = list(range(N))
    many = generated(model, seeds, pipe=pipe, steps=MANY, guidance=7.5)
    pipe.load_lora(lora, 0.5)
    student = generated(model, seeds, pipe=pipe, steps=STEPS, guidance=1.0)
    other = generated(model, [seed + FURTHER for seed in seeds], pipe=pipe, steps=STEPS, guidance=1.0)
    row, close = rows["student"], {"rel": 2e-3, "abs": 1e-4}
    assert (row["model"], row["steps"], row["guidance"], row["calls"], row["n"]) == (
        "model + student@0.5",
        STEPS,
        1.0,
        STEPS,
        N,
    )
    apart = np.sqrt(np.mean((student / 255.0 - many / 255.0) ** 2, axis=(1, 2, 3)))
    assert row["distance"] == pytest.approx(apart.mean(), **close)
    assert row["distance_se"] == pytest.approx(apart.std(ddof=1) / np.sqrt(N), **close)
    mine, theirs = looked(student), looked(many)
    training = training_images(N, None, 16)[:2]
    real = [looked(images) for images in training]
    assert row["fid_teacher"] == pytest.approx(frechet_distance(mine, theirs), rel=2e-3)
    assert row["kid"] == pytest.approx(kernel_distance(mine, theirs).mean, rel=5e-3, abs=1e-3)
    assert row["fid_train"] == pytest.approx(frechet_distance(mine, real[0]), rel=2e-3)
    assert row["diversity"] == pytest.approx(diversity(np.stack([mine, looked(other)], axis=1)).mean(), rel=2e-3)
    patches = [looked(middles(images)) for images in (student, *training)]
    assert row["patch_kid_train"] == pytest.approx(kernel_distance(*patches[:2]).mean, rel=5e-3, abs=1e-3)
    assert rows["floor"]["patch_kid_train"] == pytest.approx(kernel_distance(*patches[:0:-1]).mean, rel=1e-4, abs=1e-4)
    assert not {"precision", "recall"} & row.keys(), "four images have no three neighbours each without one of them"
    assert row["seconds_per_image"] > 0
    assert rows["reference"]["distance"] == rows["reference"]["fid_teacher"] == 0.0
    assert rows["reference"]["calls"] == 2 * MANY
    assert rows["floor"]["fid_train"] == pytest.approx(frechet_distance(*real), rel=1e-5)
    images = evaluation_images(evaluation_list(N), resolution=16)
    assert rows["real"]["fid_train"] == pytest.approx(frechet_distance(looked(images), real[0]), rel=1e-5)


def test_gains_are_above_the_shuffled_prompts(rows: dict[str, dict[str, Any]]) -> None:
    for name in ("real", "reference", "student"):
        row = rows[name]
        assert row["clip_gain"] == pytest.approx(row["clip"] - row["clip_shuffled"], abs=1e-9)
        assert row["clip_gain_se"] > 0
    assert "clip" not in rows["floor"]


def test_the_files(output: Path, rows: dict[str, dict[str, Any]]) -> None:
    assert sorted(path.name for path in output.iterdir()) == FILES
    table = (output / "results.md").read_text()
    page = (output / "report.html").read_text()
    for row in rows.values():
        assert f"| {row['model']} |" in table
        assert row["model"] in page
    assert Image.open(output / "grid.png").size[0] > 3 * 128
    kept = load_run(output, (16, 16))
    assert [item.prompt for item in kept.items] == [item.prompt for item in evaluation_list(N)]
    assert kept.images.shape == (N, 16, 16, 3)
    with pytest.raises(UserError, match="its images are 16 x 16 pixels, these 64 x 32"):
        load_run(output, (32, 64))


def test_the_table_is_printed_and_the_page_says_where_it_comes_from(
    model: Path, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new"
    arguments = ["evaluate", "--model", str(model), "--n", "3", "--batch-size", "2", "--steps", "1"]
    main([*arguments, "--cache", str(output / "cache"), "--output", str(folder)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4:] == [str(folder / name) for name in ("results.json", "results.md", "grid.png", "report.html")]
    table = [line for line in lines[:-4] if line]
    assert table[0].split()[:2] == ["model", "steps"]
    assert any(line.startswith("model (reference)") for line in table)
    assert max(map(len, table)) <= 120
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert '<pre tabindex="0">hypersd evaluate --model' in page
    for words in (f"jax {jax.__version__}", "<dt>seeds of the samples</dt><dd>0 to 2</dd>", "<dt>time</dt>"):
        assert words in page
    assert page.count("<svg") == 4  # distance and text match against steps and calls
    for item in evaluation_list(3):
        assert f"<bdi>{item.prompt}</bdi>" in page


def test_training_images_are_two_sets_with_none_in_common() -> None:
    first, second, _ = training_images(60, None, 64)
    assert len(first) == len(second) == 60
    assert not {one.tobytes() for one in first} & {one.tobytes() for one in second}
    few = training_images(10_000, ["animals & nature"], 16)
    assert len(few[0]) == len(few[1]) < 1000


def test_nothing_is_sampled_twice(
    model: Path, lora: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the cache, the same numbers and no drawing; more prompts draw only what is new; another scale all."""
    calls: list[int] = []
    really = samples_module.timed_sample

    def counted(model: Any, items: Any, **settings: Any) -> Any:
        calls.append(len(items))
        return really(model, items, **settings)

    monkeypatch.setattr(samples_module, "timed_sample", counted)
    cache = tmp_path / "cache"
    shutil.copytree(output / "cache", cache)
    call = ["--steps", STEPS, "--sampler", "ddim", "--guidance", 1, "--cache", cache]
    again = run(model, tmp_path / "again", *call, "--lora", f"{lora}@0.5", "--batch-size", 3)
    assert calls == []
    assert again == json.loads((output / "results.json").read_text())
    run(model, tmp_path / "fewer", *call, "--lora", f"{lora}@0.5", "--n", 2, "--reference", "none")
    assert calls == []
    scaled = run(model, tmp_path / "scaled", *call, "--lora", f"{lora}@0.25", "--reference", "none")
    assert calls == [2, 2, 2, 2]
    assert scaled[-1]["fid_train"] != again[-1]["fid_train"]


def test_a_damaged_chunk_is_named(model: Path, output: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(output, tmp_path / "run")
    chunk = sorted((tmp_path / "run" / "cache").iterdir())[0]
    for path in (tmp_path / "run" / "cache").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(SystemExit) as stop:
        run(model, tmp_path / "new", "--reference", tmp_path / "run", "--steps", 1)
    assert stop.value.code == 2
    printed = capsys.readouterr().err.splitlines()
    assert "kept images are damaged" in printed[-1]
    assert chunk.suffix in printed[-1]


def test_own_prompts_against_an_earlier_run_and_a_folder(
    model: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier run of the same prompts and seeds gives distances; unknown words, no text match."""

    def load_clip(path: Path) -> Any:
        assert path == tmp_path / "a_clip"
        return lambda images, texts: images[:, 0, 0, 0] + 1000.0 * np.asarray([len(text) for text in texts])

    monkeypatch.setattr(evaluate, "load_clip", load_clip)
    items = evaluation_list(N)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{item.prompt}\n" for item in items))
    folder = tmp_path / "images"
    folder.mkdir()
    for index, image in enumerate(evaluation_images(evaluation_list(8), resolution=20)):
        Image.fromarray(image).save(folder / f"{index}.png")
    (tmp_path / "a_clip").mkdir()
    call = ["--prompts-file", prompts, "--reference", output, "--reference", folder, "--clip", tmp_path / "a_clip"]
    rows = run(model, tmp_path / "out", *call, "--steps", 1, "--sampler", "tcd", "--eta", 0.5, "--guidance", 0)
    assert [row["model"] for row in rows] == ["real images against others", f"{output} (reference)", "model"]
    assert rows[2]["distance"] > 0
    assert rows[2]["n"] == rows[0]["n"] == N
    lengths = np.asarray([len(item.prompt) for item in items])
    corners = load_run(tmp_path / "out", (16, 16)).images[:, 0, 0, 0]
    assert rows[2]["clip_real"] == pytest.approx(np.mean(corners + 1000.0 * lengths), rel=1e-6)
    turned = lengths[derangement([item.prompt for item in items])]
    assert rows[2]["clip_real_gain_se"] == pytest.approx(1000 * np.std(lengths - turned, ddof=1) / np.sqrt(N), rel=1e-6)
    assert {"fid_train", "fid_teacher", "kid", "clip", "clip_shuffled", "diversity"} <= set(rows[2])

    prompts.write_text("a zebra in a spaceship\nan astronaut on a horse\n")
    rows = run(model, tmp_path / "other", "--prompts-file", prompts, "--reference", "none", "--steps", 1)
    assert len(rows) == 1
    assert set(rows[0]) == {
        "model", "sampler", "steps", "guidance", "calls", "n", "diversity", "diversity_se", "seconds_per_image",
        "protocol",
    }  # fmt: skip


def test_noise_depends_on_the_seed_alone(model: Path) -> None:
    """A stochastic sampler generates an image the same in any list, order and batch."""
    pipe = Pipeline.from_pretrained(model)
    one = make_model("one", pipe, steps=2, sampler="tcd", eta=1.0, guidance=0.0)
    items = [Item("lion, blob style", seed) for seed in (5, 6, 7)]
    all_three = sample(one, items, batch_size=2)
    turned = sample(one, [items[2], items[0]], batch_size=2)
    assert np.abs(all_three[[2, 0]].astype(int) - turned).max() <= 1
    assert np.abs(all_three[1].astype(int) - turned[0]).max() > 5
    # By hand: latents from the seed's key, what each step adds from the key that follows from it.
    keys = [jax.random.key(item.seed) for item in items]
    latents = np.stack([jax.random.normal(key, (8, 8, 4)) for key in keys])
    noise = np.stack([jax.random.normal(jax.random.fold_in(key, 1), (2, 8, 8, 4)) for key in keys], axis=1)
    call: dict[str, Any] = {"steps": 2, "sampler": "tcd", "eta": 1.0, "guidance": 0.0, "output": "np"}
    images = pipe([item.prompt for item in items], latents=latents, noise=noise, batch_size=2, stepwise=True, **call)
    np.testing.assert_array_equal(all_three, np.round(images * 255))


def test_a_metric_of_ones_own(model: Path, lora: Path, output: Path, tmp_path: Path, capsys: Any) -> None:
    """Its record alone puts it into the rows, the tables and the page, with its standard error."""
    brightness = Column(
        key="brightness",
        heading="Brightness",
        digits=4,
        better="higher",
        note="Brightness: mean of all values, 0..1.",
        measure=lambda found: found.images.mean(axis=(1, 2, 3)) / 255.0,
        needs=("match",),
    )
    register_column(brightness)
    try:
        with pytest.raises(ValueError, match="'brightness' already"):
            register_column(brightness)
        call = ["--steps", STEPS, "--sampler", "ddim", "--guidance", 1, "--lora", f"{lora}@0.5"]
        rows = run(model, tmp_path / "out", *call, "--cache", output / "cache", "--reference", "none")
    finally:
        del COLUMNS["brightness"]
    values = load_run(tmp_path / "out", (16, 16)).images.mean(axis=(1, 2, 3)) / 255.0
    assert rows[-1]["brightness"] == pytest.approx(values.mean())
    assert rows[-1]["brightness_se"] == pytest.approx(values.std(ddof=1) / np.sqrt(N))
    assert "brightness" not in rows[0], "of real images against others there is no text match"
    assert "brightness" in capsys.readouterr().out
    for name in ("results.md", "report.html"):
        text = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert "Brightness\N{NO-BREAK SPACE}↑" in text
        assert brightness.note in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--n", "0"], "--n must be at least 1, not 0"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--model", "nowhere"], "nowhere: no such file or folder"),
        (["--reference", "nowhere"], "--reference nowhere: is neither base, none nor a folder"),
        (["--reference", "base", "--reference", "none"], "--reference: at most one of"),
        (["--prompts-file", "nothing.txt"], "--prompts-file nothing.txt"),
        (["--groups", "plants"], "plants is not among"),
        (["--lora", "x.safetensors@much"], "the scale 'much' is not a number"),
        (["--lora", "nothing.safetensors"], "nothing.safetensors"),
        (["--sampler", "ddmi"], "ddmi"),
        (["--steps", "0"], "steps"),
        (["--preset", "hyper"], "preset='hyper' is not known"),
        (["--clip", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: list[str], words: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "--model", str(model), "--n", "3", "--output", str(tmp_path / "out"), *arguments])
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert len(printed.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("default")
def test_images_that_are_not_finite_are_not_measured(
    model: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor is every long prompt reported in a line of its own."""
    prompts = tmp_path / "prompts.txt"
    han = "".join(chr(0x4E05 + 37 * i) for i in range(9))  # 27 tokens, of which 22 are read
    prompts.write_text("".join(f"{han} {number}\n" for number in range(5)), encoding="utf-8")
    call = ["--prompts-file", prompts, "--reference", "none", "--steps", STEPS, "--sampler", "ddim", "--guidance", 1]
    with pytest.raises(SystemExit) as stop:
        run(model, tmp_path / "out", *call, "--lora", f"{lora}@1e30")
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hypersd: ")]
    assert lines[0].startswith(
        f"hypersd: warning: {N} prompts are longer than 22 tokens; ignored, for example of '{han} 0': "
    )
    assert lines[1].startswith("hypersd: of 2 images 1, 2 are not finite (NaN or infinity): a LoRA, its scale ")
    assert lines[1].endswith(f"; the first is of '{han} 0'")
    assert len(lines) == 2
    assert not (tmp_path / "out" / "results.json").exists()
    assert not list(tmp_path.glob("out/cache/*"))


def test_a_folder_with_too_few_images(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (16, 16), COLOURS["red"]).save(folder / "one.png")
    with pytest.raises(SystemExit):
        run(model, tmp_path / "out", "--reference", folder)
    assert f"--reference {folder}: holds 1 images, but distances need at least 6" in capsys.readouterr().err
    for index in range(6):
        (folder / f"{index}.png").write_bytes(b"no image")
    with pytest.raises(SystemExit):
        run(model, tmp_path / "out", "--reference", folder)
    assert f"holds 7 images, but distances need at least 6; left out: 6 unreadable ({folder}" in capsys.readouterr().err


def test_a_folder_is_read_as_training_reads_it(tmp_path: Path) -> None:
    """Hidden files are passed over, links followed, unreadable images counted; upright, in sRGB, on white."""
    (tmp_path / "set").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.new("RGB", (8, 16), (0, 0, 255))
    turned.paste((255, 0, 0), (0, 8, 8, 16))  # the right half, stored at the bottom
    for index in range(3):
        turned.save(tmp_path / "set" / f"{index}.JFIF", "PNG", exif=exif)
        turned.save(tmp_path / "elsewhere" / f"{index}.png", exif=exif)
    (tmp_path / "set" / "._0.png").write_bytes(b"what another system leaves")
    for index in range(3, 6):
        (tmp_path / "set" / f"{index}.png").write_bytes(b"broken")
    with pytest.warns(UserWarning, match=r"left out of 9 images: 3 unreadable \(.*\.png: not in a known image format"):
        first, second, _ = folder_images(tmp_path / "set", 10, (8, 16))
    for images in (first, second):
        assert images.shape == (3, 8, 16, 3)
        np.testing.assert_array_equal(images[:, :, 0], np.broadcast_to((255, 0, 0), (3, 8, 3)))
        np.testing.assert_array_equal(images[:, :, -1], np.broadcast_to((0, 0, 255), (3, 8, 3)))
