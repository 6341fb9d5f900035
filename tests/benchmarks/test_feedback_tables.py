"""The tables of the feedback comparison: changes, their errors, and how many images all judges like clearly less."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.feedback.arms import ARMS
from benchmarks.feedback.measuring import JUDGES, REWARD, Found
from benchmarks.feedback.tables import CLEARLY, markdown, summarise
from hypersd_jax.config import load_config
from hypersd_jax.recipes import find_recipe

IMAGES = np.zeros((1, 2, 2, 3), np.uint8)
PROMPTS = list("abcd")


def found(shift: np.ndarray, diversity: float = 20.0, **judges: np.ndarray) -> Found:
    """Four prompts whose scores have a standard deviation of 5."""
    start = np.array([10.0, 20.0, 10.0, 20.0])
    scores = {key: start + judges.get(key, shift) for key in (REWARD, *JUDGES)}
    return Found(scores, {"kid": 0.1, "recall": 0.5, "diversity": diversity}, IMAGES)


def test_changes_are_paired_and_averaged_over_seeds() -> None:
    nothing = np.zeros(4)
    before = [found(nothing), found(nothing)]
    after = [found(np.array([1.0, 2.0, 3.0, 4.0]), 19.0), found(np.array([3.0, 2.0, 1.0, 0.0]), 18.0)]
    row = summarise(before, after, PROMPTS)
    assert row["report"] == pytest.approx(17.0)
    assert row["report_change"] == pytest.approx(2.0)
    assert row["report_change_se"] == pytest.approx(0.0)  # each prompt's mean over the seeds is 2
    assert row["report_by_seed"] == pytest.approx([2.5, 1.5])
    assert (row["diversity"], row["diversity_before"]) == pytest.approx((18.5, 20.0))
    assert row["diversity_by_seed"] == pytest.approx([-1.0, -2.0])
    assert row["all_judges_lower"] == row["joint_collapse"] == 0.0


def test_a_prompt_that_occurs_twice_counts_once_in_the_error() -> None:
    change = np.array([1.0, 1.0, 3.0, 3.0])
    row = summarise([found(np.zeros(4))], [found(change)], ["a", "a", "b", "b"])
    assert row["report_change"] == pytest.approx(2.0)
    assert row["report_change_se"] == pytest.approx(1.0)  # of two prompts, 1 and 3


def test_a_collapse_is_clear_and_by_all_judges() -> None:
    limit = CLEARLY * 5.0
    clear, slight = -1.1 * limit, -0.9 * limit
    # Clear by all; clear by two and slight by one; clear by two alone; a gain.
    rest = np.array([clear, clear, clear, 1.0])
    row = summarise([found(np.zeros(4))], [found(rest, report=np.array([clear, slight, 1.0, 1.0]))], PROMPTS)
    assert row["joint_collapse"] == 0.25
    assert row["all_judges_lower"] == 0.5


def test_a_table_for_each_number_of_steps() -> None:
    row = summarise([found(np.zeros(4))], [found(np.ones(4))], PROMPTS)
    page = markdown([{"title": "an arm", "steps": steps, "calls": 200, "made": [36, 30], **row} for steps in (2, 1)])
    assert page.index("## 1 step\n") < page.index("## 2 steps\n")
    assert page.count("| an arm | 16.00 (+1.00 ± 0.00) |") == 2


@pytest.mark.parametrize("name", list(ARMS))
def test_every_arm_is_a_stage(name: str) -> None:
    stage = ARMS[name].stage(name, 120, 8, 3e-4)
    config = load_config(find_recipe("emoji/hyper"), [f"stages={json.dumps([stage])}", "lora.start=x"])
    assert config.stages[0].updates == round(120 / ARMS[name].calls)
