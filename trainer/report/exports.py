"""The files that were exported: hashes, how near they are to what was trained, what each client makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files import sha256_of
from .facts import RunFacts
from .words import folded, missing, pairs, section, table


def exports(facts: RunFacts) -> str:
    return section("exports", "Exports", *_exports(facts))


def _exports(facts: RunFacts) -> Iterator[str]:
    weights, others = _files(facts.run.exports)
    if not weights:
        done = facts.status.state == "done"
        yield missing(
            "The files are gone; <code>lorasmith export</code> writes them anew."
            if done
            else "Nothing was exported yet. A run that reaches its end exports itself; "
            "<code>lorasmith export</code> does it for any checkpoint."
        )
        return
    found = {str(report.get("file")): report for report in facts.verified}
    for file in weights:
        yield _card(facts, file, found.get(file.name))
    if others:
        listed = "".join(f"<li>{facts.say(name)}</li>" for name in others)
        yield folded(f"What lies beside them ({len(others)})", f"<ul>{listed}</ul>")


def _files(folder: Path) -> tuple[list[Path], list[str]]:
    """Files with weights, and what all others are called."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    weights = [file for file in files if file.suffix == ".safetensors" and ".unverified." not in file.name]
    weights.sort(key=lambda file: (len(file.name), file.name))  # the one that every client reads has the shortest name
    return weights, [file.relative_to(folder).as_posix() for file in files if file not in weights]


def _card(facts: RunFacts, file: Path, report: dict[str, Any] | None) -> str:
    say, sha256 = facts.say, sha256_of(file)
    hashes: dict[str, str] = (report or {}).get("hashes") or {}
    rows = [("Size", say(f"{file.stat().st_size / 2**20:,.1f} MiB")), ("SHA-256", f"<code>{sha256}</code>")]
    if report:
        keys = ", ".join(f"{count} of {part}" for part, count in (report.get("keys") or {}).items())
        rows += [
            ("AutoV2, AutoV3", say(f"{hashes.get('autov2')}, {hashes.get('autov3')}")),
            ("Format", say(f"{report.get('format')}, {report.get('precision')}")),
            ("Tensors", say(keys)),
            *_verification(facts, report.get("verification") or {}),
        ]
    changed = bool(hashes) and hashes.get("sha256") != sha256
    notice = '<p class="notice bad">The file is another than the one that was verified.</p>' if changed else ""
    none = "" if report else missing("No record of its verification lies beside it.")
    name = say(file.relative_to(facts.run.exports).as_posix())
    return f"<h3>{name}</h3>{notice}{pairs(rows)}{none}{_clients(facts, report)}"


def _verification(facts: RunFacts, found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """How near the file on disk is to the trained model, number by number."""
    for name, value in found.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield facts.say(name.replace("_", " ").capitalize()), facts.say(f"{value:.3g}")


def _clients(facts: RunFacts, report: dict[str, Any] | None) -> str:
    say, clients = facts.say, (report or {}).get("clients") or []
    rows = [(say(one.get("client")), say(one.get("reading")), say(one.get("why"))) for one in clients]
    return table(("client", "reads it", "why"), rows) if rows else ""
