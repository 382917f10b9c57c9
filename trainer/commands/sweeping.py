"""The command that trains many runs: a configuration at several values of some of its settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from .options import Json, Overrides, print_json, progress_of

if TYPE_CHECKING:
    from ..jobs import RunFolder
    from ..sweep import Foreseen, Result, Sweep


def sweep(
    file: Annotated[Path, typer.Argument(help="The grid, a TOML file.")],
    set_: Overrides = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what would be trained.")] = False,
    results: Annotated[bool, typer.Option("--results", help="Only say how its runs came out so far.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Also go on with those of its runs that are there and not done.")
    ] = False,
    ray: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            help="Train on Ray, and wait for it: local (a run on each GPU of this computer), auto (the cluster that "
            "this computer is in) or ray://HOST:10001. In this computer's queue if not given.",
        ),
    ] = "",
    as_json: Json = False,
) -> None:
    """Train a configuration at several values of some of its settings, a run of each combination."""
    _refuse_idle(plan=plan, results=results, resume=resume, ray=bool(ray))
    from ..sweep import plan_sweep, read_sweep, results_of, train_in_queue, train_on_ray

    found = read_sweep(file, set_ or [])
    if results:
        _show_results(found, list(results_of(found)), as_json)
        return
    there = [variant for variant in found.variants if resume and found.is_there(variant)]
    resumed = [run for run in map(found.run_of, there) if run.status().can_resume]
    with progress_of("planning the runs") as progress:
        foreseen = plan_sweep(found, [one for one in found.variants if one not in there], progress)
    if plan or (foreseen and not as_json):
        _show_plan(found, foreseen, as_json)
    if plan:
        return
    if not ray:
        train_in_queue(found, foreseen, resumed)
        _say_what_waits(found, foreseen, resumed, as_json)
        return
    train_on_ray(ray, foreseen, resumed, lambda told: typer.echo(told, err=True))
    ended = list(results_of(found))
    _show_results(found, ended, as_json)
    if any(one.state != "done" for one in ended):
        raise typer.Exit(1)


def _refuse_idle(plan: bool, results: bool, resume: bool, ray: bool) -> None:
    """What only looks neither begins runs nor goes on with any."""
    given = [name for name, value in {"--plan": plan, "--results": results}.items() if value]
    idle = [name for name, value in {"--resume": resume, "--ray": ray}.items() if value]
    if len(given) > 1:
        raise UserError(f"cannot be had together with {given[1]}", given[0], "Take one of them.")
    if given and idle:
        raise UserError(f"has no effect with {given[0]}", idle[0], "Take one of them.")


def _show_plan(found: Sweep, foreseen: Sequence[Foreseen], as_json: bool) -> None:
    """What would be trained, and how long that takes as far as it is known."""
    from ..status import duration
    from ..sweep import shared

    steps, known = sum(one.plan.steps for one in foreseen), [one.seconds for one in foreseen if one.seconds is not None]
    seconds = sum(known) if known and len(known) == len(foreseen) else None
    if as_json:
        runs = [one.facts() for one in foreseen]
        print_json(_where(found) | {"runs": runs, "steps": steps, "seconds": seconds and round(seconds)})
        return
    rows = (
        [one.variant.name, *_varied(found, one.variant.values), f"{one.plan.steps}", _about(one.seconds)]
        for one in foreseen
    )
    _print_table(["run", *found.varies, "steps", "takes"], rows)
    long = "how long is not known before one of each kind was trained"
    if seconds is not None:
        long = f"about {duration(seconds)}, one after the other"
    typer.echo(f"{_count(len(foreseen))}, {steps} steps: {long}")
    for warning, whose in shared({one.variant.name: list(one.plan.warnings()) for one in foreseen}):
        typer.echo(f"warning: {warning}{whose}", err=True)


def _show_results(found: Sweep, results: Sequence[Result], as_json: bool) -> None:
    """How the runs came out so far."""
    from ..status import duration

    if as_json:
        print_json(_where(found) | {"runs": [one.facts() for one in results]})
        return
    rows = (
        [
            one.variant.name,
            *_varied(found, one.variant.values),
            one.state,
            f"{one.status.step} of {one.status.steps}" if one.status and one.status.steps else "",
            "" if one.status is None or one.status.loss is None else f"{one.status.loss:.4f}",
            duration(one.seconds) if one.seconds else "",
        ]
        for one in results
    )
    _print_table(["run", *found.varies, "state", "steps", "loss", "learning"], rows)
    for one in results:
        if one.status and one.status.state == "failed":
            typer.echo(f"{one.variant.name}: {one.status.sentence} {one.status.fix}".rstrip())


def _say_what_waits(found: Sweep, begun: Sequence[Foreseen], resumed: Sequence[RunFolder], as_json: bool) -> None:
    waiting = {"begun": [one.variant.name for one in begun], "resumed": [run.name for run in resumed]}
    if as_json:
        print_json(_where(found) | waiting)
        return
    if resumed:
        typer.echo(f"these go on first: {', '.join(waiting['resumed'])}")
    count = len(begun) + len(resumed)
    typer.echo(f"in the queue of {found.runs}: {_count(count)}" if count else "there is nothing left to train")


def _count(runs: int) -> str:
    return "1 run" if runs == 1 else f"{runs} runs"


def _where(found: Sweep) -> dict[str, Any]:
    return {"config": str(found.config), "folder": str(found.runs)}


def _varied(found: Sweep, values: Mapping[str, Any]) -> Iterator[str]:
    """A cell for each setting that varies; empty where it is as in the configuration."""
    return (str(values[setting]) if setting in values else "" for setting in found.varies)


def _about(seconds: float | None) -> str:
    from ..status import duration

    return "" if seconds is None else duration(seconds)


def _print_table(columns: Sequence[str], rows: Iterator[Sequence[str]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from ..console import out

    table = Table(*columns, box=None, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*map(escape, row))
    out.print(table)
