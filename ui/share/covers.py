"""The pictures that may stand for an export, its thumbnail: the previews of the checkpoint, and cells of its wall."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image

from ...trainer.jobs import RunFolder, preview_files
from ..urls import picture_url

_CELL = re.compile(r"[0-9a-f]{16}\.png")
_MOST_CELLS = 24
_LONGEST = 60
"""Letters of a prompt that are shown."""


@dataclass(frozen=True)
class Cover:
    """A picture and what it is called."""

    file: Path
    label: str


def covers_of(run: RunFolder, step: int) -> list[Cover]:
    """Those of a checkpoint: its previews in their order, then cells of the wall, the newest first.

    Cells that show the untouched base or another checkpoint are left out: a thumbnail says what the file does.
    """
    covers = [
        Cover(file, _label(f"Preview {number}", _said(file, "positive_prompt")))
        for number, file in enumerate(preview_files(run.samples(step)), 1)
    ]
    return covers + list(_cells_of(run, step))


def _cells_of(run: RunFolder, step: int) -> Iterator[Cover]:
    cells = [file for file in (run.path / "compare").glob("*.png") if _CELL.fullmatch(file.name)]
    newest = sorted(cells, key=lambda file: file.stat().st_mtime, reverse=True)
    own = [file for file in newest if re.search(rf"\bstep {step}\b", _said(file, "lora"))]
    for file in own[:_MOST_CELLS]:
        strength = re.search(r" at (-?[\d.]+)", _said(file, "lora"))
        at = f" at {strength[1]}" if strength else ""
        yield Cover(file, _label(f"Wall{at}", _said(file, "positive_prompt")))


def _label(what: str, prompt: str) -> str:
    short = " ".join(prompt.split())
    short = short if len(short) <= _LONGEST else f"{short[:_LONGEST].rstrip()}..."
    return f"{what}: {short}" if short else what


def _said(file: Path, what: str) -> str:
    """What a picture's text says; empty if it says nothing, or is not there any more."""
    try:
        found = file.stat()
        return _text_of(file, found.st_size, found.st_mtime_ns).get(what, "")
    except OSError:
        return ""


@lru_cache(maxsize=1024)
def _text_of(file: Path, size: int, changed: int) -> dict[str, str]:
    del size, changed
    with Image.open(file, formats=["PNG"]) as picture:
        return {str(name): value for name, value in picture.info.items() if isinstance(value, str)}


def pictures_css(run: RunFolder, covers: list[Cover], choices: str) -> str:
    """What puts its picture above each of the radio buttons of `choices`, an element's id. A button is still one: it
    is reached by keyboard, and has its words."""
    rules = [
        f'#{choices} .wrap label:nth-of-type({number})::before {{ background-image: url("{url}"); }}'
        for number, url in enumerate((picture_url(run, cover.file) for cover in covers), 1)
    ]
    return f"<style>{_LAYOUT.replace('CHOICES', choices)}{''.join(rules)}</style>" if rules else ""


_LAYOUT = """
#CHOICES .wrap { display: grid; grid-template-columns: repeat(auto-fill, minmax(128px, 1fr)); }
#CHOICES .wrap label { display: grid; grid-template-columns: auto 1fr; align-content: start; align-items: start;
  overflow-wrap: anywhere; }
#CHOICES .wrap label::before { content: ""; grid-column: 1 / -1; height: 112px; margin-bottom: 6px;
  background: center / contain no-repeat; }
"""
