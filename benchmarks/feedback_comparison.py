"""Ways to raise a reward, side by side: ``python benchmarks/feedback_comparison.py --seeds 0 1 2``.

The unified LoRA that ships goes through each arm of benchmarks/feedback/arms.py, with each seed, under the same number
of UNet calls. Reward and judges are measured on held-out prompts at 1, 2 and 4 steps, before and after; best-of-n by
the reward, which trains nothing, stands beside them. Writes benchmarks/results/feedback/NAME: README.md, results.json
and a grid. Resumes where it was stopped.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import jax
import numpy as np

from benchmarks.feedback.arms import ARMS
from benchmarks.feedback.measuring import JUDGES, REWARD, SETS, Found, Measuring
from benchmarks.feedback.tables import CLEARLY, markdown, summarise
from hypersd_jax.compilation import use_compilation_cache
from hypersd_jax.config import load_config
from hypersd_jax.evaluation import image_grid, read_metrics
from hypersd_jax.recipes import find_recipe
from hypersd_jax.stages import train
from hypersd_jax.weights.components import assets

STEPS = (1, 2, 4)
COMPARED = ("feedback", "refl", "draft-1", "draft-lv", "dmd")
TRIES = (2, 4)
QUIET = ("evaluation.samples=0", "log.sample_every=0", "log.tensorboard=false")


def main() -> None:
    """Train what is missing, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="comparison", help="of the results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--student", type=Path, default=assets() / "loras" / "unified.safetensors")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(COMPARED))
    parser.add_argument("--calls", type=float, default=200, help="UNet calls of an arm and seed, for a batch")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--best-of", type=int, nargs="*", default=list(TRIES))
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "feedback")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "feedback")
    options = parser.parse_args()
    use_compilation_cache()
    runs = {(arm, seed): _trained(options, arm, seed) for seed in options.seeds for arm in options.arms}
    config = load_config(find_recipe("emoji/hyper"), [])
    measuring = Measuring(config.model.source, config.data.groups, options.images)
    rows, shown = [], {}
    for steps in STEPS:
        before = [_measured(options, measuring, options.student, steps)] * len(options.seeds)
        rows.append({"title": "before", "steps": steps, **_plain(before)})
        shown[f"before, {steps}"] = before[0].images
        for arm in options.arms:
            found = [_measured(options, measuring, runs[arm, seed], steps) for seed in options.seeds]
            stage = ARMS[arm].stage(arm, options.calls, options.batch_size, options.learning_rate)
            facts = {"arm": arm, "title": ARMS[arm].title, "steps": steps, "calls": options.calls}
            made = [_updates(options, arm, seed) for seed in options.seeds]
            rows.append(
                {**facts, "updates": stage["updates"], "made": made, **summarise(before, found, measuring.prompts)}
            )
            shown[f"{arm}, {steps}"] = found[0].images
        for count in options.best_of:
            found = [_measured(options, measuring, options.student, steps, count)] * len(options.seeds)
            facts = {"arm": f"best of {count}", "title": f"best of {count} by the reward, untrained", "steps": steps}
            rows.append({**facts, **summarise(before, found, measuring.prompts)})
        _write(options, rows, shown, measuring)


def _run_folder(options: argparse.Namespace, arm: str, seed: int) -> Path:
    name = f"{arm}-{options.calls:g}-{options.batch_size}-{options.learning_rate:g}-{seed}"
    return Path(options.output / options.student.stem / name)


def _trained(options: argparse.Namespace, arm: str, seed: int) -> Path:
    """Train an arm's stage on the student, and return the LoRA."""
    folder = _run_folder(options, arm, seed)
    lora = folder / "loras" / f"{arm}.safetensors"
    if not lora.exists():
        stage = ARMS[arm].stage(arm, options.calls, options.batch_size, options.learning_rate)
        more = (f"stages={json.dumps([stage])}", f"lora.start={options.student}", f"output_dir={folder}")
        print(f"{arm}, seed {seed}: {stage['updates']} updates", flush=True)
        train(load_config(find_recipe("emoji/hyper"), [f"seed={seed}", *QUIET, *more]))
    return lora


def _updates(options: argparse.Namespace, arm: str, seed: int) -> int:
    """Updates that were made, of which a guard may have kept fewer."""
    records = read_metrics(_run_folder(options, arm, seed) / "metrics.jsonl")
    return max(int(record["step"]) for record in records if record.get("stage") == arm)


def _measured(options: argparse.Namespace, measuring: Measuring, lora: Path, steps: int, tries: int = 1) -> Found:
    """Measure a student, or read what was measured of the same file."""
    content = hashlib.sha256(lora.read_bytes()).hexdigest()[:16]
    kept = options.output / "measured" / f"{content}-{steps}-{tries}-{options.images}.npz"
    kept.parent.mkdir(parents=True, exist_ok=True)
    if kept.exists():
        with np.load(kept, allow_pickle=False) as file:
            scores = {key: file[key] for key in (REWARD, *JUDGES)}
            return Found(scores, {key: float(file[key]) for key in SETS if key in file}, file["images"])
    found = measuring.measure(lora, steps) if tries == 1 else measuring.best_of(lora, steps, tries)
    np.savez(kept, images=found.images, **found.scores, **found.sets)
    return found


def _plain(found: list[Found]) -> dict[str, float]:
    scores = {key: float(np.mean([each.scores[key] for each in found])) for key in (REWARD, *JUDGES)}
    return {**scores, **{key: float(np.mean([each.sets[key] for each in found])) for key in SETS}}


def _arguments(options: argparse.Namespace) -> list[str]:
    """The command line, without folders."""
    lists = {"--seeds": options.seeds, "--arms": options.arms, "--best-of": options.best_of}
    single = {"--name": options.name, "--calls": f"{options.calls:g}", "--batch-size": options.batch_size}
    single |= {"--learning-rate": f"{options.learning_rate:g}", "--images": options.images}
    found = [str(part) for name, values in lists.items() for part in (name, *values)]
    return [*found, *(str(part) for item in single.items() for part in item)]


def _write(options: argparse.Namespace, rows: list[dict[str, Any]], shown: Any, measuring: Measuring) -> None:
    folder = options.results / options.name
    folder.mkdir(parents=True, exist_ok=True)
    made = f"{datetime.date.today()}, jax {jax.__version__}, {os.cpu_count()} CPU cores"
    command = shlex.join(["python", "benchmarks/feedback_comparison.py", *_arguments(options)])
    text = (
        f"# Feedback: ways to raise a reward\n\n`{command}`, {made}.\n\n"
        f"{options.calls:g} UNet calls for a batch of {options.batch_size} in each arm and seed, learning rate "
        f"{options.learning_rate:g}; {options.images} held-out prompts. In brackets: the change, with its standard "
        f"error over prompts of the mean over {len(options.seeds)} seeds. An image counts as clearly lower when it "
        f"falls by more than {CLEARLY} of a judge's standard deviation.\n"
    )
    (folder / "README.md").write_text(text + markdown(rows), encoding="utf-8")
    (folder / "results.json").write_text(json.dumps({"made": made, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    columns = {"real": measuring.true_images[: len(next(iter(shown.values())))], **shown}
    image_grid(columns, measuring.prompts[: len(columns["real"])]).save(folder / "grid.png")


if __name__ == "__main__":
    main()
