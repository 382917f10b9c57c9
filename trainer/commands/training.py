"""Commands that train, and that watch and stop what trains."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import INTERRUPTED, UserError
from ..startup import started
from .options import ConfigFile, Json, Overrides, RunPath, print_json, refuse_unwritable
from .preparing import plan_of

if TYPE_CHECKING:
    from ..plan import Plan
    from ..run import Finished


def demo(
    out: Annotated[Path, typer.Option(help="The folder that holds run folders.")] = Path("runs"),
) -> None:
    """Train the example style on the embedded base; make before/after pictures and a LoRA file."""
    refuse_unwritable(out, "--out")
    from ..demo import run_demo

    finished = run_demo(out)
    if finished.stopped_by:
        say_how_it_ended(finished)


def train(file: ConfigFile, set_: Overrides = None) -> None:
    """Train, export and verify. The first Ctrl-C stops and saves."""
    made, _ = plan_of(file, set_)
    carry_out(made)


def resume(
    path: RunPath,
    set_: Overrides = None,
    from_step: Annotated[
        int | None, typer.Option("--from", min=0, metavar="STEP", help="Go on from this checkpoint, not the newest.")
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            metavar="config|data|base",
            help="Go on although the settings, the images or the base have changed; may be repeated.",
        ),
    ] = None,
    tell: Annotated[
        bool, typer.Option(hidden=True, help="Tell in the run's folder, too, why it cannot go on.")
    ] = False,
) -> None:
    """Continue a stopped, interrupted or failed run exactly where it was saved."""
    from .. import run
    from ..console import Reporter
    from ..jobs import open_run
    from ..origin import changes_named

    found, allowed = open_run(path), changes_named(allow or ())
    with Reporter() as report, run.refusals_told(found) if tell else nullcontext():
        finished = run.resume(found, set_ or [], report, from_step, allowed)
    say_how_it_ended(finished)


def verify_resume(
    file: ConfigFile,
    set_: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, max=1000, metavar="N", help="Steps of each half.")] = 4,
    as_json: Json = False,
) -> None:
    """Train 2 N steps unbroken, and N + N with the process killed in between, and compare. Exit code 1 if they differ.

    Both are trained in a temporary folder, of which nothing is left.
    """
    from ..rerun import verify_resume

    verdict = verify_resume(file, set_ or [], steps, lambda doing: typer.echo(doing, err=True))
    if as_json:
        print_json(verdict.facts())
    else:
        from ..console import print_verdict

        print_verdict(verdict)
    if not verdict.is_equal:
        raise typer.Exit(1)


def stop(path: RunPath) -> None:
    """Ask a running run to save and stop after its current step; one that waits leaves the queue."""
    from ..jobs import open_run

    typer.echo(open_run(path).ask_to_stop())


def save(path: RunPath) -> None:
    """Ask a running run for a checkpoint of its current step."""
    from ..jobs import open_run

    typer.echo(open_run(path).ask_to_save())


def preview(path: RunPath) -> None:
    """Ask a running run for previews of its current step."""
    from ..jobs import open_run

    typer.echo(open_run(path).ask_to_sample())


def runs(
    folder: Annotated[Path, typer.Argument(help="The folder that holds run folders.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """List runs and where each of them stands."""
    from dataclasses import asdict

    from ..jobs import find_runs

    found = [(run, run.status()) for run in find_runs(folder)]
    if as_json:
        print_json([{"name": run.name, "path": str(run.path), **asdict(status)} for run, status in found])
    elif not found:
        typer.echo(f"no runs in {folder}")
    for run, status in found if not as_json else []:
        typer.echo(f"{run.name}: {status.sentence}")


def ui(
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port of the page.")] = 7860,
    folder: Annotated[Path, typer.Option("--runs", help="The folder that holds run folders.")] = Path("runs"),
    listen: Annotated[bool, typer.Option(help="Let other computers reach the page; needs --auth.")] = False,
    auth: Annotated[
        str,
        typer.Option(metavar="USER:PASSWORD", envvar="LORASMITH_AUTH", help="Ask for this name and password."),
    ] = "",
    root: Annotated[
        list[Path] | None,
        typer.Option(
            help="With --listen: a folder in which paths typed in the page may lie; may be repeated. "
            "The current folder if not given."
        ),
    ] = None,
) -> None:
    """Open the browser app: images, training, comparing and sharing. Only this computer reaches it, unless --listen."""
    refuse_unwritable(folder, "--runs")
    if root and not listen:
        raise UserError("has no effect without --listen: you may type any path", "--root", "Remove it.")

    from ...ui.quickly import without_stubs

    with without_stubs():
        from ...ui.server import Door, serve
    started()
    serve(folder, Door.of(listen, port, auth), tuple(root or ()))


def carry_out(made: Plan) -> None:
    """Show the plan of a new run, and train it."""
    from ..console import Reporter, print_plan
    from ..jobs import check_name_is_free, is_main_process

    if is_main_process():
        check_name_is_free(made.config)
        print_plan(made)
    from .. import run

    with Reporter() as report:
        finished = run.train(made, report)
    say_how_it_ended(finished)


def say_how_it_ended(finished: Finished) -> None:
    if finished.stopped_by:
        typer.echo(f"{finished.run.path}: {finished.run.status().sentence}")
        typer.echo(f"Continue with: lorasmith resume {finished.run.path}", err=True)
        if finished.stopped_by == "signal":
            raise typer.Exit(INTERRUPTED)
    for file in finished.exports:
        typer.echo(file)
