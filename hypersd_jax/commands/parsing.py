"""Options as the commands declare them: one line for what is wrong, and help with defaults and examples."""

from __future__ import annotations

import argparse
import difflib
import math
import re
import secrets
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hypersd_jax.config import SYNONYMS
from hypersd_jax.paths import expanded, parse_lora
from hypersd_jax.presets import PRESETS

DTYPES = ("float32", "bfloat16", "float16")

# What other programs call an option, where its name here is not near.
_SYNONYMS = {
    **{name: found[0] for name, found in SYNONYMS.items() if name in ("cfg", "guidance_scale")},
    "cfg_scale": "guidance",
    "num_inference_steps": "steps",
    "n_steps": "steps",
    "num_steps": "steps",
    "scheduler": "sampler",
    "solver": "sampler",
    "neg": "negative_prompt",
    "init_image": "image",
    "input_image": "image",
    "denoising_strength": "strength",
    "mask_image": "mask",
    "checkpoint": "model",
    "ckpt": "model",
    "base": "model",
    "out": "output",
    "o": "output",
    "n": "num_images",
    "p": "prompt",
    "n_samples": "num_images",
    "batch_count": "num_images",
    "num_images_per_prompt": "num_images",
    "conditioning_scale": "control_scale",
    "w": "width",
    "h": "height",
    "precision": "dtype",
}


class Names(Iterable[str]):
    """Names that a registry holds, read only where an option with such a name is checked or explained.

    So the help of one command does not wait for the imports of another's registry.
    """

    def __init__(self, read: Callable[[], Iterable[str]]) -> None:
        self._read = read

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())


class Parser(argparse.ArgumentParser):
    """Reports bad usage in one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": _Help, **kwargs})
        self.set_defaults(parser=self, run=None)

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")

    def error_unknown(self, rest: Sequence[str]) -> NoReturn:
        """Refuse arguments that no option takes, naming the nearest one."""
        self.error(f"unrecognized arguments: {' '.join(rest)}{self._hint(rest[0])}")

    def _hint(self, argument: str) -> str:
        known = {name: f"--{name}" for action in self._actions for name in _long_names(action)}
        word, equals, value = argument.lstrip("-").partition("=")
        name = word.replace("_", "-").lower()
        name = _SYNONYMS.get(name.replace("-", "_"), name).replace("_", "-")
        if not argument.startswith("-") and not equals:
            return "; a prompt is given as --prompt" if "prompt" in known else ""
        close = [name] if name in known else difflib.get_close_matches(name, known, n=1)
        if not close:
            return ""
        written = f"{known[close[0]]} {value}" if equals and value else known[close[0]]
        return f"; did you mean {written}?"


class _Help(argparse.RawDescriptionHelpFormatter):
    """Adds the defaults that are values, and keeps the examples' lines."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)

    def add_argument(self, action: argparse.Action) -> None:
        """Count a command's indentation too, without which the help of the longest name would begin a line."""
        super().add_argument(action)
        for command in self._iter_indented_subactions(action):
            length = len(self._format_action_invocation(command)) + self._current_indent
            self._action_max_length = max(self._action_max_length, length)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = action.help or ""
        empty = action.default in (None, False, argparse.SUPPRESS) or action.default == []
        return told if empty or "default" in told else f"{told} (default: %(default)s)"


def whole(minimum: int | None = None) -> Callable[[str], int]:
    """The type of an option that is a whole number in decimal digits, at least ``minimum``."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,4000}", text.strip()):
            raise ValueError
        if minimum is not None and int(text) < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, not {int(text)}")
        return int(text)

    parse.__name__ = "int"  # as argparse's message names it
    return parse


def seed(text: str) -> int:
    """The type of a seed: a whole number, or ``random`` for one that is drawn here."""
    return secrets.randbelow(2**32) if text.strip() == "random" else whole()(text)


seed.__name__ = "int"


def wholes(text: str) -> tuple[int, ...]:
    """The type of an option that is a list of whole numbers, each at least 1 and named once, such as ``1,4``."""
    if not re.fullmatch(r"[1-9][0-9]{0,8}(,[1-9][0-9]{0,8})*", text) or len(set(parts := text.split(","))) < len(parts):
        raise argparse.ArgumentTypeError(f"must be whole numbers from 1 on, such as 1,4, each once, not {text!r}")
    return tuple(int(part) for part in parts)


def step_range(text: str) -> tuple[int, int | None]:
    """The type of a range of sampling steps, counted from 1: ``1``, ``2-4``, or ``2-`` for the second to the last."""
    found = re.fullmatch(r"([1-9][0-9]{0,5})(-([1-9][0-9]{0,5})?)?", text)
    last = None if found is None else int(found[3] or 0) or (None if found[2] else int(found[1]))
    if found is None or (last is not None and last < int(found[1])):
        raise argparse.ArgumentTypeError(f"must be a range of steps such as 1, 2-4 or 2-, not {text!r}")
    return int(found[1]), last


def decimal(text: str) -> float:
    """The type of an option that is a finite decimal number."""
    number = float(text)
    if not math.isfinite(number) or "_" in text:
        raise argparse.ArgumentTypeError(f"must be a finite number, not {text!r}")
    return number


def decimals(text: str) -> tuple[float, ...]:
    """The type of an option that is a list of finite decimal numbers, such as ``0.8,1``, each once."""
    numbers = tuple(decimal(part) for part in text.split(","))
    if len(set(numbers)) < len(numbers):
        raise argparse.ArgumentTypeError(f"must be numbers, each once, not {text!r}")
    return numbers


def path(text: str) -> Path:
    """The type of an option that is a path."""
    return expanded(Path(text))


def source(text: str) -> str:
    """The type of an option that is a path or another name, such as a hub id."""
    return expanded(text)


def lora(text: str) -> str:
    """The type of ``FILE[@SCALE]``."""
    file, _ = parse_lora(text)
    name, at, scale = text.rpartition("@")
    return f"{file}@{scale}" if at and file == expanded(Path(name)) else str(file)


def reward(text: str) -> tuple[str, Path]:
    """The type of ``NAME=PATH``."""
    name, _, file = text.partition("=")
    if not (name and file):
        raise argparse.ArgumentTypeError(f"must be NAME=PATH, such as pickscore=models/PickScore_v1, not {text!r}")
    return name, path(file)


def size(text: str) -> tuple[int, int]:
    """The type of ``HxW``."""
    found = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH in pixels, such as 512x512, not {text!r}")
    return int(found[1]), int(found[2])


def mesh(text: str) -> tuple[int | None, int | str]:
    """The type of ``auto`` or ``DATAxFSDP``: the arguments of `weights.mesh.mesh_of_option`."""
    if text == "auto":
        return None, "auto"
    found = re.fullmatch(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"must be auto or DATAxFSDP, such as 8x1, not {text!r}")
    return int(found[1]), int(found[2])


def add_model(group: Any) -> None:
    """The options that name a model, and what is loaded on it."""
    group.add_argument(
        "--model",
        type=source,
        default="embedded",
        metavar="SRC",
        help="a folder, a single file or a hub id (default: the embedded model)",
    )
    add_loras(group)
    group.add_argument("--vae", type=source, metavar="SRC", help="another autoencoder, such as a tiny one")
    group.add_argument("--dtype", default="auto", choices=("auto", *DTYPES))


def add_loras(group: Any) -> None:
    """The LoRAs, and where those are looked for that are given by name."""
    group.add_argument(
        "--lora",
        type=lora,
        action="append",
        default=[],
        metavar="FILE[@SCALE]",
        help="may be given several times; with --lora-dir also a name",
    )
    group.add_argument(
        "--lora-dir", type=path, metavar="FOLDER", help="where a LoRA is looked for by name, sub-folders too"
    )


def add_base(parser: argparse.ArgumentParser) -> None:
    """The options that say what model a LoRA is for."""
    base = parser.add_mutually_exclusive_group()
    base.add_argument(
        "--base",
        type=source,
        metavar="SRC",
        help="the model that the LoRA is for, where its family is not a known one",
    )
    base.add_argument("--family", choices=("sd15", "sd21", "sdxl"), help="what the LoRA is for (default: what it fits)")


def add_mesh(group: Any, default: str) -> None:
    """The option that spreads sampling over devices; `default` says what happens without it."""
    group.add_argument(
        "--mesh",
        type=mesh,
        metavar="auto|DATAxFSDP",
        help=f"devices that share the images, such as 8x1; FSDP of them share the weights too (default: {default})",
    )


def add_settings(group: Any) -> None:
    """The options that say how to sample."""
    group.add_argument("--preset", metavar="NAME", help="settings by name, listed below")
    group.add_argument("--steps", type=whole(1), help="sampling steps")
    group.add_argument("--sampler", choices=Names(samplers), metavar="NAME", help="%(choices)s")
    group.add_argument("--spacing", choices=Names(_spacings), metavar="NAME", help="%(choices)s")
    group.add_argument("--eta", type=decimal, help="share of fresh noise, 0 to 1, of the samplers that have one")
    group.add_argument("--guidance", type=decimal, metavar="SCALE", help="classifier-free guidance; 0 or 1 is off")


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """The recipe of a run, and settings in place of its own."""
    parser.add_argument("--config", type=source, metavar="FILE|NAME", help="a recipe (default: emoji/hyper)")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings in place of the recipe's, such as seed=3 or stages.*.batch_size=4; of two for one key the last",
    )


def preset_list() -> str:
    """The names of the presets, for the end of a help text."""
    lines = textwrap.wrap(", ".join(PRESETS), 100, break_on_hyphens=False)
    return "presets:\n" + "\n".join(f"  {line}" for line in lines)


def samplers() -> Iterable[str]:
    """The names of the solvers."""
    from hypersd_jax.diffusion import SOLVERS

    return SOLVERS


def lora_layouts() -> Iterable[str]:
    """The names of the LoRA layouts that are written."""
    from hypersd_jax.weights.lora.registry import written_layouts

    return written_layouts()


def _spacings() -> Iterable[str]:
    from hypersd_jax.diffusion import SPACINGS

    return SPACINGS


def _long_names(action: argparse.Action) -> list[str]:
    return [name[2:] for name in action.option_strings if name.startswith("--")]
