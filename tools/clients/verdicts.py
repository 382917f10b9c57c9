"""How near a client came to the live model, what was expected of it, and the table of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lorasmith.trainer.clients.table import Reading
from lorasmith.trainer.keys import Format

TOLERANCE = 0.01
"""Largest |client - live| / |live - base| of a part that counts as the same: that of the exporter's own check of fp16
files; rounding alone makes 0.0002 to 0.002 of it."""
STILL = 1e-4
"""Largest |client - base| / |base| of a part on which the file has no effect: different versions' arithmetic."""


_WORDS: dict[Reading, str] = {"same": "same", "other": "other", "none": "no effect"}
_FOUND: dict[Reading, str] = {"same": "yes", "other": "another", "none": "no"}


@dataclass(frozen=True)
class Verdict:
    """What a client made of a file."""

    family: str
    kind: str
    format: Format
    client: str
    found: Reading
    expected: Reading
    errors: Mapping[str, float]
    """See `errors_of`; empty if it refused, and where it was asked not what it does but whether it finds the base."""
    said: str = ""
    """With what it refused."""

    @property
    def file(self) -> tuple[str, str, Format]:
        """What tells it from other files."""
        return self.family, self.kind, self.format

    @property
    def is_as_expected(self) -> bool:
        return self.found == self.expected

    @property
    def cell(self) -> str:
        words = _WORDS if self.errors or self.said else _FOUND
        told = "refused" if self.said else words[self.found]
        if self.errors and self.found != "none":
            told += f" {max(self.errors.values()):.2g}"
        return told if self.is_as_expected else f"**{told}, expected: {words[self.expected]}**"


@dataclass
class Report:
    """All that was found."""

    verdicts: list[Verdict] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """Why a client was not asked, by its name."""
    failed: dict[str, str] = field(default_factory=dict)
    """Why a client could not be asked to the end, though it should have been."""
    slips: list[str] = field(default_factory=list)
    """Where the table of kinds is wrong."""

    @property
    def is_good(self) -> bool:
        odd = any(not verdict.is_as_expected for verdict in self.verdicts)
        return bool(self.verdicts) and not (odd or self.failed or self.slips)

    def __str__(self) -> str:
        """Markdown."""
        unasked = [f"- {client}: {why}\n" for client, why in (self.skipped | self.failed).items()]
        return "".join(
            [table(self.verdicts), "\n", refusals(self.verdicts), *unasked, *(f"- {s}\n" for s in self.slips)]
        )


def errors_of(
    client: Mapping[str, Tensor], live: Mapping[str, Tensor], before: Mapping[str, Tensor]
) -> dict[str, float]:
    """|client - live| / |live - base| of each part, and / |base| of one that the adapter leaves alone."""
    errors = {}
    for part, meant in live.items():
        effect = float((meant - before[part]).norm()) or float(before[part].norm())
        errors[part] = float((client[part] - meant).norm()) / effect
    return errors


def reading_of(
    client: Mapping[str, Tensor], live: Mapping[str, Tensor], before: Mapping[str, Tensor], tolerance: float = TOLERANCE
) -> Reading:
    """same: every part does what the live one does. none: no part does anything. other: all else."""
    if max(errors_of(client, live, before).values()) <= tolerance:
        return "same"
    unmoved = [float((client[part] - before[part]).norm()) <= STILL * float(before[part].norm()) for part in before]
    return "none" if all(unmoved) else "other"


def table(verdicts: Sequence[Verdict]) -> str:
    """Markdown: a row for each file, a column for each client; what is not as expected is bold."""
    clients = list(dict.fromkeys(verdict.client for verdict in verdicts))
    rows: dict[tuple[str, str, Format], dict[str, str]] = {}
    for verdict in verdicts:
        rows.setdefault(verdict.file, {})[verdict.client] = verdict.cell
    lines = [f"| {' | '.join(['family', 'kind', 'format', *clients])} |", f"|{' --- |' * (3 + len(clients))}"]
    lines += [
        f"| {' | '.join([*name, *(cells.get(client, '') for client in clients)])} |" for name, cells in rows.items()
    ]
    return "\n".join(lines) + "\n"


def refusals(verdicts: Sequence[Verdict]) -> str:
    """What clients said where they refused, each sentence once."""
    told: dict[tuple[str, str], list[str]] = {}
    for verdict in verdicts:
        if verdict.said:
            told.setdefault((verdict.client, verdict.said), []).append(f"{verdict.family} {verdict.kind}")
    return "".join(f"- {client}, {', '.join(files)}: `{said}`\n" for (client, said), files in told.items())
