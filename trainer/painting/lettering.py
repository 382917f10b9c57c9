"""Text on pictures: a font that has the letters, and lines that fit."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, cast

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf"),  # Linux
    *("segoeui.ttf", "arial.ttf", "Arial Unicode.ttf", "Helvetica.ttc"),  # Windows, macOS
    *("NotoSansCJK-Regular.ttc", "msyh.ttc", "msgothic.ttc", "malgun.ttf", "Hiragino Sans GB.ttc"),  # East Asia
)
"""Of a computer's own fonts, those that have most letters; Pillow's has none with accents."""


def font_for(text: str, size: int) -> Font:
    """The first font of this computer that has all letters of a text, else that which has most of them."""
    letters = frozenset(text) - {" ", "\n"}
    return max(_fonts(size), key=lambda font: len(letters - _lacking(font, letters)))


def drawable(text: str, font: Font) -> str:
    """The text with the code of each letter in the place of those that the font lacks, as in \\u4e2d."""
    lacking = _lacking(font, frozenset(text) - {" ", "\n"})
    return "".join(letter.encode("unicode_escape").decode("ascii") if letter in lacking else letter for letter in text)


def wrapped(text: str, font: Font, width: float) -> list[str]:
    """Lines of at most `width` pixels, broken between words, and within a word that is longer than a line."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        *whole, rest = _pieces(word, font, width)
        lines += [*whole, rest]
    return [line for line in lines if line] or [""]


def _pieces(word: str, font: Font, width: float) -> Iterator[str]:
    """A word in parts that each fit a line; a letter that is wider than that stands alone."""
    start = 0
    for end in range(1, len(word) + 1):
        if end - start > 1 and font.getlength(word[start:end]) > width:
            yield word[start : end - 1]
            start = end - 1
    yield word[start:]


@cache
def _fonts(size: int) -> list[Font]:
    found: list[Font] = []
    for name in _FONTS:
        try:
            found.append(ImageFont.truetype(name, size))
        except OSError:
            continue
    return [*found, ImageFont.load_default(size)]


_MISSING = "\U0010fffe"
"""No font has it, so it looks as all letters that a font lacks."""


def _lacking(font: Font, letters: frozenset[str]) -> set[str]:
    return {letter for letter in letters if not _has(font, letter)}


@cache
def _has(font: Font, letter: str) -> bool:
    shape, missing = (bytes(cast(Any, font.getmask(text))) for text in (letter, _MISSING))
    return shape != missing
