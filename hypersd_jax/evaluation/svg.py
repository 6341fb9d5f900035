"""Plots as inline SVG that takes the colours of the page around it, light or dark.

Names never go through matplotlib, which would read ``$`` and ``_`` in them and lack letters: they stand in the page.
"""

from __future__ import annotations

import contextlib
import html
import io
import re
from collections.abc import Iterator

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Drawn as ink, and handed to the page's own text colour afterwards.
INK = "#010203"
COLOURS = ("#4c84c4", "#e8853a", "#4fa35a", "#d65a5f", "#9a72c8", "#3fa8a8", "#c08a3e", "#d873a8")
# As wide as a phone, on which text then keeps its size.
SIZE = (4.8, 2.8)


class Plot:
    """One plot; ``svg`` is there once the context of `plot` is left."""

    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        self.svg = ""


@contextlib.contextmanager
def plot(label: str, *, x: str, y: str = "") -> Iterator[Plot]:
    """Axes to draw on; ``label`` says what is shown to who cannot see it, and tells the plots of a page apart."""
    # Without a salt of its own, parts of two plots would have one name in the page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label, "font.size": 9}):
        figure = Figure(figsize=SIZE, layout="constrained")
        drawn = Plot(figure.add_subplot())
        yield drawn
        _dress(drawn.axes, x, y)
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    drawn.svg = _inline(written.getvalue(), label)


def as_file(svg: str) -> str:
    """Return an inline element as the text of a file of its own, which must name its name space; ink is black there."""
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + "\n"


def _dress(axes: Axes, x: str, y: str) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(INK)
        axes.spines[side].set_alpha(0.4)
    axes.tick_params(which="both", colors=INK)
    axes.grid(color=INK, alpha=0.1, linewidth=0.8)
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)


def _inline(svg: str, label: str) -> str:
    """The bare element: no prologue, no metadata, no name spaces, which HTML does not need."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    opening = f'<svg role="img" aria-label="{html.escape(label)}" stroke-linejoin="round" viewBox='
    svg = re.sub(r"<svg [^>]*?viewBox=", lambda _: opening, svg, count=1)
    return svg.replace(INK, "currentColor").strip()
