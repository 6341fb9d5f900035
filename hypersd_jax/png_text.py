"""The settings of an image, written into its file as AUTOMATIC1111's web UI does, which others read as well.

    PROMPT <lora:NAME:SCALE>
    Negative prompt: ...
    Steps: 4, Sampler: DDIM, Schedule type: SGM Uniform, CFG scale: 1, Seed: 7, Size: 512x512, Model: NAME, ...

A PNG holds it as the text ``parameters``, the other formats as EXIF's UserComment. Readers split the last line by a
regular expression (``parse_generation_parameters`` in its ``modules/infotext_utils.py``); values with a comma, colon or
line break in them are JSON strings. Keys that it does not know are kept and ignored there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from hypersd_jax.diffusion import SOLVERS
from hypersd_jax.diffusion.sigma_grids import RESPACINGS
from hypersd_jax.errors import UserError
from hypersd_jax.paths import IMAGE_SUFFIXES as SUFFIXES
from hypersd_jax.paths import expanded
from hypersd_jax.pipeline import CallSettings, Settings
from hypersd_jax.pipeline.steering import written
from hypersd_jax.weights.tensors import replacing

# The web UI's nearest by timesteps: its DDIM schedule is the leading one, its Uniform k-diffusion's, which is linspace.
SCHEDULES = {"trailing": "SGM Uniform", "leading": "DDIM", "linspace": "Uniform"}
_RESPACED = dict(zip(RESPACINGS, ("Karras", "Exponential", "Beta"), strict=True))
_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class UsedLora:
    """A LoRA that an image was sampled with: its name without folder and suffix, its scale, its `lora_hash`."""

    name: str
    scale: float
    hash: str


def parameters_text(
    prompt: str,
    settings: CallSettings,
    *,
    model: str,
    negative: str | None = None,
    loras: Sequence[UsedLora] = (),
    more: Mapping[str, Any] | None = None,
) -> str:
    """Compose the text of one image.

    Args:
        prompt: its prompt; the LoRAs are added to it, as the web UI's users write them.
        settings: the call's, as `Pipeline.generate` returns them. The seed is written modulo 2^32, as it is used (a
            negative one means a random one there).
        model: its name, see `name_of`.
        negative: the negative prompt, which is written where guidance, or that of attention, makes use of it.
        loras: in the order they were loaded.
        more: other keys with their values, after the known ones; None and "" are left out.
    """
    solver = SOLVERS[settings.sampler]
    values: dict[str, Any] = {
        "Steps": settings.steps,
        "Sampler": solver.webui_name,
        "Schedule type": schedule_type(settings),
        "CFG scale": f"{settings.guidance if settings.guidance > 1 else 1:g}",
        "Seed": settings.seed % 2**32,
        "Size": f"{settings.width}x{settings.height}",
        "Model": model,
    }
    if solver.has_eta:
        values[solver.webui_eta] = f"{settings.eta:g}"
    if settings.timesteps is not None:
        values["Timesteps"] = ", ".join(map(str, settings.timesteps))
    if settings.steers_attention:
        values |= {f"NAG {name}": f"{getattr(settings, f'nag_{name}'):g}" for name in ("scale", "tau", "alpha")}
    values |= {"Guidance steps": written(settings.guidance_steps), "Base steps": written(settings.base_steps)}
    values |= more or {}
    values["Lora hashes"] = ", ".join(f"{lora.name}: {lora.hash}" for lora in loras)
    values["Version"] = f"hypersd_jax {metadata.version('hypersd_jax')}"

    lines = [" ".join([prompt, *(f"<lora:{lora.name}:{lora.scale:g}>" for lora in loras)])]
    if negative and (settings.guided or settings.steers_attention):
        lines.append(f"Negative prompt: {negative}")
    lines.append(", ".join(f"{key}: {_quoted(value)}" for key, value in values.items() if value not in (None, "")))
    return "\n".join(lines).strip()


def schedule_type(settings: Settings) -> str | None:
    """The web UI's name of a spacing; None for explicit timesteps and for the distillation grid, which have none."""
    if settings.timesteps is not None:
        return None
    if settings.respacing is not None:
        return _RESPACED[settings.respacing]
    return None if settings.spacing is None else SCHEDULES[settings.spacing]


def name_of(source: str | os.PathLike[str]) -> str:
    """A model's or LoRA's name: of a file without its suffix, of a folder or a hub id the last part.

    Characters that ``<lora:NAME:SCALE>`` and lists of names cannot hold become underscores, bytes that are not UTF-8
    question marks.
    """
    name = Path(source).absolute().name.removesuffix(".safetensors")
    return re.sub(r"[<>:,=\s]", "_", name).encode(errors="replace").decode()


def lora_hash(file: str | os.PathLike[str]) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of a safetensors file's tensors, as kohya and the web UI have it.

    The header is left out, so that editing its notes changes nothing.
    """
    digest = hashlib.sha256()
    with Path(file).open("rb") as opened:
        opened.seek(8 + int.from_bytes(opened.read(8), "little"))
        while block := opened.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()[:12]


def image_paths(path: str | os.PathLike[str], count: int) -> list[Path]:
    """The files of that many images: one is ``path`` itself, several are ``path-000``, ..."""
    path = Path(path)
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{index:03d}{path.suffix}") for index in range(count)]


def save_images(
    images: Sequence[Image.Image], path: str | os.PathLike[str], texts: Sequence[str] | None = None
) -> list[Path]:
    """Save one image as ``path``, several as `image_paths` says, each with its text (`parameters_text`) inside.

    Args:
        images: RGB images.
        path: ends in .png, .jpg, .jpeg or .webp; its folder is made.
        texts: one for each image; None writes none.

    Returns:
        the files, each of which appears whole or not at all.

    Raises:
        UserError: another suffix, not one text for each image, or a file that cannot be written.
    """
    path = expanded(Path(path))
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: must end in .png, .jpg or .webp")
    if texts is not None and len(texts) != len(images):
        raise UserError(f"{path}: {len(texts)} texts for {len(images)} images")
    paths = image_paths(path, len(images))
    kind = Image.registered_extensions()[path.suffix.lower()]
    for index, (image, file) in enumerate(zip(images, paths, strict=True)):
        options = {} if texts is None else _embedded(texts[index], png=kind == "PNG")
        with replacing(file) as temporary:
            try:
                image.save(temporary, format=kind, **options)
            except ValueError as error:  # a text or a side too long for the format
                raise UserError(f"{file}: cannot be written ({error})") from None
    return paths


def png_bytes(image: Image.Image, text: str) -> bytes:
    """An image as the bytes of a PNG with its text (`parameters_text`) inside, written for speed rather than size."""
    file = io.BytesIO()
    image.save(file, format="PNG", compress_level=1, **_embedded(text, png=True))
    return file.getvalue()


def _embedded(text: str, *, png: bool) -> dict[str, Any]:
    """Arguments of Pillow's `save` that put the text inside."""
    text = text.encode(errors="replace").decode()  # an argument that is not UTF-8 comes with lone surrogates
    if png:
        info = PngInfo()
        info.add_text("parameters", text)
        return {"pnginfo": info}
    exif = Image.Exif()
    comment = b"UNICODE\0" + text.encode("utf-16-be")
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    return {"exif": exif}


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search('[,:\n"]', text) else text
