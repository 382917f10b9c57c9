"""The commands of the queue: runs that are trained one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import ConfigFile, Json, Overrides, print_json
from .preparing import plan_of

RunsFolder = Annotated[Path, typer.Option("--runs", help="The folder that holds run folders.")]
Name = Annotated[str, typer.Argument(help="The run's name.")]

app = typer.Typer(
    name="queue",
    help="Runs that wait are trained one after the other, by a process of its own.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("list")
def list_(folder: RunsFolder = Path("runs"), as_json: Json = False) -> None:
    """What is trained now, and what waits."""
    from ..queue import Queue

    queue = Queue(folder)
    running, waiting = queue.running(), queue.waiting()
    if as_json:
        entries = [{"name": entry.name, "overrides": entry.overrides} for entry in waiting]
        print_json({"running": running, "waiting": entries})
        return
    if running:
        typer.echo(f"{running}: is being trained")
    for place, entry in enumerate(waiting, start=1):
        typer.echo(" ".join([f"{place}. {entry.name}", *(f"--set {override}" for override in entry.overrides)]))
    if not running and not waiting:
        typer.echo(f"nothing waits in {folder}")


@app.command()
def add(file: ConfigFile, set_: Overrides = None) -> None:
    """Put a configuration at the end of the queue; it is trained at once if nothing else is."""
    from ..console import print_plan
    from ..jobs import check_name_is_free
    from ..queue import Queue, begin

    made, _ = plan_of(file, set_)
    check_name_is_free(made.config)
    print_plan(made)
    run = begin(made.config, Queue(Path(made.config.runs)))
    typer.echo(f"{run.path} is in the queue")


@app.command()
def remove(name: Name, folder: RunsFolder = Path("runs")) -> None:
    """Take a run out of the queue; its folder stays."""
    from ..queue import Queue

    Queue(folder).remove(name)
    typer.echo(f"{name} waits in the queue no more")


@app.command(hidden=True)
def work(folder: Annotated[Path, typer.Argument(metavar="RUNS")]) -> None:
    """Train what waits, until nothing does."""
    from ..queue import work

    work(folder)
