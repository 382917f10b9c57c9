"""What a person has answered once on the Share page, for the next run: beside the runs, never a secret."""

from __future__ import annotations

import json
from pathlib import Path

from ...trainer.files import write_text
from ...trainer.jsonfile import read_json


def remembered(runs: Path, what: str) -> str:
    """The last answer; empty if there is none."""
    return str(_read(runs).get(what, ""))


def remember(runs: Path, what: str, answer: str) -> None:
    known = _read(runs)
    if known.get(what, "") != answer:
        write_text(_file(runs), json.dumps({**known, what: answer}, indent=2, ensure_ascii=False) + "\n")


def _read(runs: Path) -> dict[str, str]:
    try:
        known = read_json(_file(runs))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _file(runs: Path) -> Path:
    return runs / ".share.json"
