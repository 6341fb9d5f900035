"""The command line before JAX: help, hints, and one quick line for what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hypersd_jax import __version__
from hypersd_jax.cli import main
from hypersd_jax.diffusion import SOLVERS, SPACINGS
from hypersd_jax.presets import PRESETS
from hypersd_jax.recipes import recipe_files, recipe_titles

ROOT = Path(__file__).parents[2]
COMMANDS = ("train", "sample", "convert", "convert lora", "convert model", "convert merge", "convert extract")
COMMANDS += ("cache", "evaluate", "stack", "benchmark", "benchmark sampling", "serve", "doctor", "inspect", "publish")

WRONG = [
    # train
    ("train lr=1e-4", "unknown key lr; did you mean stages.*.learning_rate?"),
    ("train batch_size=4", "did you mean stages.*.batch_size"),
    ("train --seed 3", "--seed is no option; settings are given as seed=3"),
    ("train --seed=3", "settings are given as seed=3"),
    ("train --lr 1e-4", "settings are given as stages.*.learning_rate=1e-4"),
    ("train --learning-rate 1e-4", "settings are given as stages.*.learning_rate=1e-4"),
    ("train --steps=4", "stages.*.updates=4"),
    ("train --stages.0.updates 4", "settings are given as stages.0.updates=4"),
    ("train --model M --config emoji", "settings are given as model=M"),
    ("train --output-dir out", "settings are given as output_dir=out"),
    ("train --resume", "a stopped run resumes when the same command is given again"),
    ("train --zzz", "unrecognized arguments: --zzz"),
    ("train --confg emoji", "unrecognized arguments: --confg"),
    ("train configs/emoji.yaml", "a recipe is given as --config configs/emoji.yaml"),
    ("train seed = 3", "did you mean seed=VALUE, without spaces?"),
    ("train seed=1 --config nope seed=2", "--config nope: no such file"),
    ("train --config configs", "--config configs: is a folder"),
    ("train model=nowhere", "model: nowhere: no such file or folder"),
    ("train model=EMPTY", "an empty folder, not a diffusers model folder"),
    ("train data=EMPTY", "data.source: EMPTY is an empty folder"),
    ("train data=/nowhere/at/all", "data.source: /nowhere/at/all is no folder, file"),
    ("train output_dir=FILE", "output_dir: FILE is a file"),
    ("cache --output out lr=1", "unknown key lr; did you mean stages.*.learning_rate?"),
    ("cache --output out --seed 3", "settings are given as seed=3"),
    ("cache --output FILE", "--output FILE: is a file, expected a folder"),
    ("cache --output out --batch-size 0", "--batch-size: must be at least 1, not 0"),
    # sample
    ("sample cat", "unrecognized arguments: cat; a prompt is given as --prompt"),
    ("sample steps=4", "did you mean --steps 4?"),
    ("sample --guidance-scale 3", "did you mean --guidance?"),
    ("sample --cfg 3", "did you mean --guidance?"),
    ("sample --num-inference-steps 3", "did you mean --steps?"),
    ("sample --stepps 3", "unrecognized arguments: --stepps 3; did you mean --steps?"),
    ("sample -n 3", "did you mean --num-images?"),
    ("sample --steps 0", "--steps: must be at least 1, not 0"),
    ("sample --steps 1_0", "--steps: invalid int value: '1_0'"),
    ("sample --guidance nan", "--guidance: must be a finite number, not 'nan'"),
    ("sample --eta 1_0.5", "--eta: must be a finite number"),
    ("sample --guidance-steps 2-1", "--guidance-steps: must be a range of steps such as 1, 2-4 or 2-, not '2-1'"),
    ("sample --base-steps 0", "--base-steps: must be a range of steps"),
    ("sample --nag-scale inf", "--nag-scale: must be a finite number"),
    ("sample --sampler ddmi", "invalid choice: 'ddmi'"),
    ("sample --preset hyper", "preset='hyper' is not known"),
    ("sample --timesteps 999,x", "--timesteps 999,x: must be whole numbers"),
    ("sample --output a.gif", "--output a.gif: must end in"),
    ("sample --output FILE/", "--output FILE: is a file, expected a folder"),
    ("sample --seed rnadom", "argument --seed: invalid int value: 'rnadom'"),
    ("sample --lora style --lora-dir nowhere", "--lora-dir nowhere: no such folder"),
    ("sample --lora style@0.5 --lora-dir EMPTY", "--lora style: no such file, and no LoRA of this name in EMPTY"),
    ("sample --prompt caf\udce9", r"--prompt must be UTF-8 text, not 'caf\xe9'"),
    ("sample --negative-prompt caf\udce9", "--negative-prompt must be UTF-8 text"),
    ("sample --model nowhere", "nowhere: no such file or folder"),
    ("sample --model EMPTY", "EMPTY: an empty folder, not a diffusers model folder"),
    ("sample --model FILE", "--prompt is missing"),
    ("sample --lora nothing.safetensors", "nothing.safetensors: no such file or folder"),
    ("sample --lora nothing.safetensors@0.5", "nothing.safetensors: no such file or folder"),
    ("sample --lora FILE@nan", "the scale 'nan' is not a number"),
    ("sample --vae nowhere", "nowhere: no such file or folder"),
    ("sample --controlnet nowhere", "nowhere: no such file or folder"),
    ("sample --image nothing.png", "--image nothing.png: no such file"),
    ("sample --mask EMPTY", "--mask EMPTY: is a folder, expected a file"),
    ("sample --control-image nothing.png", "--control-image nothing.png: no such file"),
    ("sample --prompts-file nothing.txt", "--prompts-file nothing.txt: no such file"),
    ("sample --latents nothing.npy", "--latents nothing.npy: no such file"),
    # the others
    ("evaluate --output FILE", "--output FILE: is a file"),
    ("evaluate --output out --lora nothing.safetensors", "nothing.safetensors: no such file or folder"),
    ("evaluate --output out --lora style --lora-dir EMPTY", "--lora style: no such file, and no LoRA of this name"),
    ("evaluate --output out --model nowhere", "nowhere: no such file or folder"),
    ("evaluate --output out --reference nowhere", "--reference nowhere: is neither base, none nor a folder"),
    ("evaluate --output out --clip nowhere", "--clip nowhere: no such file or folder"),
    ("evaluate --output out --prompts-file nothing.txt", "--prompts-file nothing.txt: no such file"),
    ("evaluate --output out --reward pickscore", "--reward: must be NAME=PATH, such as pickscore=models/PickScore_v1"),
    ("evaluate --output out --reward pickscore=nowhere", "--reward pickscore=nowhere: no such file or folder"),
    ("evaluate --output out --protocol hyper", "invalid choice: 'hyper'"),
    (
        "evaluate --output out --protocol hyper-sd",
        "hyper-sd measures SD 1.5 or SDXL, and the embedded model",
    ),
    (
        "evaluate --output out --protocol hyper-sd --model FILE --prompts-file FILE --reward aesthetic=FILE",
        "hyper-sd also needs --clip PATH, --reward imagereward=PATH, --reward pickscore=PATH",
    ),
    ("evaluate --output out --preset hyper", "preset='hyper' is not known"),
    ("convert lora nowhere out.safetensors --to peft", "nowhere: no such file or folder"),
    ("convert lora FILE EMPTY --to peft", "EMPTY: is a folder, so no file of that name"),
    ("convert lora FILE out.safetensors --to peft --base nowhere", "nowhere: no such file or folder"),
    ("convert model nowhere out --to diffusers", "nowhere: no such file or folder"),
    ("convert merge out.safetensors nothing.safetensors@0.5", "nothing.safetensors: no such file or folder"),
    ("convert extract nowhere FILE out.safetensors --rank 4", "nowhere: no such file or folder"),
    ("publish EMPTY name", "REPO name: must be owner/name, as the hub has it"),
    ("publish EMPTY owner/name", "EMPTY: is not a run's folder (config.yaml is missing)"),
    ("publish EMPTY owner/name --base-model sdxl", "--base-model sdxl: must be owner/name"),
    ("inspect nowhere", "nowhere: no such file or folder"),
    ("inspect FILE", "FILE: is empty"),
    ("inspect EMPTY", "EMPTY: neither a model, a LoRA, a run's output nor checkpoints"),
    ("inspect FILE --base nowhere", "nowhere: no such file or folder"),
    ("stack FILE", "the following arguments are required: STYLE, --output"),
    ("stack nothing.safetensors FILE --output out", "nothing.safetensors: no such file or folder"),
    ("stack embedded nothing.safetensors --output out", "nothing.safetensors: no such file or folder"),
    ("stack embedded FILE --output out --model FILE", "FAST: embedded is of the embedded model; name a file"),
    ("stack embedded FILE --output out --steps 4,12", "--steps 12: the embedded model's LoRAs are for 1 to 8"),
    ("stack embedded FILE --output out --scales 1,1", "--scales: must be numbers, each once, not '1,1'"),
    ("stack embedded FILE --output out --scales 1,x", "--scales: invalid decimals value: '1,x'"),
    ("stack embedded FILE --output out --n 2", "--n: must be at least 4, not 2"),
    ("stack embedded FILE --output FILE", "--output FILE: is a file, expected a folder"),
    # benchmark
    ("benchmark fly", "invalid choice: 'fly'"),
    ("benchmark sampling --stepps 4", "did you mean --steps?"),
    ("benchmark sampling --steps 1,0", "--steps: must be whole numbers from 1 on, such as 1,4, each once, not '1,0'"),
    ("benchmark sampling --steps 4,4", "--steps: must be whole numbers from 1 on, such as 1,4, each once, not '4,4'"),
    ("benchmark sampling --batch-sizes 8,", "--batch-sizes: must be whole numbers from 1 on"),
    ("benchmark sampling --size 512", "--size: must be native or HEIGHTxWIDTH in pixels, such as 512x512, not '512'"),
    ("benchmark sampling --apis jit,vmap", "--apis: must be some of pmap,jit,shard_map, each once, not 'jit,vmap'"),
    ("benchmark sampling --apis jit,jit", "--apis: must be some of pmap,jit,shard_map, each once, not 'jit,jit'"),
    ("benchmark sampling --sampler ddmi", "invalid choice: 'ddmi'"),
    ("benchmark sampling --repeats 0", "--repeats: must be at least 1, not 0"),
    ("benchmark sampling --model nowhere", "nowhere: no such file or folder"),
    ("benchmark sampling --lora nothing.safetensors", "nothing.safetensors: no such file or folder"),
    ("benchmark sampling --output FILE", "--output FILE: is a file, expected a folder"),
    # serve
    ("serve --prot 80", "unrecognized arguments: --prot 80; did you mean --port?"),
    ("serve --port 65536", "--port: must be a whole number from 0 to 65535, not '65536'"),
    ("serve --port -1", "--port: must be a whole number from 0 to 65535"),
    ("serve --host 203.0.113.1", "--host 203.0.113.1 --port 8000: cannot be listened on"),
    ("serve --token short", "--token: must be 16 to 200 letters, digits, - and _"),
    ("serve --size 512", "--size: must be HEIGHTxWIDTH in pixels, such as 512x512, not '512'"),
    ("serve --model nowhere", "nowhere: no such file or folder"),
    ("serve --lora nothing.safetensors", "nothing.safetensors: no such file or folder"),
    ("serve --controlnet nowhere", "nowhere: no such file or folder"),
    ("serve --vae nowhere", "nowhere: no such file or folder"),
    ("serve --preset hyper", "preset='hyper' is not known"),
    ("fly", "invalid choice: 'fly'"),
]

JUDGE = """
import contextlib, io, json, sys
from hypersd_jax.cli import main
found = []
for arguments in json.load(open(sys.argv[1], encoding="utf-8")):
    err, status = io.StringIO(), None
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(err):
        try:
            main(arguments)
        except SystemExit as stop:
            status = stop.code
    found.append([status, err.getvalue(), "jax" in sys.modules])
json.dump(found, open(sys.argv[2], "w", encoding="utf-8"))
"""


def test_what_is_wrong_is_said_in_one_line_before_jax_is_imported(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")

    def placed(text: str) -> str:
        return text.replace("EMPTY", str(tmp_path / "empty")).replace("FILE", str(tmp_path / "file"))

    calls = tmp_path / "calls.json"
    calls.write_text(json.dumps([placed(call).split(" ") for call, _ in WRONG]), encoding="utf-8")
    subprocess.run([sys.executable, "-c", JUDGE, calls, tmp_path / "found.json"], cwd=ROOT, check=True)
    for (call, words), (status, printed, jax) in zip(
        WRONG, json.loads((tmp_path / "found.json").read_text()), strict=True
    ):
        assert status == 2, call
        assert placed(words) in printed, call
        assert printed.count("\n") == 1, call
        assert not jax, call
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calls.json", "empty", "file", "found.json"]


@pytest.mark.parametrize("script", [["train.py", "lr=1e-4"], ["sample.py", "--lora", "nothing.safetensors"]])
def test_a_typo_costs_little_time(script: list[str]) -> None:
    """Counted in processor time, which other work on the machine does not lengthen."""
    before = os.times()
    done = subprocess.run([sys.executable, *script], cwd=ROOT, capture_output=True, text=True, check=False)
    after = os.times()
    assert done.returncode == 2
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1.5


def status_of(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return int(stop.value.code or 0)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of("--version") == 0
    assert capsys.readouterr().out == f"hypersd_jax {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["convert"]])
def test_without_a_command_the_commands_are_listed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("usage: hypersd")
    for name in (
        ("train", "sample", "convert", "cache", "evaluate", "benchmark", "serve", "doctor", "inspect", "publish")
        if not arguments
        else ("lora", "merge")
    ):
        assert f"\n    {name} " in printed.err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option_and_gives_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(*command.split(), "--help") == 0
    printed = capsys.readouterr().out
    assert "example" in printed
    assert f"hypersd {command}" in printed or f"python {command}.py" in printed
    if command == "sample":
        assert "(default: sample.png)" in printed
        assert "(default: cut)" in printed
        for group in ("what:", "with:", "how:", "from images:"):
            assert f"\n{group}\n" in printed
    if command in ("sample", "evaluate", "serve"):
        listed = printed.partition("presets:")[2].replace("\n", " ").replace(",", " ").split()
        assert listed == list(PRESETS)
    if command == "train":
        for name in recipe_files():
            assert f"\n  {name} " in printed


def test_every_recipe_says_what_it_makes() -> None:
    for name, title in recipe_titles().items():
        assert 20 < len(title) < 200, name
        assert title.endswith("."), name


def test_names_offered_are_those_that_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert ", ".join(SOLVERS) in printed
    assert ", ".join(SPACINGS) in printed
