"""The command that writes down all that is to be known of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from .options import RunPath, refuse_taken


def report(
    path: RunPath,
    out: Annotated[
        Path | None, typer.Option(help="The new .html file; report.html in the run's folder if not given.")
    ] = None,
    paths: Annotated[bool, typer.Option("--paths", help="Tell where things lie on this computer.")] = False,
) -> None:
    """Write all that is to be known of a run as one page: images, plan and settings, curves, previews, scores, files,
    and the command that makes it again. It needs no other file and no connection, and can be written at any time."""
    if out:
        if out.suffix.lower() not in (".html", ".htm"):
            raise UserError("does not end in .html", f"--out {out}", "Add it: the report is a page for a browser.")
        refuse_taken(out, "--out")
    from ..jobs import open_run
    from ..report.page import write_report

    typer.echo(write_report(open_run(path), out, paths))
