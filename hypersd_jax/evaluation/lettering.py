"""Prompts as text inside images: a font that has their letters, lines that fit, and boxes for what no font has."""

from __future__ import annotations

import functools
import unicodedata
import warnings

from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from PIL import ImageFont

BOX = "\N{WHITE SQUARE WITH ROUNDED CORNERS}"
"""Stands for a character that no font of this machine has."""

MORE = "\N{HORIZONTAL ELLIPSIS}"


def font_for(text: str, size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib ships, or the installed font that has most of the letters that it lacks.

    DejaVu has Latin, Greek, Cyrillic, Arabic and Hebrew letters; Chinese, Japanese and Korean ones need a font of the
    machine's, and colour emoji are not drawn.
    """
    return ImageFont.truetype(_font_file(_characters(text)), size)


def drawable(text: str) -> str:
    """One line of the text as `font_for`'s font can draw it, with a box for each character that it has not."""
    kept = _characters(text)
    known = _glyphs(_font_file(kept)) if kept else frozenset()
    letters = "".join(_plain(letter) for letter in " ".join(text.split()))
    return "".join(letter if letter == " " or ord(letter) in known else BOX for letter in letters)


def fitted_lines(text: str, font: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    """Break a text into at most ``most`` lines of ``width`` pixels: at spaces, or inside a word that is wider.

    What is left over is cut off with an ellipsis.
    """
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        *full, rest = _pieces(word, font, width)
        lines[-1:] = [*full, rest]
        if len(lines) > most:
            break
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and font.getlength(last + MORE) > width:
        last = last[:-1]
    return [*lines[: most - 1], last.rstrip() + MORE]


def line_height(font: ImageFont.FreeTypeFont) -> int:
    """Pixels from one line to the next."""
    ascent, descent = font.getmetrics()
    return round(1.1 * (ascent + descent))


def _pieces(word: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """A word as parts that fit, each of one character at least."""
    parts = [""]
    for letter in word:
        if parts[-1] and font.getlength(parts[-1] + letter) > width:
            parts.append("")
        parts[-1] += letter
    return parts


def _plain(letter: str) -> str:
    """Nothing for what has no shape of its own: marks of direction, joiners, variation selectors, control codes."""
    return "" if unicodedata.category(letter) in ("Cc", "Cf") or "\ufe00" <= letter <= "\ufe0f" else letter


def _characters(text: str) -> frozenset[int]:
    return frozenset(ord(letter) for letter in text if _plain(letter) and not letter.isspace())


@functools.lru_cache(maxsize=256)
def _font_file(characters: frozenset[int]) -> str:
    """The font that lacks the fewest characters; of equal ones the first, DejaVu before the machine's."""
    own = str(font_manager.findfont("DejaVu Sans"))
    best, lacking = own, len(characters - _glyphs(own))
    for file in _installed() if lacking else ():
        missing = len(characters - _glyphs(file))
        if missing < lacking:
            best, lacking = file, missing
        if not lacking:
            break
    return best


@functools.cache
def _installed() -> tuple[str, ...]:
    """The fonts of the machine, regular ones first."""
    files = sorted(font_manager.findSystemFonts(), key=lambda file: ("regular" not in file.lower(), file))
    return tuple(file for file in files if "lastresort" not in file.lower() and _is_outline(file))


def _is_outline(file: str) -> bool:
    try:
        ImageFont.truetype(file, 14).getlength("x")
    except (OSError, ValueError):  # damaged, or of colour bitmaps of another size
        return False
    return True


@functools.cache
def _glyphs(file: str) -> frozenset[int]:
    """The code points that a font has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return frozenset(FT2Font(file).get_charmap())
        except (OSError, RuntimeError):
            return frozenset()
