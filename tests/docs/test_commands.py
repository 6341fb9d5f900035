"""The commands of README.md and docs/ run as printed; those that need other files or hours are parsed and checked."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from hypersd_jax import cli, compilation
from hypersd_jax.config import load_config
from hypersd_jax.recipes import find_recipe
from hypersd_jax.weights.components import assets

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Of all pages together. A command that is only parsed, or not even that, is a promise less: the lists grow by decision.
RUN = 15
PARSED = 42
OTHERS = {
    "python3 -m venv .venv",
    ".venv/bin/pip install -q .",
    ".venv/bin/pip install -q -e '.[test]'",
    ".venv/bin/pip install '.[tpu]'",
    ".venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder",
}


def commands(page: Path) -> list[str]:
    """What stands in a page's blocks of shell, one command each, without comments."""
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            found += [part.strip() for part in line.partition(" #")[0].split("&&") if part.strip()]
    return found


def arguments_of(command: str) -> list[str] | None:
    """What ``hypersd`` is given; None for another program."""
    words = [word.removeprefix(".venv/bin/") for word in shlex.split(command)]
    if words[0] == "hypersd":
        return words[1:]
    if words[:2] in (["python", "train.py"], ["python", "sample.py"]):
        return [words[1].removesuffix(".py"), *words[2:]]
    return None


ALL = [(page.relative_to(ROOT).as_posix(), command) for page in PAGES for command in commands(page)]
OURS = [(page, command) for page, command in ALL if arguments_of(command) is not None]


def needs_nothing(command: str) -> bool:
    """Whether the embedded model, its shipped LoRAs and what earlier commands made are enough, in seconds."""
    arguments = arguments_of(command) or []
    return (arguments[0] == "sample" and "--model" not in arguments) or "embedded" in arguments


def test_every_command_is_run_or_parsed_or_known() -> None:
    assert {command for _, command in ALL if arguments_of(command) is None} == OTHERS
    run = [command for _, command in OURS if needs_nothing(command)]
    assert (len(run), len(OURS) - len(run)) == (RUN, PARSED)


@pytest.mark.parametrize(("page", "command"), OURS)
def test_its_options_and_keys_are_known(page: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    arguments = arguments_of(command)
    assert arguments is not None
    options = cli._parser().parse_args(arguments)
    assert callable(options.run)
    if hasattr(options, "overrides"):
        load_config(find_recipe(options.config or "emoji/hyper"), options.overrides)


def test_those_of_the_embedded_model_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In order, in a folder where a training run and a drawing program have been."""
    monkeypatch.setattr(compilation, "use_compilation_cache", lambda: None)
    monkeypatch.chdir(tmp_path)
    Path("outputs/emoji").mkdir(parents=True)
    Path("outputs/emoji/loras").symlink_to(assets() / "loras")
    Path("hypersd_jax").symlink_to(ROOT / "hypersd_jax")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    mask.save("mask.png")
    for _, command in OURS:
        if needs_nothing(command):
            cli.main(arguments_of(command))
            written = capsys.readouterr().out.split()
            assert written, command
            assert all(Path(file).stat().st_size > 500 for file in written), command
