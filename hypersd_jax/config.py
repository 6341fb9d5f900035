"""Typed configuration: YAML plus ``key.path=value`` overrides into frozen dataclasses.

Unknown keys and bad values are errors that name the key and the nearest valid name; every key is read by some code.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from hypersd_jax.errors import UserError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base model that is distilled: a diffusers folder, or ``embedded`` for the one that ships with the package."""

    source: str = "embedded"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    remat: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Image-text pairs: ``emoji`` (ships with the package) or a folder of pictures with captions."""

    source: str = "emoji"
    resolution: int | None = None
    white_fraction: float = 0.5
    groups: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.white_fraction <= 1.0:
            raise ValueError(f"white_fraction must lie in 0..1, not {self.white_fraction}")
        if self.resolution is not None and self.resolution < 8:
            raise ValueError(f"resolution must be at least 8, not {self.resolution}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The student's adapter on the UNet; ``alpha: null`` means alpha = rank, that is scale 1."""

    rank: int = 64
    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(f"alpha must be above 0, not {self.alpha}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of trajectory-segmented consistency distillation (arXiv 2404.13686, Algorithm 1).

    ``k`` is the number of segments and ``solver_steps`` the size N of the teacher's DDIM grid; ``guidance`` is the
    range, in diffusers' ``guidance_scale``, that the teacher's guidance is drawn from; ``ema`` is the decay mu of the
    target network (0: the target is the student itself); ``teacher`` chooses between the two readings of the paper:
    the guided base model in every stage, or the previous stage's student. ``sampler``, ``eta`` and ``guidance`` 0 go
    into the header of the exported file, so that it samples itself as it was trained.
    """

    name: str
    kind: Literal["tscd"] = "tscd"
    k: int
    solver_steps: int = 40
    updates: int
    batch_size: int
    accumulate: int = 1
    learning_rate: float = 1e-6
    warmup: int = 0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    guidance: tuple[float, float] = (3.0, 8.0)
    teacher: Literal["base", "previous"] = "base"
    ema: float = 0.95
    export: Literal["ema", "raw"] = "ema"
    distance: Literal["mse", "pseudo_huber"] = "mse"
    huber_c: float = 0.001
    offset_noise: float = 0.0
    sampler: Literal["ddim", "tcd", "lcm"] = "ddim"
    eta: float = 0.0

    def __post_init__(self) -> None:
        for key in ("k", "solver_steps", "updates", "batch_size", "accumulate"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, not {getattr(self, key)}")
        if self.solver_steps % self.k:
            raise ValueError(f"solver_steps ({self.solver_steps}) must be a multiple of k ({self.k})")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be above 0, not {self.learning_rate}")
        if self.warmup < 0 or self.weight_decay < 0 or self.offset_noise < 0:
            raise ValueError("warmup, weight_decay and offset_noise must not be negative")
        if self.clip_norm <= 0:
            raise ValueError(f"clip_norm must be above 0, not {self.clip_norm}")
        if self.huber_c <= 0:
            raise ValueError(f"huber_c must be above 0, not {self.huber_c}")
        if not (0.0 <= self.ema < 1.0 and 0.0 <= self.beta1 < 1.0 and 0.0 <= self.beta2 < 1.0):
            raise ValueError("ema, beta1 and beta2 must lie in [0, 1)")
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"eta must lie in 0..1, not {self.eta}")
        low, high = self.guidance
        if low > high or low < 0:
            raise ValueError(f"guidance must be a range [low, high] with 0 <= low <= high, not [{low}, {high}]")
        if self.name in ("", ".", "..") or set(self.name) & set("/\\ "):
            raise ValueError(f"name {self.name!r} must be a plain file name")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along the two axes; ``data: null`` takes all that ``fsdp`` leaves."""

    data: int | None = None
    fsdp: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written while training; ``sample_every: 0`` draws a grid at the end of each stage only."""

    every: int = 1
    sample_every: int = 0
    checkpoint_every: int = 200
    tensorboard: bool = True
    compilation_cache: bool = True

    def __post_init__(self) -> None:
        if self.every < 1 or self.checkpoint_every < 1 or self.sample_every < 0:
            raise ValueError("every and checkpoint_every must be at least 1, sample_every at least 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The comparison after the last stage, on captions of the embedded pictures.

    ``samples: 0`` leaves it out; null is 256 for a run on the embedded pictures and 0 for any other. ``batch_size`` is
    that of all pictures drawn while and after training.
    """

    samples: int | None = None
    guidance: float = 4.0
    batch_size: int = 16

    def __post_init__(self) -> None:
        if (self.samples or 0) < 0 or self.batch_size < 1:
            raise ValueError("samples must be at least 0 and batch_size at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run: ``stages`` are trained in order, each from the last one's student."""

    output_dir: str
    seed: int = 0
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    lora: LoraConfig = LoraConfig()
    stages: tuple[StageConfig, ...]
    mesh: MeshConfig = MeshConfig()
    log: LogConfig = LogConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("stages must name at least one stage")
        names = [stage.name for stage in self.stages]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"stages: the name {name!r} is used twice")
        if self.evaluation.samples and self.data.source != "emoji":
            raise ValueError(f"evaluation.samples: the comparison needs data.source=emoji, not {self.data.source}")

    @property
    def compared_samples(self) -> int:
        """How many captions students and teacher are compared on."""
        if self.evaluation.samples is not None:
            return self.evaluation.samples
        return 256 if self.data.source == "emoji" else 0


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML recipe and apply ``key.path=value`` overrides.

    List entries are addressed by index, ``stages.0.updates=10``, by name, ``stages.tscd-8.updates=10``, or all at
    once, ``stages.*.batch_size=4``. Raises `UserError` with one line that names the file or key.
    """
    tree = _read_yaml(Path(path))
    for override in overrides:
        _apply_override(tree, override)
    return build(Config, tree)


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain dictionaries and lists, ready for YAML or JSON."""
    return typing.cast(dict[str, Any], _plain(dataclasses.asdict(config)))


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML, atomically; `load_config` reads it back to an equal one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")
    temporary.replace(path)


def first_difference(a: Mapping[str, Any], b: Mapping[str, Any], path: str = "") -> str | None:
    """The dotted key of the first value in which two plain configurations differ, with both values."""
    for key in dict.fromkeys([*a, *b]):
        left, right, where = a.get(key), b.get(key), f"{path}{key}"
        if isinstance(left, dict) and isinstance(right, dict):
            found = first_difference(left, right, f"{where}.")
            if found:
                return found
        elif isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
            found = first_difference(_by_index(left), _by_index(right), f"{where}.")
            if found:
                return found
        elif left != right:
            return f"{where} ({left!r} against {right!r})"
    return None


def build(cls: type[T], value: Any, path: str = "") -> T:
    """Make the dataclass ``cls`` from plain data; errors carry the dotted ``path``."""
    where = path or "the configuration"
    if isinstance(value, str) and any(field.name == "source" for field in dataclasses.fields(cls)):  # type: ignore[arg-type]
        value = {"source": value}
    if not isinstance(value, Mapping):
        raise UserError(f"{where} must be a mapping of keys, not {value!r}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    prefix = f"{path}." if path else ""
    for key in value:
        if key not in fields:
            raise UserError(f"unknown key {prefix}{key}{nearest(str(key), fields)}")
    missing = [
        name
        for name, field in fields.items()
        if name not in value and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{prefix}{missing[0]} is missing")
    arguments = {key: _convert(hints[key], item, f"{prefix}{key}") for key, item in value.items()}
    try:
        return cls(**arguments)
    except ValueError as error:
        raise UserError(f"{prefix}{error}") from None


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint ``; did you mean 'x'?`` or the list of valid names."""
    names = list(valid)
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]}?" if close else f"; valid names are {', '.join(names)}"


def _by_index(items: list[Any]) -> dict[str, Any]:
    return {str(index): item for index, item in enumerate(items)}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _convert(kind: Any, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _convert(inner, value, path)
    if origin is Literal:
        if value in arguments:
            return value
        raise UserError(f"{path}={value!r} is not valid{nearest(str(value), map(str, arguments))}")
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{path} must be a list, not {value!r}")
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise UserError(f"{path} must have {len(arguments)} values, not {len(value)}")
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        return tuple(_convert(k, v, f"{path}.{i}") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if dataclasses.is_dataclass(kind):
        return build(kind, value, path)  # type: ignore[arg-type]
    return _convert_scalar(kind, value, path)


def _convert_scalar(kind: Any, value: Any, path: str) -> Any:
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:  # YAML 1.1 reads 1e-4 as a string
            number = float(value)
        except ValueError:
            number = float("nan")
        if number - number == 0.0:
            return number
        raise UserError(f"{path} must be a finite number, not {value!r}")
    if (kind is int and isinstance(value, int) and not isinstance(value, bool)) or (
        kind is not int and isinstance(value, kind)
    ):
        return value
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    raise UserError(f"{path} must be {names.get(kind, kind)}, not {value!r}")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        known = sorted(p.stem for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise UserError(f"{path}: no such file" + (nearest(path.stem, known) if known else "")) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"{path}{line}: not valid YAML") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: must hold a mapping of keys")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} must look like key.path=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"override {key}: {text!r} is not a valid value") from None
    _set(tree, key.split("."), value, key)


def _set(node: Any, parts: list[str], value: Any, key: str) -> None:
    head, rest = parts[0], parts[1:]
    if isinstance(node, list):
        for index in _list_indices(node, head, key):
            if rest:
                _set(node[index], rest, value, key)
            else:
                node[index] = value
    elif isinstance(node, dict):
        if not rest:
            node[head] = value
        else:
            child = node.get(head)
            if child is None:
                child = {}
            elif isinstance(child, str):  # the short form, `model: PATH`
                child = {"source": child}
            node[head] = child
            _set(child, rest, value, key)
    else:
        raise UserError(f"override {key}: {head} cannot be set inside {node!r}")


def _list_indices(items: list[Any], head: str, key: str) -> list[int]:
    if head == "*":
        return list(range(len(items)))
    if head.lstrip("-").isdigit() and -len(items) <= int(head) < len(items):
        return [int(head)]
    named = [i for i, item in enumerate(items) if isinstance(item, dict) and item.get("name") == head]
    if named:
        return named
    names = [str(item.get("name", i)) if isinstance(item, dict) else str(i) for i, item in enumerate(items)]
    raise UserError(f"override {key}: no entry {head!r}{nearest(head, names)}")
