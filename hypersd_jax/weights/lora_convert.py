"""One LoRA layout into another."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import jax
import numpy as np

from hypersd_jax.errors import UserError
from hypersd_jax.weights import lora_peft
from hypersd_jax.weights.components import EMBEDDED, assets
from hypersd_jax.weights.families import FAMILIES, Shapes, adaptable_shapes
from hypersd_jax.weights.folder import read_json
from hypersd_jax.weights.lora import LAYOUTS, LoraFile, LoraReport, read_lora, weights_file, write_lora
from hypersd_jax.weights.lora_match import COMPONENTS
from hypersd_jax.weights.tensors import open_tensors


def convert_lora(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    to: str,
    base: str | os.PathLike[str] | None = None,
    *,
    family: str | None = None,
) -> LoraReport:
    """Rewrites a LoRA file in another layout; the change it makes to the weights stays the same.

    Half-precision factors stay so, others become float32; alpha / rank is folded into them (see `write_lora`).

    Args:
        src: a file or folder that `read_lora` understands.
        dst: the file to write.
        to: "kohya" or "peft".
        base: a diffusers model folder, or ``embedded``, whose shapes the LoRA is read against.
        family: "sd15", "sd21" or "sdxl" instead of a folder. With neither, the family that the file fits is found.

    Returns:
        what was read from `src`.

    Raises:
        UserError: the layout or family is unknown, or the LoRA does not fit the base or any known family.
    """
    if to not in LAYOUTS:
        raise UserError(f"LoRA layout {to!r}: choose one of {', '.join(LAYOUTS)}")
    lora, shapes = _read(src, base, family)
    text_encoders = sum(component.startswith("text_encoder") for component in shapes)
    narrow = lora.report.dtypes in (("float16",), ("bfloat16",))
    dtype = np.dtype(lora.report.dtypes[0] if narrow else np.float32)
    write_lora(dst, lora.adapters, layout=to, metadata=lora.metadata, dtype=dtype, text_encoders=text_encoders)
    return lora.report


def _read(
    src: str | os.PathLike[str], base: str | os.PathLike[str] | None, family: str | None
) -> tuple[LoraFile, Shapes]:
    """The LoRA, and the shapes that it was read against."""
    if base is not None:
        shapes = _folder_shapes(assets() / "teacher" if base == EMBEDDED else Path(base))
        return read_lora(src, shapes), shapes
    if family is not None:
        shapes = _family_shapes(family)
        return read_lora(src, shapes), shapes
    refusals = set()
    for name in FAMILIES:
        shapes = _family_shapes(name)
        try:
            return read_lora(src, shapes), shapes
        except UserError as error:
            refusals.add(str(error))
    if len(refusals) == 1:  # nothing to do with the family: a damaged file, or a kind that is not read
        raise UserError(refusals.pop())
    own = _own_shapes(src)
    if own is None:
        raise UserError(f"{src}: fits none of {', '.join(FAMILIES)}; name the folder of its base model")
    return read_lora(src, own), own


@functools.cache
def _family_shapes(family: str) -> Shapes:
    if family not in FAMILIES:
        raise UserError(f"model family {family!r}: choose one of {', '.join(FAMILIES)}")
    return adaptable_shapes(FAMILIES[family])


def _folder_shapes(folder: Path) -> Shapes:
    """The shapes of the components that a model folder has, from their config.json alone."""
    present = [name for name in COMPONENTS if name == "unet" or (folder / name).is_dir()]
    return adaptable_shapes({name: read_json(folder / name / "config.json") for name in present})


def _own_shapes(src: str | os.PathLike[str]) -> Shapes | None:
    """The kernels that the LoRA's own factors imply; None where its keys do not spell module paths out."""
    shapes: Shapes = {}
    with open_tensors(weights_file(Path(src))) as tensors:
        factors: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {}
        for key in tensors.keys():  # noqa: SIM118
            parsed = lora_peft.parse(key)
            if parsed is None or key.startswith("lora_"):
                return None
            factors.setdefault((parsed.component or "unet", parsed.module), {})[parsed.role] = tensors.shape(key)
    for (component, module), shape in factors.items():
        if not {"down", "up"} <= shape.keys() or len(shape["down"]) < 2:
            return None
        kernel = (*shape["down"][2:], shape["down"][1], shape["up"][0])
        shapes.setdefault(component, {})[module + ".kernel"] = jax.ShapeDtypeStruct(kernel, np.float32)
    return shapes
