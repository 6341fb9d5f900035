"""The fixed prompts of the embedded models: the files are what the script makes, and no list shares a prompt."""

from __future__ import annotations

from benchmarks.embedded.prompt_lists import NAMED, STYLES, SWEEP, TABLES, named_prompts, sweep_prompts
from hypersd_jax.data import COLOURS, evaluation_list


def test_each_style_meets_each_background_once() -> None:
    prompts = named_prompts()
    assert NAMED.read_text(encoding="utf-8").splitlines() == prompts
    parts = [(*prompt.removesuffix(" background").split(", "), "white")[1:3] for prompt in prompts]
    assert sorted(parts) == sorted((f"{style} style", background) for style in STYLES for background in COLOURS)
    assert len({prompt.split(", ")[0] for prompt in prompts}) == 40


def test_no_table_uses_a_prompt_of_the_sweeps() -> None:
    taken = [*named_prompts(), *(item.prompt for item in evaluation_list(TABLES))]
    prompts = SWEEP.read_text(encoding="utf-8").splitlines()
    assert prompts == sweep_prompts(taken)
    assert len(set(prompts)) == 256
    assert not set(prompts) & set(taken)
