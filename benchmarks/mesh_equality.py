"""Every stage on every mesh: the same gradients and adapters: ``python benchmarks/mesh_equality.py``.

A tiny model, float32, eight fake devices as 1 x 1, 8 x 1, 1 x 8 and 2 x 4 (data x fsdp), where small leaves of base and
state are split too. Gradients are compared at the same weights: those of a first step at rates of zero (Adam's first
moment without a memory); adapters after five steps. Writes benchmarks/results/mesh_equality.*.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

import numpy as np
import optax
from tqdm import tqdm

from hypersd_jax.config import load_config
from hypersd_jax.stages import run as stage_run
from hypersd_jax.stages.kinds import STUDENT, kind_of
from hypersd_jax.stages.streams import Stream, stream
from hypersd_jax.training import TrainState, init_state
from hypersd_jax.training.output import create_output, open_output
from hypersd_jax.weights import placement
from tests.helpers.score_runs import randomised, with_numbers
from tests.helpers.tiny_model import tiny_model

RESULT = ROOT / "benchmarks" / "results" / "mesh_equality"
MESHES = ((1, 1), (8, 1), (1, 8), (2, 4))
STEPS = 5
SHARD_ABOVE_BYTES = 1024
GOAL = {"gradient": 1e-5, "adapter": 1e-4}
"""Largest difference, relative to the norm of the whole."""

# Without a memory the first moment is the gradient, and no gradient is clipped.
SETTINGS = "updates: 100, batch_size: 16, learning_rate: 1.0e-3, beta1: 0.0, clip_norm: 1.0e+9, export: raw"
TSCD = f"kind: tscd, k: 2, solver_steps: 8, guidance: [2, 4], accumulate: 2, {SETTINGS}"
DMD = f"kind: dmd, guidance: 3, fake_updates: 2, {SETTINGS}"
FEEDBACK = "rewards: [{name: 'embedded:reward', margin: 90}], guards: null"
STAGES = {
    "tscd": TSCD,
    "tscd, adversarial, encoder": f"{TSCD}, adversarial: "
    "{weight: 0.1, features: encoder, updates: 2, r1_weight: 0.1}",
    "tscd, adversarial, pair": f"{TSCD}, adversarial: {{weight: 0.1, features: pair, loss: non_saturating}}",
    "dmd with regression and regulariser": f"{DMD}, regression: {{weight: 0.25, teacher: base, steps: 2}}, "
    "anchor: {weight: 1.0, solver_steps: 8}",
    "dmd with a reward": f"{DMD}, times: [999], feedback: {{{FEEDBACK}}}",
    "dmd, data-free": f"{DMD}, data_free: true",
    "dmd2": f"{DMD}, times: [999, 499], adversarial: {{weight: 1.0e-3, features: mid, loss: non_saturating}}",
    "tdm": f"{DMD.replace('kind: dmd', 'kind: tdm')}, times: [999, 499]",
    "one-step UNet": f"{DMD}, student: unet, times: [800], regression: {{weight: 0.25, teacher: base, steps: 2}}",
    "feedback": f"kind: feedback, times: [999], guidance: 3, anchor: {{weight: 0.1, solver_steps: 8}}, "
    f"feedback: {{{FEEDBACK}}}, {SETTINGS}",
    "lcm": f"kind: lcm, k: 1, solver_steps: 8, guidance: [2, 4], {SETTINGS}",
    "teacher": f"kind: teacher, {SETTINGS}".replace(", export: raw", ""),
    "autoencoder": f"kind: autoencoder, {SETTINGS}".replace(", export: raw", ""),
}
RECIPE = """
output_dir: {output}
model: {{source: {model}, dtype: float32}}
data: {{source: emoji, resolution: 16}}
lora: {{rank: 16}}
mesh: {{data: {data}, fsdp: {fsdp}}}
log: {{tensorboard: false, compilation_cache: false}}
evaluation: {{samples: 0, batch_size: 8}}
stages:
  - {{name: s, {stage}}}
"""


def flat(tree: Any) -> np.ndarray:
    """All numbers of a tree, float64."""
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference over that of what is expected."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def with_rates(stage: Any, factor: float) -> Any:
    """The stage with all learning rates times a factor; with zero, which a recipe may not have, nothing moves."""
    names = [name for name in ("learning_rate", "fake_learning_rate") if getattr(stage, name, None) is not None]
    rates = {name: factor * getattr(stage, name) for name in names}
    if getattr(stage, "adversarial", None) is not None:
        rates["adversarial__learning_rate"] = factor * stage.adversarial.learning_rate
    return with_numbers(stage, **rates)


def train(folder: Path, model: Path, stage: str, data: int, fsdp: int) -> dict[str, Any]:
    """Take a stage's first steps on a mesh."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(output=folder / "out", model=model, data=data, fsdp=fsdp, stage=stage))
    config = load_config(recipe)
    output = open_output(config)
    run = stage_run.open_run(config, output)
    create_output(output, config)
    (own,) = config.active_stages
    if config.adapter_stages:  # where no factor is zero, all parts of the gradient are there
        run.student = placement.place(run.mesh, jax.tree.map(np.asarray, randomised(run.student, 0)))
    kind = kind_of(own)
    frozen = placement.place(run.mesh, kind.frozen(run, own))
    found: dict[str, Any] = {}
    key = stream(config.seed, Stream.NOISE, 0)

    def fresh() -> TrainState:
        return init_state(kind.trainable(run, 0, own), own, averaged=(STUDENT,), mesh=run.mesh)

    state = fresh()
    for number, batch, _ in kind.batches(run, 0, own, frozen, 0):
        if number == 1:  # at rates of zero, so that later phases have the same weights too
            found |= {"split": _split(state.trainable), "split_frozen": _split(frozen)}
            still, _ = run.step(fresh(), frozen, batch, key, with_rates(own, 0.0))
            found["gradient"] = flat([optax.tree.get(moments, "mu") for moments in still.opt_state.values()])
        state, metrics = run.step(state, frozen, batch, key, with_rates(own, 1.0))
        if number == STEPS:
            break
    return {**found, "adapter": flat(state.trainable), "loss": float(metrics["loss"])}


def _split(tree: Any) -> int:
    return sum(leaf.addressable_shards[0].data.shape != leaf.shape for leaf in jax.tree.leaves(tree))


def main() -> None:
    """Compare, print, write; status 1 where a difference is larger than its goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=STAGES, metavar="STAGE", help="stages to compare; results of others stay"
    )
    options = parser.parse_args()
    placement.SHARD_ABOVE_BYTES = SHARD_ABOVE_BYTES
    file = RESULT.with_suffix(".json")
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    with tempfile.TemporaryDirectory() as name:
        model = tiny_model(Path(name) / "model")
        for title in tqdm(options.only or STAGES, unit="stage"):
            rows = [row for row in rows if row["stage"] != title]
            expected: dict[str, Any] | None = None
            for data, fsdp in MESHES:
                folder = Path(name) / f"{title}-{data}-{fsdp}".replace(" ", "-")
                folder.mkdir()
                found = train(folder, model, STAGES[title], data, fsdp)
                expected = expected or found
                differences = {part: distance(found[part], expected[part]) for part in GOAL}
                about = {part: found[part] for part in ("split", "split_frozen", "loss")}
                rows.append({"stage": title, "mesh": f"{data}x{fsdp}", **differences, **about})
                tqdm.write(json.dumps(rows[-1]))
            write(rows)
    sys.exit(any(row[part] > most for row in rows for part, most in GOAL.items()))


def write(rows: list[dict[str, Any]]) -> None:
    """Write the results of all stages that have been compared."""
    rows = sorted(rows, key=lambda row: list(STAGES).index(row["stage"]))
    content = {"date": datetime.date.today().isoformat(), "jax": jax.__version__, "goal": GOAL, "rows": rows}
    RESULT.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    RESULT.with_suffix(".md").write_text(page(content), encoding="utf-8")


def page(content: dict[str, Any]) -> str:
    """The table."""
    lines = [
        "# The same training on every mesh",
        "",
        f"`python benchmarks/mesh_equality.py`, {content['date']}, jax {content['jax']}: float32, a tiny model, eight",
        "fake devices. Differences to 1x1, relative to the norm: of the gradient of a step at rates of zero, goal",
        f"{GOAL['gradient']:g}, and of the trained weights after {STEPS} steps, goal {GOAL['adapter']:g}; what is",
        "above is in bold. Adam without a memory takes steps of one length, so that where a gradient is almost zero",
        "rounding decides their sign.",
        "",
        "| stage | mesh | leaves split: trained, read | gradient | weights |",
        "|---|---|---|---|---|",
    ]
    for row in content["rows"]:
        cells = [row["stage"], row["mesh"], f"{row['split']}, {row['split_frozen']}"]
        for part, most in GOAL.items():
            cells.append(f"{row[part]:.1e}" if row[part] <= most else f"**{row[part]:.1e}**")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
