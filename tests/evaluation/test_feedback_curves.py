"""The plot of a stage with feedback: which curves it has, what they are called, and the page around it."""

from __future__ import annotations

import re

from hypersd_jax.config import FeedbackConfig, RewardConfig
from hypersd_jax.evaluation.feedback_curves import feedback_section
from hypersd_jax.evaluation.report import Report, render

RECORDS = [
    {"stage": "tscd-1", "step": 1, "loss": 0.5},
    {"stage": "liked", "step": 0, "fixed_reward": 40.0, "judge": 50.0, "judge_2": 0.0, "recall": 0.0},
    {"stage": "liked", "step": 1, "loss": 3.0, "reward": 41.0},
    {
        "stage": "liked",
        "step": 10,
        "fixed_reward": 50.0,
        "judge": 45.0,
        "judge_2": 2.0,
        "recall": 0.0,
        "sharpness": 0.6,
    },
]


def test_each_curve_is_named_with_its_first_and_last_value() -> None:
    stage = FeedbackConfig(rewards=(RewardConfig(name="embedded:reward"),))
    found = feedback_section(RECORDS, {"liked": stage.guarded})
    items = re.findall(r"<bdi>(.*?)</bdi>", found)
    assert items == [
        "reward embedded:reward: 40 to 50",
        "judge embedded:report: 50 to 45",
        "judge embedded:pixels: 0 to 2",
        "recall: 0 to 0",
    ]
    assert found.count("<svg") == 1
    assert "tscd-1" not in found


def test_a_run_without_feedback_has_no_such_section() -> None:
    assert feedback_section(RECORDS[:1], {}) == ""
    assert "<h2>Feedback</h2>" not in render(Report(title="t", metrics=RECORDS[:1]))
    assert "<h2>Feedback</h2>" in render(Report(title="t", metrics=RECORDS))
