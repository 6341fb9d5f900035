"""LoRA layouts with dotted module names: PEFT's, and the two that diffusers wrote before it.

    unet.<module>.lora_A.weight / .lora_B.weight                  PEFT inside diffusers; text_encoder., text_encoder_2.
    base_model.model.<module>.lora_A.weight / .lora_B.weight      PEFT's own folder, with adapter_config.json
    unet.<module>.lora.down.weight / .lora.up.weight              diffusers, late 2023
    unet.<attention>.processor.to_q_lora.down.weight / .up.       diffusers, early 2023 (`to_out_lora` is `to_out.0`)
    unet.<module>.lora_magnitude_vector                           with PEFT's, of a DoRA

Alpha is no tensor here. diffusers keeps PEFT's LoraConfig in the header as JSON under `lora_adapter_metadata`, its
fields prefixed by component; a PEFT folder keeps it in adapter_config.json; where there is neither, the scale is 1.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hypersd_jax.errors import UserError, short, shown
from hypersd_jax.files import decoded
from hypersd_jax.weights.lora import kohya
from hypersd_jax.weights.lora.factors import common_rank, to_torch
from hypersd_jax.weights.lora.layout import COMPONENTS, Found, Key, Layout, Match, Shapes, Slot, Strength
from hypersd_jax.weights.lora.unsupported import unsupported

if TYPE_CHECKING:
    from hypersd_jax.weights.tensors import TensorFile

HEADER_KEY = "lora_adapter_metadata"
CONFIG_NAME = "adapter_config.json"

# (pattern, module, name of the layout); the group `role` says which factor it is.
_SPELLINGS = tuple(
    (re.compile(pattern + "$"), module, layout)
    for pattern, module, layout in (
        (r"(?P<module>.+)\.lora_(?P<role>A|B)(?:\.\w+)?\.weight", r"\g<module>", "PEFT"),
        (r"(?P<module>.+)\.lora(?:_linear_layer)?\.(?P<role>down|up)\.weight", r"\g<module>", "diffusers"),
        (
            r"(?P<module>.+)\.processor\.to_(?P<n>[qkv])_lora\.(?P<role>down|up)\.weight",
            r"\g<module>.to_\g<n>",
            "diffusers",
        ),
        (r"(?P<module>.+)\.processor\.to_out_lora\.(?P<role>down|up)\.weight", r"\g<module>.to_out.0", "diffusers"),
        (
            r"(?P<module>.+\.self_attn)\.to_(?P<n>q|k|v|out)_lora\.(?P<role>down|up)\.weight",
            r"\g<module>.\g<n>_proj",
            "diffusers",
        ),
        (r"(?P<module>.+)\.lora_(?P<role>magnitude)_vector(?:\.(?!weight)\w+)?(?:\.weight)?", r"\g<module>", "PEFT"),
        (r"(?P<module>.+)\.(?P<role>alpha)", r"\g<module>", "PEFT"),
    )
)
_ROLES = {"A": "down", "B": "up"}

_PLAIN = re.compile(r"[\w.]+")
_SLOW = re.compile(r"\)[*+{]|([*+{].*){4}", re.DOTALL)
"""Regular expressions whose time may grow with a power of a name's length: repeated groups, many repetitions."""

_FLOAT32_MAX = float(np.finfo(np.float32).max)


def parse(key: str) -> Key | None:
    """The component, module path and role of a key; None where it follows none of the layouts above."""
    for pattern, replacement, layout in _SPELLINGS:
        match = pattern.match(key)
        if match is not None:
            name = match.expand(replacement)
            role = _ROLES.get(match["role"], match["role"])
            component = next((component for component in COMPONENTS if name.startswith(component + ".")), None)
            module = name.removeprefix(f"{component}.").removeprefix("base_model.model.")
            return Key(component=component, module=module, role=role, layout=layout)
    return None


def spelled(key: str) -> Key | None:
    """Parse a key that gives its module's path as diffusers has it; None for any other."""
    return None if key.startswith(kohya.UNSPELLED) else parse(key)


def matcher(tensors: TensorFile, shapes: Shapes) -> Match:
    """Match keys with PEFT's or diffusers' factors with the modules of a base."""
    bare = _component_of_bare_keys(tensors, shapes)
    index = functools.cache(functools.partial(kohya.module_index, shapes))  # of names that are not diffusers' paths

    def match(text: str) -> Found | None:
        key = parse(text)
        if key is None or unsupported(text):
            return None
        component = key.component or bare
        module = locate(component, key.module, shapes.get(component, {}))
        if module is not None:
            return Found(key=key, target=(component, module))
        target = kohya.find(index(), f"{component}.{key.module}") or kohya.find(index(), key.module)
        return Found(key=key, target=None if target is None else (target.component, target.module))

    return match


def locate(component: str, module: str, parameters: Mapping[str, Any]) -> str | None:
    """Our path of `module`, with or without transformers' `text_model.` prefix; None where the model has none such."""
    names = [module]
    if component != "unet":
        names += [module.removeprefix("text_model."), "text_model." + module]
    return next((name for name in names if name + ".kernel" in parameters), None)


def read_configs(file: Path, metadata: Mapping[str, str]) -> dict[str | None, dict[str, Any]]:
    """PEFT's LoraConfig fields by component (None: of the keys that name no component), from header or folder.

    Raises:
        UserError: the JSON cannot be read, is broken, or describes another kind of adapter than a plain LoRA.
    """
    if HEADER_KEY in metadata:
        where = f"{file}: header metadata {HEADER_KEY}"
        fields = _json_object(metadata[HEADER_KEY], where)
        configs: dict[str | None, dict[str, Any]] = {}
        for field, value in fields.items():
            component = next((name for name in COMPONENTS if field.startswith(name + ".")), None)
            name = field.removeprefix(f"{component}.") if component else field
            configs.setdefault(component, {})[name] = value
    else:
        config_file = file.with_name(CONFIG_NAME)
        where = str(config_file)
        try:
            if not config_file.is_file():
                return {}
            text = decoded(config_file.read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"{where}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
        config = _json_object(text, where)
        configs = dict.fromkeys((None, *COMPONENTS), config)
    for config in configs.values():
        _refuse_other_kinds(config, where)
        for name in ("rank_pattern", "alpha_pattern"):
            patterns = config.get(name) or {}
            if not isinstance(patterns, dict):
                raise UserError(f"{where}: {name} is {shown(patterns)}, not an object")
            if slow := next(filter(_SLOW.search, patterns), None):
                raise UserError(f"{where}: {name} holds {shown(slow)}, which could take for ever to match")
    return configs


def strengths(file: Path, metadata: Mapping[str, str]) -> Strength:
    """Read how strongly a file's modules apply, from its header or the configuration in its folder."""
    configs = read_configs(file, metadata)

    def strength(slot: Slot, rank: int, where: str) -> tuple[float, float | None]:
        config = configs.get(slot.first.component, {})
        if config.get("use_dora") and not slot.kind.dora:
            raise UserError(f"{where}: the LoRA's own configuration says DoRA, but it has no lora_magnitude_vector")
        return scale_of(config, slot.first.module, rank, where)

    return strength


def scale_of(config: Mapping[str, Any], module: str, rank: int, where: str) -> tuple[float, float | None]:
    """(scale, alpha) of one module under PEFT's rules; alpha is None where the config is silent, and the scale 1.

    Args:
        config: LoraConfig fields; empty means that the file has none.
        module: the module's name in the file, which `rank_pattern` and `alpha_pattern` are matched against.
        rank: of the stored factors.
        where: file and key, for the error.

    Raises:
        UserError: the config speaks of another rank, so it is not this file's.
    """
    if not config:
        return 1.0, None
    stated = _patterned(config.get("rank_pattern"), module, config.get("r", rank))
    alpha = _patterned(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))  # 8 is LoraConfig's default
    if not isinstance(alpha, int | float) or not abs(alpha) <= _FLOAT32_MAX:
        raise UserError(f"{where}: lora_alpha is {shown(alpha)}, not a finite number")
    if stated != rank:
        raise UserError(f"{where}: the stored rank is {rank}, but the LoRA's own configuration says {shown(stated)}")
    return (alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank), float(alpha)


def encode(component: str, adapter: Mapping[str, Mapping[str, Any]], *, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The names and tensors of one component, two for each adapted module, scales folded into `lora_B`."""
    for module, entry in adapter.items():
        name = f"{component}.{_prefixed(component, module)}"
        down, up = to_torch(module, entry, dtype)
        yield f"{name}.lora_A.weight", down
        yield f"{name}.lora_B.weight", up


def describe(adapters: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, str]:
    """The header metadata that diffusers turns into a LoraConfig on loading: alpha = rank for each module."""
    fields: dict[str, Any] = {}
    for component, adapter in adapters.items():
        ranks = {module.removeprefix("text_model."): entry["scale"].shape[0] for module, entry in adapter.items()}
        common = common_rank(adapter)
        others = {module: rank for module, rank in ranks.items() if rank != common}
        config = {
            "peft_type": "LORA",
            "r": common,
            "lora_alpha": common,
            # Without `text_model.`: PEFT compares path endings, and transformers has the prefix in some releases only.
            "target_modules": sorted(ranks),
            "rank_pattern": others,
            "alpha_pattern": others,
        }
        fields |= {f"{component}.{name}": value for name, value in config.items()}
    return {HEADER_KEY: json.dumps(fields, sort_keys=True)}


def _component_of_bare_keys(tensors: TensorFile, shapes: Shapes) -> str:
    """The component of the keys that name none: the first that has all their modules with the right widths."""
    keys = tensors.keys()
    parsed = [(text, key) for text in keys if (key := parse(text)) and not key.component]

    def has_all(component: str) -> bool:
        for text, key in parsed:
            module = locate(component, key.module, shapes[component])
            if module is None:
                return False
            if key.role == "down" and tensors.shape(text)[1:2] != shapes[component][module + ".kernel"].shape[-2:-1]:
                return False
        return True

    return next((component for component in COMPONENTS if component in shapes and has_all(component)), "unet")


def _prefixed(component: str, module: str) -> str:
    if component == "unet" or module.startswith(("text_model.", "text_projection")):
        return module
    return "text_model." + module


def _json_object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: is not a JSON object")
    return value


def _refuse_other_kinds(config: Mapping[str, Any], where: str) -> None:
    kind = str(config.get("peft_type") or "LORA").removeprefix("PeftType.")
    if kind != "LORA":
        raise UserError(f"{where}: peft_type {short(kind)} is not read here, only LORA")


def _patterned(patterns: Any, module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that the module's name ends with, at a dot, wins."""
    for pattern, value in (patterns or {}).items():
        if _PLAIN.fullmatch(pattern):  # nearly all, and there may be one for each module
            matches = module == pattern or module.endswith(f".{pattern}")
        else:
            try:
                matches = re.match(rf"(.*\.)?({pattern})$", module) is not None
            except (re.error, RecursionError, OverflowError):
                matches = pattern == module
        if matches:
            return value
    return default


PEFT = Layout(
    name="peft",
    matcher=matcher,
    spelled=spelled,
    strengths=strengths,
    flat_magnitude=True,  # PEFT's of convolutions are (1, out, 1, 1)
    encode=lambda component, adapter, to: encode(component, adapter, dtype=to.dtype),
    describe=describe,
    about_factors=(HEADER_KEY,),
)
