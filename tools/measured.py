"""What a measuring tool has seen, against what is asked, as a table."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lorasmith.trainer.files import write_text


@dataclass(frozen=True)
class Measured:
    """A number, and the largest that is asked for."""

    what: str
    seen: float
    most: float
    unit: str

    @property
    def is_met(self) -> bool:
        return self.seen <= self.most

    def __str__(self) -> str:
        verdict = "yes" if self.is_met else "NO"
        return f"| {self.what} | {_number(self.most)} {self.unit} | {_number(self.seen)} {self.unit} | {verdict} |"


def table(rows: Iterable[Measured]) -> str:
    """In Markdown."""
    head = ["| what | at most | seen | met |", "| --- | --- | --- | --- |"]
    return "\n".join([*head, *map(str, rows)]) + "\n"


def write_into(document: Path, name: str, text: str) -> None:
    """Put a text between `<!-- name -->` and `<!-- end -->` of a document."""
    place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    written = document.read_text(encoding="utf-8")
    write_text(document, place.sub(lambda found: f"{found[1]}{text}{found[2]}", written))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) or value >= 1000 else f"{value:.3g}"
