"""The command that shows what a run has trained, so that a checkpoint and a strength can be chosen."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError
from .options import Json, RunPath, numbers, print_json, progress_of, refuse_taken, require_file_name

if TYPE_CHECKING:
    from ..choosing.choice import Choice
    from ..choosing.tuned import Tuned
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
        _require_new(out, "wall", (".html", ".json") if scores else ())
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


def _require_new(out: Path, what: str, beside: tuple[str, ...]) -> None:
    """A PNG that is not there yet, nor a file of its name with one of these endings."""
    if out.suffix.lower() != ".png":
        raise UserError("does not end in .png", f"--out {out}", f"Add it: the {what} is a PNG.")
    for file in (out, *map(out.with_suffix, beside)):
        refuse_taken(file, "--out")


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


def leaks(
    path: RunPath,
    step: Annotated[int | None, typer.Option(help="The checkpoint; the newest if not given.")] = None,
    strength: Annotated[float, typer.Option(help="The strength to look at.")] = 1.0,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="What to draw, without the trigger; may be repeated. Neutral subjects if not given."),
    ] = None,
    count: Annotated[int | None, typer.Option(min=2, max=100, help="So many neutral subjects; 8 if not given.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="sample.seed if not given.")] = None,
    out: Annotated[Path | None, typer.Option(help="The new .png file; in the run's compare/ if not given.")] = None,
    as_json: Json = False,
) -> None:
    """Draw what no training image shows, without and with the trigger; measure how much of the style comes unasked,
    what comes with it, and what the captions leave unsaid. It is written as a picture, as a page for a browser, and as
    JSON."""
    if prompt and count:
        raise UserError("has no effect beside --prompt", f"--count {count}", "Remove one of them.")
    if out:
        _require_new(out, "sheet", (".html", ".json"))
    from ..choosing.leaking import find_leaks
    from ..choosing.leakpage import leak_page, leak_sheet
    from ..choosing.leaks import PROMPTS, leaks_file, write_leaks
    from ..files import write_text
    from ..jobs import open_run
    from ..painting.sheet import save_sheet
    from ..painting.studio import Studio

    run = open_run(path)
    with progress_of("drawing") as progress:
        order, found = find_leaks(run, Studio(), step, strength, prompt or [], count or PROMPTS, seed, progress)
    told = (out or leaks_file(order)).with_suffix(".json")
    sheet, page = told.with_suffix(".png"), told.with_suffix(".html")
    save_sheet(leak_sheet(order, run.name, found), sheet)
    write_text(page, leak_page(order, run.name, found))
    write_leaks(found, told)
    if as_json:
        print_json({"sheet": str(sheet), "page": str(page), "leaks": asdict(found)})
        return
    for file in (sheet, page, told):
        typer.echo(file)
    typer.echo(found.sentence)


def tune_strength(
    path: RunPath,
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to draw; may be repeated. Those of the previews if not given.")
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option(min=0, max=2**63 - 1, help="May be repeated; sample.seed if not given.")
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="The checkpoint to start from; what the wall recommends if not given.")
    ] = None,
    strength: Annotated[float | None, typer.Option(help="Its strength to start from; likewise.")] = None,
    pictures: Annotated[int, typer.Option(min=1, max=1000, help="Draw so many at most.")] = 120,
    bake: Annotated[
        int | None, typer.Option(min=1, metavar="RANK", help="Make a plain LoRA of this rank of it; a DoRA needs it.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write what was found, as one new .safetensors file.")] = None,
    as_json: Json = False,
) -> None:
    """Search strengths by block, and means of checkpoints, that keep more of the prompts at the same style; what was
    drawn before is not drawn again."""
    if out:
        require_file_name(out, "--out")
    from ..jobs import open_run

    run = open_run(path)
    from ..choosing.tuned import write_tuned
    from ..choosing.tunedsheet import tuned_file, tuned_sheet
    from ..choosing.tuning import Tuning, task_of
    from ..painting.sheet import save_sheet
    from ..painting.studio import Studio
    from ..release import refuse_second_file

    if out:
        refuse_second_file(run.read_config(), out)
    task = task_of(run, prompt or (), seed or (), step, strength, bake or 0, pictures)
    with progress_of("drawing") as progress:
        tuning = Tuning(task, Studio(), progress)
        typer.echo(tuning.foreseen, err=True)
        tuned = tuning.search()
    told = tuned_file(task)
    sheet = told.with_suffix(".png")
    write_tuned(tuned, told)
    save_sheet(tuned_sheet(task, tuned), sheet)
    written: list[Path] = []
    if out:
        refuse_taken(out, "--out")  # a search takes long
        written = [tuning.write(tuned, out)]
    if as_json:
        files = {"file": str(told), "sheet": str(sheet), "written": [str(file) for file in written]}
        print_json({**asdict(tuned), **files})
        return
    _print_tuned(tuned)
    for file in (told, sheet, *written):
        typer.echo(file)
    if not out:
        typer.echo(tuned.command)


def _print_tuned(tuned: Tuned) -> None:
    """A line for each that was tried, then what is said of it."""
    typer.echo("style  prompt  copying  change")
    for one in tuned.tried:
        numbers = f"{one.scores.style:5.2f} {one.scores.prompt:7.2f} {one.scores.copying:8.2f} {one.change:7.2f}"
        mark = "*" if one == tuned.verdict.best else " "
        typer.echo(f"{numbers} {mark} {one.mixture.title}")
    for note in tuned.notes:
        typer.echo(note)
    typer.echo(tuned.verdict.reason)
