"""The LoRA layouts by name, one record each: all there is to change, besides its own file, when a layout is added."""

from __future__ import annotations

from hypersd_jax.errors import UserError
from hypersd_jax.weights.lora.kohya import KOHYA, KOHYA_SGM
from hypersd_jax.weights.lora.layout import Layout
from hypersd_jax.weights.lora.peft import PEFT

LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (KOHYA, KOHYA_SGM, PEFT)}
"""In the order in which keys are tried on them."""


def register_layout(layout: Layout) -> None:
    """Add a layout, under its own name, to those that are read and written.

    Raises:
        ValueError: another layout has that name.
    """
    if layout.name in LAYOUTS:
        raise ValueError(f"there is a LoRA layout named {layout.name!r} already")
    LAYOUTS[layout.name] = layout


def written_layouts() -> tuple[str, ...]:
    """The names of the layouts that can be written."""
    return tuple(name for name, layout in LAYOUTS.items() if layout.encode is not None)


def check_layout(name: str) -> None:
    """UserError unless `name` is a layout that can be written."""
    if name not in written_layouts():
        raise UserError(f"LoRA layout {name!r}: choose one of {', '.join(written_layouts())}")
