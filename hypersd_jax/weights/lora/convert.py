"""Convert one LoRA layout into another."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hypersd_jax.errors import UserError
from hypersd_jax.weights.components import EMBEDDED, open_model
from hypersd_jax.weights.diffusers.component import read_json
from hypersd_jax.weights.families import FAMILIES, Shapes, adaptable_shapes
from hypersd_jax.weights.hub import fetch_configs, fetch_lora
from hypersd_jax.weights.lora.file import LoraFile, LoraReport, read_lora, weights_file, write_lora
from hypersd_jax.weights.lora.layout import COMPONENTS, Key
from hypersd_jax.weights.lora.registry import LAYOUTS, check_layout
from hypersd_jax.weights.tensors import open_tensors

Source = str | os.PathLike[str]


def convert_lora(
    src: Source,
    dst: Source,
    to: str,
    base: Source | None = None,
    *,
    family: str | None = None,
) -> LoraReport:
    """Rewrites a LoRA file in another layout; the change it makes to the weights stays the same.

    Half-precision factors stay so, others become float32; alpha / rank is folded into them (see `write_lora`).

    Args:
        src: a file or folder that `read_lora` understands, or its hub id.
        dst: the file to write.
        to: a layout that is written (`registry.written_layouts`).
        base: a model as `open_model` reads it, whose shapes the LoRA is read against.
        family: "sd15", "sd21" or "sdxl" instead of a model. With neither, the family that the file fits is found.

    Returns:
        what was read from `src`.

    Raises:
        UserError: the layout or family is unknown, the LoRA does not fit the base or any known family, or it holds more
            than pairs of factors (LoHa, LoKr, DoRA, full differences), which these layouts do not.
    """
    check_layout(to)
    (lora,), shapes = read_alike([src], base, family)
    if lora.differences:
        kinds = ", ".join(kind for kind in lora.report.kinds if kind != "LoRA") or "differences of biases"
        raise UserError(f"{src}: holds {kinds}, not only pairs of factors; merge it with a --rank instead")
    dtype = common_dtype([lora])
    write_lora(
        dst,
        lora.adapters,
        layout=to,
        carried=lora.metadata,
        dtype=dtype,
        text_encoders=text_encoders_of(shapes),
        shapes=shapes,
    )
    return lora.report


def text_encoders_of(shapes: Mapping[str, Any]) -> int:
    """The number of text encoders of the base of these components."""
    return sum(component.startswith("text_encoder") for component in shapes)


def common_dtype(files: Sequence[LoraFile]) -> np.dtype:
    """The half-precision type that all factors of all files have, else float32."""
    dtypes = {dtype for file in files for dtype in file.report.dtypes}
    return np.dtype(dtypes.pop() if dtypes in ({"float16"}, {"bfloat16"}) else np.float32)


def read_alike(sources: Sequence[Source], base: Source | None, family: str | None) -> tuple[list[LoraFile], Shapes]:
    """The LoRAs, and the shapes of the one base that all of them were read against.

    Args:
        sources: files or folders that `read_lora` understands.
        base: see `convert_lora`.
        family: see `convert_lora`.

    Raises:
        UserError: the base or family is unknown or a file does not fit it; or they fit no known family, nor say
            themselves what shapes they adapt.
    """
    if base is not None:
        return _read_all(sources, base_shapes(base))
    if family is not None:
        return _read_all(sources, family_shapes(family))
    refusals: list[str] = []
    for name in FAMILIES:
        try:
            return _read_all(sources, family_shapes(name))
        except UserError as error:
            refusals.append(str(error))
    if len(set(refusals)) == 1:  # nothing to do with the family: a damaged file, or a kind that is not read
        raise UserError(refusals.pop())
    own = _own_shapes(sources)
    if own is None:
        names = " and ".join(str(source) for source in sources)
        together = "" if len(sources) == 1 else " all of them"
        remedy = "name its base model: --base MODEL (in Python base=MODEL)"
        raise UserError(f"{names}: fits none of {', '.join(FAMILIES)}{together}; {remedy}")
    return _read_all(sources, own)


def base_shapes(base: Source) -> Shapes:
    """The shapes of a model's components, from its configuration alone; a folder may hold some components only."""
    folder = Path(base) if os.fspath(base) == EMBEDDED else fetch_configs(base)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        present = [name for name in COMPONENTS if name == "unet" or (folder / name).is_dir()]
        return adaptable_shapes({name: read_json(folder / name / "config.json") for name in present})
    configs = open_model(os.fspath(base) if os.fspath(base) == EMBEDDED else folder).description.configs
    return adaptable_shapes({name: configs[name] for name in COMPONENTS if name in configs})


def _read_all(sources: Sequence[Source], shapes: Shapes) -> tuple[list[LoraFile], Shapes]:
    return [read_lora(fetch_lora(source), shapes) for source in sources], shapes


@functools.cache
def family_shapes(family: str) -> Shapes:
    """The shapes of a known family's components; UserError for a family that is not known."""
    if family not in FAMILIES:
        raise UserError(f"model family {family!r}: choose one of {', '.join(FAMILIES)}")
    return adaptable_shapes(FAMILIES[family])


def _own_shapes(sources: Sequence[Source]) -> Shapes | None:
    """The kernels that the LoRAs' own factors imply; None where their keys do not spell module paths out."""
    shapes: Shapes = {}
    for source in sources:
        factors: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {}
        with open_tensors(weights_file(fetch_lora(source))) as tensors:
            for key in tensors.keys():  # noqa: SIM118
                parsed = _spelled(key)
                if parsed is None:
                    return None
                factors.setdefault((parsed.component or "unet", parsed.module), {})[parsed.role] = tensors.shape(key)
        for (component, module), shape in factors.items():
            if not {"down", "up"} <= shape.keys() or len(shape["down"]) < 2:
                return None
            kernel = (*shape["down"][2:], shape["down"][1], shape["up"][0])
            shapes.setdefault(component, {})[module + ".kernel"] = jax.ShapeDtypeStruct(kernel, np.float32)
    return shapes


def _spelled(key: str) -> Key | None:
    """The parsed form of a key, in the first layout that reads it without a base."""
    readings = (layout.spelled(key) for layout in LAYOUTS.values() if layout.spelled is not None)
    return next((reading for reading in readings if reading is not None), None)
