"""The command that trains a run's LoRA further by what was said of its pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from .options import Overrides, RunPath
from .training import carry_out


def refine(
    path: RunPath,
    ratings: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The ratings; those of the Compare page, in its ratings/, if not given."),
    ] = None,
    name: Annotated[str, typer.Option(help="The new run's name; the old one's with -refined if not given.")] = "",
    step: Annotated[
        int | None, typer.Option(min=1, help="The checkpoint to refine; the chosen one, or the newest, if not given.")
    ] = None,
    set_: Overrides = None,
) -> None:
    """Train a run's LoRA further by which of its pictures were preferred. It is a new run; the old one stays."""
    from ..configfile import validate
    from ..jobs import open_run
    from ..plan import make_plan
    from ..preferences.ratings import Ratings
    from ..preferences.refining import refined

    before = open_run(path)
    said = Ratings(before, ratings) if ratings else Ratings.of(before)
    if not said.file.is_file():
        fix = "Rate pictures on the Compare page, or write such a file as docs/refine.md has it."
        raise UserError("no such file", f"--ratings {said.file}", fix)
    made = make_plan(validate(refined(before, said, name, step), "refine", set_ or []))
    carry_out(made)
