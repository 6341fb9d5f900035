"""The training steps' benchmark on a tiny model, and with it the whole TSCD step against diffusers and PEFT.

Both sides start from one set of weights and one LoRA that is nowhere zero, and read the same draws: the losses and
gradient norms of several updates agree only if schedule, teacher's guidance, solver steps, target, clipping, Adam and
moving average all do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

for name in ("torch", "diffusers", "peft"):
    pytest.importorskip(name)

from benchmarks import training_step
from benchmarks.sides.training import CASES, COMPARED, EARLIER, find_case

TOLERANCE = 1e-4
"""Relative, of float32 losses and gradient norms that two frameworks compute. Measured: 2e-5; with another EMA decay,
without clipping or with another first moment's decay 7e-4 or more."""
REPEATS = 3
FREE = "dmd-data-free"


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("training-step") / "tiny.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_PLATFORMS", "cpu")
        patch.setenv("OMP_NUM_THREADS", "1")
        arguments = ["--shape", "tiny", "--cases", COMPARED, "--repeats", str(REPEATS), "--output", str(path)]
        training_step.main(arguments)
    return path


@pytest.fixture(scope="module")
def case(output: Path) -> dict[str, Any]:
    return json.loads(output.read_text())["cases"][COMPARED]


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_the_tscd_step_is_that_of_diffusers_and_peft(case: dict[str, Any], name: str) -> None:
    ours, theirs = ([update[name] for update in side["updates"]] for side in (case, case["pytorch"]))
    assert len(ours) == REPEATS + 1
    assert ours == pytest.approx(theirs, rel=TOLERANCE, abs=0)
    assert case["compared"]["largest difference"][name] < TOLERANCE
    assert min(theirs) > 0
    assert len(set(theirs)) == len(theirs)  # every update is another one


def test_what_is_measured(case: dict[str, Any], output: Path) -> None:
    for side in (case, case["pytorch"]):
        assert side["seconds"] > 0
        assert 0 < side["held GiB"] <= side["peak GiB"]
        assert (side["platform"], side["dtype"]) == ("cpu", "float32")
    assert case["compile seconds"] > 0
    assert case["compared"]["ratio"]["seconds"] == pytest.approx(case["seconds"] / case["pytorch"]["seconds"])
    sizes = case["bytes"]
    assert sizes["average"] == sizes["trainable"]
    assert sizes["optimizer"] == 2 * sizes["trainable"] + 4  # two moments, and AdamW's counter
    assert sizes["frozen"] > sizes["trainable"]
    # The plan's arguments are what the step is given; its outputs take their place.
    given = sum(sizes.values())
    assert case["XLA GiB"]["arguments"] * 2**30 == pytest.approx(given, rel=0.1)
    assert case["XLA GiB"]["new outputs"] < case["XLA GiB"]["arguments"] / 10
    text = output.with_suffix(".md").read_text()
    assert "diffusers + PEFT" in text
    assert CASES[COMPARED].derivation() in text


def test_no_call_is_wasted(case: dict[str, Any]) -> None:
    for ours, theirs in zip(case["updates"], case["pytorch"]["updates"], strict=True):
        assert ours["calls"] == theirs["calls"]
        assert ours["calls"] in (ours["minimum"], ours["minimum"] - 1)  # the target may be spared


def test_the_fewest_calls() -> None:
    assert CASES[COMPARED].derivation() == "student 1 + guided teacher 2 + target 1 = 4"
    few = CASES["dmd2"]
    assert few.fake is not None
    assert few.student.least(0) == 4
    assert few.student.least(3) == 7
    assert few.fake.least(2) == few.fake.times * 4.5
    assert few.derivation().endswith(f"= {5.5 + few.fake.times * 4:g}")
    once = find_case("dmd2", 1)
    assert once.stage["fake_updates"] == 1
    assert once.derivation().endswith("= 9.5")
    assert find_case(COMPARED, 1) == CASES[COMPARED]
    assert [name for name, case in CASES.items() if EARLIER in case.student.calls] == ["dmd2", "tdm"]


def test_compiling_alone(tmp_path: Path) -> None:
    """A stage of score distillation is compared with TSCD, and another number of fake updates is the same work."""
    kernels = {}
    for updates in (1, 3):
        path = tmp_path / f"{updates}.json"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("JAX_PLATFORMS", "cpu")
            cases = ["--cases", COMPARED, FREE] if updates == 1 else ["--cases", FREE]
            training_step.main(
                ["--shape", "tiny", "--compile", *cases, "--fake-updates", str(updates), "--output", str(path)]
            )
        found = json.loads(path.read_text())["cases"]
        kernels[updates] = found[FREE]["kernels"]
        assert not any(case["compiled before"] or "seconds" in case for case in found.values())
        if updates == 1:
            assert found[FREE]["compile CPU seconds"] > found[COMPARED]["compile CPU seconds"] > 0
            ratio = kernels[1] / found[COMPARED]["kernels"]
            assert f"{ratio:.2f} |" in path.with_suffix(".md").read_text()
    assert kernels[3] == pytest.approx(kernels[1], rel=0.05)
