"""What the Images page was used for last, kept beside the runs, so that it comes again with the page."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ...trainer.files import write_text
from ...trainer.jsonfile import read_json

FILE = ".images.json"
TEACHING = {
    "Style": "Captions say what each picture shows, and nothing of how it is drawn: what they leave out is learned.",
    "Character": "Captions name the trigger word and what changes: pose, clothes, place. What never changes stays out.",
    "Object": "Captions name the trigger word and what is around the object: place, light, angle.",
}
"""What can be taught, and what captions should say for it."""


@dataclass(frozen=True)
class Visit:
    """Folder, trigger word, and what is taught."""

    folder: str = ""
    trigger: str = ""
    teaching: str = "Style"

    @classmethod
    def last(cls, runs: Path) -> Visit:
        """What the file says; nothing if there is none, or if no page has written it."""
        try:
            values = read_json(runs / FILE)
            kept = cls(*(str(values[name]) for name in ("folder", "trigger", "teaching")))
        except (OSError, ValueError, LookupError, TypeError):
            return cls()
        return kept if kept.teaching in TEACHING else replace(kept, teaching="Style")

    def keep(self, runs: Path) -> None:
        if self != Visit.last(runs):
            write_text(runs / FILE, json.dumps(asdict(self)) + "\n")
