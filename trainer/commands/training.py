"""Commands that train, and that watch and stop what trains."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import INTERRUPTED
from .options import ConfigFile, Json, Overrides, RunPath, print_json, refuse_unwritable
from .preparing import plan_of

if TYPE_CHECKING:
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
    from ..console import Reporter, print_plan
    from ..jobs import check_name_is_free, is_main_process

    made, _ = plan_of(file, set_)
    if is_main_process():
        check_name_is_free(made.config)
        print_plan(made)
    from .. import run

    with Reporter() as report:
        finished = run.train(made, report)
    say_how_it_ended(finished)


def resume(path: RunPath, set_: Overrides = None) -> None:
    """Continue a stopped, interrupted or failed run exactly where it was saved."""
    from .. import run
    from ..console import Reporter
    from ..jobs import open_run

    with Reporter() as report:
        finished = run.resume(open_run(path), set_ or [], report)
    say_how_it_ended(finished)


def stop(path: RunPath) -> None:
    """Ask a running run to save and stop after its current step."""
    from ..jobs import open_run

    run = open_run(path)
    run.ask_to_stop()
    typer.echo(f"{run.name} will save and stop after its current step")


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
) -> None:
    """Open the browser app: runs, their progress, previews and files."""
    refuse_unwritable(folder, "--runs")

    from ...ui.app import serve

    serve(folder, port)


def say_how_it_ended(finished: Finished) -> None:
    if finished.stopped_by:
        typer.echo(f"{finished.run.path}: {finished.run.status().sentence}")
        typer.echo(f"Continue with: lorasmith resume {finished.run.path}", err=True)
        if finished.stopped_by == "signal":
            raise typer.Exit(INTERRUPTED)
    for file in finished.exports:
        typer.echo(file)
