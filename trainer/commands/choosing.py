"""The command that shows what a run has trained, so that a checkpoint and a strength can be chosen."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError
from .options import Json, RunPath, numbers, print_json, progress_of, refuse_taken

if TYPE_CHECKING:
    from ..choosing.choice import Choice
    from ..jobs import RunFolder
    from ..painting.orders import WallOrder


def compare(
    path: RunPath,
    steps: Annotated[
        str, typer.Option(help="The checkpoints, as in 300,400,500; five over the run if not given.")
    ] = "",
    strengths: Annotated[str, typer.Option(help="The strengths; 0 is the base alone.")] = "0,0.4,0.7,1,1.2",
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to draw; may be repeated. Those of the previews if not given.")
    ] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option(min=0, max=2**63 - 1, help="May be repeated; sample.seed if not given."),
    ] = None,
    scores: Annotated[
        bool, typer.Option(help="Score every cell and recommend one; it needs the images of the training.")
    ] = True,
    out: Annotated[Path | None, typer.Option(help="The new .png file; in the run's compare/ if not given.")] = None,
    as_json: Json = False,
) -> None:
    """Draw a wall of checkpoints and strengths, score each, and recommend one; what was drawn before is not drawn
    again. It is written as a picture, as a page for a browser, and as JSON."""
    if out:
        if out.suffix.lower() != ".png":
            raise UserError("does not end in .png", f"--out {out}", "Add it: the wall is a PNG.")
        for file in (out, out.with_suffix(".html"), out.with_suffix(".json")) if scores else (out,):
            refuse_taken(file, "--out")
    from ..jobs import open_run
    from ..painting.orders import files_of, write_order
    from ..painting.wall import wall_order

    run = open_run(path)
    wanted, shares = numbers(steps, int, "--steps"), numbers(strengths, float, "--strengths")
    texts = prompt or (run.read_config().sample.prompts if scores else [])
    order = wall_order(run, wanted, shares, texts, seed or [])
    write_order(order)  # which checks it
    files = files_of(order, run.path.parent)
    choice = _scored(order) if scores else None
    if not scores:
        _draw(order)
    written = _write(order, run, choice, out or order.sheet())
    if as_json:
        cells = [{**asdict(cell), "file": str(file)} for cell, file in files.items()]
        print_json({"wall": str(written[0]), "cells": cells} | ({"choice": asdict(choice)} if choice else {}))
        return
    for file in written:
        typer.echo(file)
    if choice:
        typer.echo(choice.reason)


def _scored(order: WallOrder) -> Choice:
    """The wall is drawn then."""
    from ..choosing.judge import judge_wall
    from ..painting.studio import Studio

    if not any(order.strengths):
        raise UserError("0 alone shows nothing of what was trained", "--strengths", "Give others, or --no-scores.")
    with progress_of("drawing") as progress:
        return judge_wall(order, Studio(), progress)


def _draw(order: WallOrder) -> None:
    from ..painting.orders import files_of

    files = files_of(order, Path(order.run).parent)
    if missing := [file for file in files.values() if not file.is_file()]:
        from ..painting.studio import Studio

        with progress_of("drawing") as progress:
            done = iter(range(1, len(missing) + 1))
            Studio().draw(order, files, lambda: progress(next(done), len(missing)))


def _write(order: WallOrder, run: RunFolder, choice: Choice | None, target: Path) -> list[Path]:
    """The wall as a picture; with its scores also as a page and as JSON, beside it."""
    from ..painting.sheet import order_sheet, save_sheet

    if not choice:
        save_sheet(order_sheet(order, run.name), target)
        return [target]
    from ..choosing.choice import write_choice
    from ..choosing.page import notes_of, page_of
    from ..files import write_text

    page, told = target.with_suffix(".html"), target.with_suffix(".json")
    save_sheet(order_sheet(order, run.name, notes_of(choice)), target)
    write_text(page, page_of(order, run.name, choice))
    write_choice(choice, told)
    return [target, page, told]
