"""What came of all faults: a table for persons, JSON for programs, Markdown for the page about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.table import Table

HEADINGS = ("fault", "times tried", "survived", "data lost")


@dataclass
class Row:
    """What came of one fault."""

    fault: str
    what: str
    tried: int = 0
    survived: int = 0
    lost: int = 0
    """How many saved things are gone or damaged."""
    slips: list[str] = field(default_factory=list)
    """What was not as it should be, each with where the fault had struck."""
    skipped: str = ""
    """Why it could not be tried."""

    @property
    def is_good(self) -> bool:
        return not self.slips

    @property
    def cells(self) -> tuple[str, str, str, str]:
        if self.skipped:
            return self.fault, "0", f"not tried: {self.skipped}", ""
        return self.fault, str(self.tried), f"{self.survived} of {self.tried}", str(self.lost or "none")


def table(rows: Sequence[Row]) -> Table:
    made = Table(*HEADINGS)
    for row in rows:
        made.add_row(*row.cells, style=None if row.is_good else "red")
    return made


def markdown(rows: Sequence[Row]) -> str:
    lines = [" | ".join((HEADINGS[0], "what happens", *HEADINGS[1:])), " | ".join(["---"] * 5)]
    lines += [" | ".join((row.cells[0], row.what, *row.cells[1:])) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)
