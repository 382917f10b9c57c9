"""`python -m tools.pages shots`, `speed` and `walk`: pictures of the pages, how quick they are, and a timed story.

They open a real Chromium on a real server. The pictures show a run of the example, which is trained first if it is not
there (some minutes); they go to docs/pages/, for wide screens and phones, light and dark.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from ..measured import table, write_into
from .shots import take_shots
from .speed import measure_speed
from .walk import walk as walk_through

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
DOCUMENT = Path("docs/browser.md")
WORK = Path(tempfile.gettempdir(), "lorasmith")
"""A folder whose name may be seen: the page shows paths."""


@app.command()
def shots(out: Annotated[Path, typer.Option(help="The folder of the pictures.")] = Path("docs/pages")) -> None:
    """Take the pictures."""
    for file in take_shots(WORK / "runs", out):
        typer.echo(file)


@app.command()
def speed(
    document: Annotated[bool, typer.Option(help=f"Write the table into {DOCUMENT.as_posix()} as well.")] = False,
) -> None:
    """First paint, a status tick over a long log, turning the pages of many images, and what an open page costs."""
    rows = []
    for row in measure_speed(WORK / "speed"):
        typer.echo(row, err=True)
        rows.append(row)
    typer.echo(table(rows))
    if document:
        write_into(DOCUMENT, "speed", table(rows))
    raise typer.Exit(0 if all(row.is_met for row in rows) else 1)


@app.command()
def walk() -> None:
    """From a folder to verified files in the browser, and again by the endpoints; minutes."""
    for what, seconds in walk_through(WORK / "walk"):
        typer.echo(f"{what}: {seconds:.1f} s")


app()
