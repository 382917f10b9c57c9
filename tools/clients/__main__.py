"""`python -m tools.clients`: set real clients up, give them files of every kind, and print what each makes of them.

The first time it installs a few gigabytes under --place. Ends with 1 if a client does other than is expected of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, cast

import typer

from lorasmith.trainer.errors import LorasmithError, UserError
from lorasmith.trainer.files import write_text

from .asked import CLIENTS, RealClient, ask, ask_detection, foresee, slips
from .bases import ARCHITECTURE, FamilyName, Subject, make_subject, threads
from .cases import KINDS, Case, make_cases
from .drawn import draw_all
from .places import CYLLAMA, INVOKEAI, LOG, NotAtHand
from .verdicts import Report, Verdict

DOCUMENT = Path("docs/clients.md")
_TABLE = re.compile(r"(<!-- clients -->\n).*?(<!-- end -->)", re.DOTALL)


def main(
    place: Annotated[
        Path, typer.Option(envvar="LORASMITH_CLIENTS", help="Where environments, models and files are kept.")
    ] = Path(".cache/clients"),
    only: Annotated[list[str], typer.Option(help="A client whose name begins so; may be repeated.")] = [],  # noqa: B006
    family: Annotated[list[str], typer.Option(help="sd1 or sdxl; may be repeated.")] = list(ARCHITECTURE),  # noqa: B006
    kind: Annotated[list[str], typer.Option(help="LoRA, LoCon, ...; may be repeated.")] = list(KINDS),  # noqa: B006
    full: Annotated[
        bool, typer.Option(help="Models as wide as the published ones, and SDXL in stable-diffusion.cpp: hours.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdicts as JSON.")] = False,
    document: Annotated[bool, typer.Option(help=f"Write the table into {DOCUMENT.as_posix()} as well.")] = False,
) -> None:
    """Say of each client and each kind of file whether it does what the live model does."""
    try:
        families = cast(list[FamilyName], among(family, list(ARCHITECTURE), "--family"))
        kinds = among(kind, list(KINDS), "--kind")
        clients = [client for client in CLIENTS if client.title.startswith(tuple(only or [""]))]
        if not clients:
            known = ", ".join(client.title for client in CLIENTS)
            raise UserError(f"no client begins with {' or '.join(only)}", "--only", f"There are {known}.")
        report = examine(clients, families, kinds, place.absolute(), full)
    except LorasmithError as error:
        say(str(error))
        raise typer.Exit(error.exit_code) from None
    print(json.dumps(asdict(report), indent=1) if as_json else report)
    if document:
        text = DOCUMENT.read_text(encoding="utf-8")
        write_text(DOCUMENT, _TABLE.sub(lambda found: f"{found[1]}{report}{found[2]}", text))
    raise typer.Exit(0 if report.is_good else 1)


def examine(
    clients: Sequence[RealClient], families: Sequence[FamilyName], kinds: Sequence[str], place: Path, full: bool
) -> Report:
    """Ask one client after the other."""
    report = Report()
    of_torch = [client for client in clients if client.place is not CYLLAMA]
    cases = {family: prepared(family, kinds, place, full) for family in families if of_torch}
    published = place / "published"
    readings = {family: foresee(family, kinds, published) for family in families}
    for client in clients:
        try:
            python = client.python(place, say)
            for family in families:
                folder = place / "asked" / re.sub(r"\W+", "-", client.title) / family
                folder.mkdir(parents=True, exist_ok=True)
                (folder / LOG).unlink(missing_ok=True)
                own = readings[family]
                say(f"asking {client.title} about {family}")
                if client.place is not CYLLAMA:
                    take(report, ask(client, python, *cases[family], own, folder))
                elif family == "sd1" or full:
                    take(report, draw_all(client, python, family, own, folder, say))
                if client.place is INVOKEAI:
                    take(report, ask_detection(python, family, own, published, folder))
        except NotAtHand as reason:
            report.skipped[client.title] = f"not asked, for {reason}"
        except UserError as error:
            report.failed[client.title] = str(error)
    report.slips = list(slips(report.verdicts))
    return report


def take(report: Report, verdicts: Iterator[Verdict]) -> None:
    """Keep verdicts, and say each as it comes."""
    for verdict in verdicts:
        say(f"  {verdict.family} {verdict.kind} as {verdict.format}: {verdict.cell}")
        report.verdicts.append(verdict)


def prepared(family: FamilyName, kinds: Sequence[str], place: Path, full: bool) -> tuple[Subject, list[Case]]:
    """A base, and the files that were made on it."""
    folder = place / ("full" if full else "narrow") / family
    say(f"making {family} files in {folder}")
    subject = make_subject(family, folder, full)
    (folder / "files").mkdir(exist_ok=True)
    with threads(subject.threads):
        return subject, list(make_cases(subject, folder / "files", kinds))


def among(names: Sequence[str], known: Sequence[str], option: str) -> list[str]:
    """The names, if all are known.

    Raises:
        UserError: if one is not.
    """
    if odd := set(names) - set(known):
        raise UserError(f"{min(odd)} is none of them", option, f"Choose of {', '.join(known)}.")
    return list(names)


def say(text: str) -> None:
    typer.echo(text, err=True)


if __name__ == "__main__":
    typer.run(main)
