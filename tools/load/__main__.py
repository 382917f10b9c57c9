"""`python -m tools.load`: what days of work bring, tried in minutes, as a table. Ends with 1 where it is too much.

It opens a real Chromium on real servers, and trains some twenty real runs of a few steps on the embedded base.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from ..measured import Measured, table
from .browsers import many_browsers
from .long_run import long_run
from .queued import queued_runs
from .saves import many_saves

TRIALS = {"log": long_run, "saves": many_saves, "browsers": many_browsers, "queue": queued_runs}


def main(
    only: Annotated[list[str], typer.Option(help=f"One of {', '.join(TRIALS)}; may be repeated.")] = list(TRIALS),  # noqa: B006
) -> None:
    """Try them, and print what was asked and what was seen."""
    rows: list[Measured] = []
    for name in only:
        folder = Path(tempfile.mkdtemp(prefix="lorasmith-load-"))
        try:
            for row in TRIALS[name](folder):
                typer.echo(row, err=True)
                rows.append(row)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    typer.echo(table(rows))
    raise typer.Exit(0 if all(row.is_met for row in rows) else 1)


if __name__ == "__main__":
    typer.run(main)
