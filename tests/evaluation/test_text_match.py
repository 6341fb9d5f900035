"""Text match and its zero, the Markdown table, and diversity."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hypersd_jax.data import evaluation_list
from hypersd_jax.evaluation import derangement, diversity, knows, load_scorer, text_match, write_markdown
from hypersd_jax.evaluation.tables import markdown_table


@pytest.mark.parametrize("prompts", [["a", "b"], ["a", "b", "a", "b"], ["a", "a", "b", "c", "b"], list("abcdefg")])
def test_a_derangement_gives_nobody_their_own(prompts: list[str]) -> None:
    order = derangement(prompts)
    assert order is not None
    assert sorted(order) == list(range(len(prompts)))
    assert all(prompts[i] != prompts[j] for i, j in enumerate(order))
    np.testing.assert_array_equal(order, derangement(prompts))


@pytest.mark.parametrize("prompts", [[], ["a"], ["a", "a"], ["a", "a", "a", "b"]])
def test_where_there_is_none(prompts: list[str]) -> None:
    assert derangement(prompts) is None


def test_the_whole_list_has_one() -> None:
    prompts = [item.prompt for item in evaluation_list(1000)]
    order = derangement(prompts)
    assert order is not None
    assert all(prompts[i] != prompts[j] for i, j in enumerate(order))


def test_images_that_say_nothing_gain_nothing() -> None:
    """Noise fits its own prompts no better than others: the gain's zero is zero."""
    scorer = load_scorer("report")
    prompts = [item.prompt for item in evaluation_list(200)]
    seen = scorer.params["eye.mean"] + scorer.params["eye.deviation"] * np.random.default_rng(0).normal(
        size=(200, scorer.spec.image_width)
    )
    match = text_match(scorer, seen, prompts)
    assert match is not None
    assert abs(match.gain.mean) < 3 * match.gain.standard_error
    assert match.gain.mean == pytest.approx(match.own.mean() - match.shuffled.mean(), abs=1e-9)
    order = derangement(prompts)
    assert order is not None
    again = text_match(scorer, seen[order], [prompts[i] for i in order])
    assert again is not None
    np.testing.assert_allclose(again.own, match.own[order], rtol=1e-4, atol=1e-4)


def test_which_prompts_the_scorer_knows() -> None:
    scorer = load_scorer("report")
    assert knows(scorer, [item.prompt for item in evaluation_list(300)])
    assert not knows(scorer, ["a photograph of an astronaut riding a horse"])


def test_diversity_by_hand() -> None:
    corners = np.array([[[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]])
    np.testing.assert_allclose(diversity(corners), [10 / 3, 0.0], rtol=1e-12)
    with pytest.raises(ValueError, match="two seeds"):
        diversity(corners[:, :1])


def test_the_table_has_headings_errors_and_gaps(tmp_path: Path) -> None:
    rows = [{"model": "a|b", "steps": 4, "clip": 61.254, "clip_se": 1.111}, {"model": "c", "own": float("nan")}]
    lines = markdown_table(rows).splitlines()
    assert lines[0].startswith("| Model | Steps | Text match")
    assert lines[2] == "| a/b | 4 | 61.25 ± 1.11 | \N{EN DASH} |"
    assert lines[3] == "| c | \N{EN DASH} | \N{EN DASH} | \N{EN DASH} |"
    write_markdown(tmp_path / "results.md", "Title", rows, ["A note."])
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert text.startswith("# Title\n\n| Model")
    assert text.endswith("\n\nA note.\n")
    assert [path.name for path in tmp_path.iterdir()] == ["results.md"]
