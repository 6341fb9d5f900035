"""Run all parts, or one of them: ``python -m benchmarks.gpu run``, ``python -m benchmarks.gpu sample sd15 --tiny``.

Every part is imported when it is asked for: `run` needs Python's own library alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu import run
from benchmarks.gpu.rows import Rows
from benchmarks.gpu.summary import summarise

FAMILIES = ("sd15", "sdxl")
TORCH_SIDE = ("torch", "diffusers", "transformers", "accelerate")


def main() -> None:
    """Read the sub-command and do it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, action: Callable[[argparse.Namespace], object], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(action=action)
        if name != "run":
            command.add_argument("--out", type=Path, default=run.RESULTS, help="folder of the results")
        if name not in ("run", "summary"):
            command.add_argument("--part", default=name, help="the part's name in the rows")
            command.add_argument("--tiny", action="store_true", help="tiny shapes, on a CPU")
        return command

    add("run", lambda _: sys.exit(run.main()), "All parts, as the variables of benchmarks/gpu.sh say.")
    add("summary", lambda options: summarise(options.out), "Write README.md and results.json from the rows again.")
    add("environment", _environment, "Card, driver and versions.")
    add("tests", _tests, "The tests of tests/gpu.")
    for name, action in (("sample", _sample), ("sample-torch", _sample_torch)):
        add(name, action, "UNet calls, decoding and images.").add_argument("family", choices=FAMILIES)
    train = add("train", _train, "One kind of training step.")
    train.add_argument("family", choices=FAMILIES)
    train.add_argument("case", choices=("tscd", "dmd"))
    train.add_argument("batch", type=int)
    train.add_argument("--remat", action="store_true", help="compute activations again in the backward pass")
    add("attention", _attention, "Attention kernels against XLA's own form.")
    options = parser.parse_args()
    options.action(options)


def _rows(options: argparse.Namespace) -> Rows:
    return Rows(folder=options.out, part=options.part)


def _environment(options: argparse.Namespace) -> None:
    from benchmarks.gpu.environment import describe

    describe(_rows(options), tiny=options.tiny)


def _tests(options: argparse.Namespace) -> None:
    from benchmarks.gpu.run_tests import run_tests

    run_tests(_rows(options), tiny=options.tiny)


def _sample(options: argparse.Namespace) -> None:
    from benchmarks.gpu.sample_ours import sample

    sample(options.family, _rows(options), tiny=options.tiny)


def _sample_torch(options: argparse.Namespace) -> None:
    missing = [name for name in TORCH_SIDE if importlib.util.find_spec(name) is None]
    if missing:
        print(f"{sys.executable} has no {', '.join(missing)}; TORCH_PYTHON may name an interpreter that has")
        sys.exit(run.LACKING)
    from benchmarks.gpu.sample_torch import sample

    sample(options.family, _rows(options), tiny=options.tiny)


def _train(options: argparse.Namespace) -> None:
    from benchmarks.gpu.train import Setting, train

    setting = Setting(family=options.family, case=options.case, batch=options.batch, remat=options.remat)
    train(setting, _rows(options), tiny=options.tiny)


def _attention(options: argparse.Namespace) -> None:
    from benchmarks.gpu.attention import check

    check(_rows(options), tiny=options.tiny)


if __name__ == "__main__":
    main()
