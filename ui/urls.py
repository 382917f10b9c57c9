"""Addresses of the files that the page shows; `server.py` serves these, and no others."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

from ..trainer.jobs import RunFolder

PICTURES, THUMBNAILS, EXPORTS, DRAWN = "/pictures", "/thumbnails", "/exports", "/drawn"
REPORTS = "/reports"
CAPTIONS = "/captions"
"""Where a card sends its caption (`assets/cards.js`)."""


def picture_url(run: RunFolder, file: Path) -> str:
    """A picture below a run's `samples/`, `compare/` or `exports/`; another one when the file is written anew."""
    return f"{PICTURES}/{_below(run, file)}?{_version(file)}"


def export_url(run: RunFolder, file: Path) -> str:
    """A file below a run's `exports/`, to download."""
    return f"{EXPORTS}/{_below(run, file)}"


def report_url(run: RunFolder, file: Path) -> str:
    """The report of a run, to download; another address when it is written anew."""
    return f"{REPORTS}/{quote(run.name)}?{_version(file)}"


def thumbnail_url(thumbnail: Path) -> str:
    """A small picture of a training image, whose name tells what it was made of."""
    return f"{THUMBNAILS}/{quote(thumbnail.name)}"


def drawn_url(file: Path) -> str:
    """A picture of the playground."""
    return f"{DRAWN}/{quote(file.name)}?{_version(file)}"


def _below(run: RunFolder, file: Path) -> str:
    return quote(f"{run.name}/{file.relative_to(run.path).as_posix()}")


def _version(file: Path) -> str:
    """Browsers keep what they have seen; this changes with the file."""
    try:
        return f"v={file.stat().st_mtime_ns:x}"
    except OSError:  # it may come yet
        return "v=0"
