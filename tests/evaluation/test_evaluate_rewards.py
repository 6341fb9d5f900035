"""`hypersd evaluate` with rewards and by the Hyper-SD paper's protocol, on a tiny model and tiny rewards."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import hypersd_jax as hs
from hypersd_jax import compilation
from hypersd_jax.cli import main
from hypersd_jax.evaluation import generator, paper
from hypersd_jax.evaluation import samples as samples_module
from hypersd_jax.evaluation.samples import load_run
from hypersd_jax.rewards import LoadedReward
from hypersd_jax.weights.tensors import save_tensors
from tests.helpers.small_features import small_features
from tests.helpers.tiny_clip import tiny_clip
from tests.helpers.tiny_image_reward import tiny_image_reward
from tests.helpers.tiny_model import tiny_model

PROMPTS = ["a zebra in a spaceship", "an astronaut on a horse", "a street at night"]
MANY = 3
REWARDS = ("aesthetic", "imagereward", "pickscore")
PAPER_KEYS = {
    "clip_score": ("clip_real", 1.0),
    "aesthetic_score": ("reward_aesthetic", 1.0),
    "image_reward": ("reward_imagereward", 1.0),
    "pickscore_100": ("reward_pickscore", 0.01),
}


class Evaluation(NamedTuple):
    """A finished run: its folder, its rows, and what it printed."""

    folder: Path
    rows: list[dict[str, Any]]
    printed: str


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """The paper measures 16 px here; diversity has tests of its own."""
    with small_features() as patch:
        patch.setattr(generator, "MANY_STEPS", MANY)
        patch.setattr(generator, "FURTHER_SEEDS", ())
        patch.setattr(samples_module, "SEEN_AT_A_TIME", 4)
        patch.setattr(compilation, "use_compilation_cache", lambda: None)
        patch.setitem(paper.FAMILIES, "sd_v1", paper.FAMILIES["sd_v1"]._replace(side=16))
        yield


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, prompts, a CLIP that is PickScore as well, two aesthetic predictors and an ImageReward."""
    folder = tmp_path_factory.mktemp("rewarded")
    tiny_model(folder / "model")
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    tiny_clip(folder / "clip")
    for name, bias in (("aesthetic", 5.0), ("other", 6.0)):
        head = {"weight": np.linspace(-1.0, 1.0, 6, dtype=np.float32)[None], "bias": np.asarray([bias], np.float32)}
        save_tensors(tiny_clip(folder / name) / "aesthetic_head.safetensors", head)
    (folder / "imagereward").mkdir()
    tiny_image_reward(folder / "imagereward")
    return folder


def path_of(work: Path, reward: str) -> Path:
    return work / ("clip" if reward in ("clip", "pickscore") else reward)


def given(work: Path) -> list[str]:
    """All that the protocol asks for."""
    rewards = [part for name in REWARDS for part in ("--reward", f"{name}={path_of(work, name)}")]
    return [
        "--protocol",
        "hyper-sd",
        "--prompts-file",
        str(work / "prompts.txt"),
        "--clip",
        str(work / "clip"),
        *rewards,
    ]


def evaluate(work: Path, name: str, *more: object) -> Evaluation:
    folder, printed = work / name, io.StringIO()
    arguments = ["evaluate", "--model", work / "model", "--output", folder, "--sampler", "ddim", *more]
    with contextlib.redirect_stdout(printed):
        main([str(argument) for argument in arguments])
    return Evaluation(folder, json.loads((folder / "results.json").read_text()), printed.getvalue())


@pytest.fixture(scope="module")
def done(work: Path) -> Evaluation:
    return evaluate(work, "out", "--steps", 2, *given(work))


def test_the_columns_by_hand(work: Path, done: Evaluation) -> None:
    assert [row["model"] for row in done.rows] == ["model (reference)", "model"]
    images, row = load_run(done.folder, (16, 16)).images, done.rows[-1]
    for name, key in [("clip", "clip_real"), *((name, f"reward_{name}") for name in REWARDS)]:
        scores = np.asarray(hs.rewards.load(name, path_of(work, name))(images, PROMPTS), np.float64)
        assert len(set(scores)) == len(PROMPTS)
        assert row[key] == pytest.approx(scores.mean(), rel=1e-6)
        if key != "clip_real":  # whose error is tested with the text match
            assert row[f"{key}_se"] == pytest.approx(scores.std(ddof=1) / np.sqrt(len(PROMPTS)), rel=1e-6)
            assert done.rows[0][key] != row[key]
    for name in ("results.md", "report.html"):
        text = (done.folder / name).read_text(encoding="utf-8")
        for words in ("Aesthetic score", "ImageReward", "PickScore"):
            assert f"{words}\N{NO-BREAK SPACE}↑" in text
        assert "on the scale of each reward's authors" in text.replace("&#x27;", "'")


def test_scores_are_kept_and_the_protocol_names_the_weights(
    work: Path, done: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference's row is that of its images evaluated alone, without any scored again."""
    call = ["--steps", MANY, "--prompts-file", work / "prompts.txt", "--reference", "none"]
    call += ["--cache", done.folder / "cache"]

    def refuse(*_: Any) -> Any:
        raise AssertionError("scored again")

    with monkeypatch.context() as patch:
        patch.setattr(LoadedReward, "__call__", refuse)
        again = evaluate(work, "again", *call, "--reward", f"aesthetic={work / 'aesthetic'}")
    other = evaluate(work, "changed", *call, "--reward", f"aesthetic={work / 'other'}")
    assert again.rows[0]["reward_aesthetic"] == done.rows[0]["reward_aesthetic"]
    assert other.rows[0]["reward_aesthetic"] == pytest.approx(again.rows[0]["reward_aesthetic"] + 1.0, rel=1e-5)
    assert again.rows[0]["protocol"] != other.rows[0]["protocol"]
    assert "reward_pickscore" not in again.rows[0]
    assert not (again.folder / "paper.json").exists()


def test_beside_the_paper(done: Evaluation) -> None:
    table = json.loads((done.folder / "paper.json").read_text())
    assert [row["model"] for row in table] == [
        *("SD15-Base", "SD15-LCM", "SD15-TCD", "PeRFlow", "Hyper-SD15"),
        *("model (reference)", "model"),
    ]
    for ours, row in zip(table[-2:], done.rows, strict=True):
        assert (ours["source"], ours["steps"]) == ("here", row["steps"])
        for key, (own, factor) in PAPER_KEYS.items():
            assert ours[key] == pytest.approx(factor * row[own])
            assert ours[f"{key}_se"] == pytest.approx(factor * row[f"{own}_se"])
    line = "| Hyper-SD15 | paper | LoRA | 1 | 30.87 | 5.79 | 0.29 | 0.215 |"
    assert line in (done.folder / "results.md").read_text(encoding="utf-8")
    assert line.replace("|", "").split() in [text.split() for text in done.printed.splitlines()]
    assert str(done.folder / "paper.json") in done.printed
    for text in (done.printed, (done.folder / "report.html").read_text(encoding="utf-8")):
        assert "it states neither its seeds, nor the eta" in " ".join(text.split())
    assert "Here on 3 prompts, not on the paper's 5,000." in (done.folder / "results.md").read_text(encoding="utf-8")


def test_the_gains_over_lightning_that_the_paper_states() -> None:
    """Its abstract: of one step, +0.68 in CLIP score and +0.51 in aesthetic score."""
    rows = {(row.model, row.steps): row for row in paper.FAMILIES["sdxl_base_v1-0"].rows}
    assert len(rows) == 8
    ours, theirs = rows["Hyper-SDXL", 1], rows["SDXL-Lightning", 1]
    assert (round(ours.clip - theirs.clip, 2), round(ours.aesthetic - theirs.aesthetic, 2)) == (0.68, 0.51)


def refused(work: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "--model", str(work / "model"), "--output", str(work / "refused"), *arguments])
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert len(printed.err.splitlines()) == 1
    assert not (work / "refused").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["aesthetics=CLIP"], "--reward aesthetics: 'aesthetics' is not a reward; did you mean aesthetic?"),
        (["aesthetic=CLIP"], "CLIP/aesthetic_head.safetensors"),
        (["imagereward=CLIP"], "--reward imagereward: CLIP"),
        (["clip=CLIP/config.json"], "--reward clip: CLIP/config.json"),
        (["clip=CLIP", "clip=CLIP"], "--reward clip: given twice"),
    ],
)
def test_a_reward_that_cannot_be_reported(
    arguments: list[str], words: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = str(work / "clip")
    rewards = [part for each in arguments for part in ("--reward", each.replace("CLIP", clip))]
    refused(work, rewards, words.replace("CLIP", clip), capsys)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        (paper.FAMILIES["sd_v1"], "the paper measures SD 1.5 at 512 x 512 pixels, but images of "),
        (None, "is neither SD 1.5 nor SDXL, which the paper measures"),
    ],
)
def test_a_model_that_the_paper_does_not_measure(
    family: paper.Family | None,
    words: str,
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    known = {} if family is None else {"sd_v1": family}
    monkeypatch.setattr("hypersd_jax.evaluation.hyper_sd.FAMILIES", known)
    refused(work, given(work), words, capsys)
