"""The command that measures."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from ..errors import UserError
from .options import Json, Overrides, Strings, print_json


def bench(
    base: Annotated[str, typer.Option(help="pocket, random:sd15, random:sdxl, or any other base.")] = "pocket",
    resolution: Annotated[int, typer.Option(help="Side of the pictures in pixels. 0: as the base was trained.")] = 0,
    batch: Annotated[int, typer.Option(help="Images in one forward and backward pass.")] = 1,
    rank: Annotated[int, typer.Option(help="Rank of the adapter; alpha is the same.")] = 16,
    targets: Annotated[str, typer.Option(help="Layers that get an adapter, as adapter.targets.")] = "attention",
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16, as runtime.precision.")] = "auto",
    steps: Annotated[int, typer.Option(min=0, help="Steps of a round. 0: 5 on a CPU, 40 on a GPU.")] = 0,
    warmup: Annotated[int, typer.Option(min=0, help="Steps before them that are not counted.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="With another side, the order is reversed in each.")] = 3,
    threads: Annotated[int, typer.Option(min=0, help="Of PyTorch. 0: one on a CPU; beside a GPU its own choice.")] = 0,
    set_: Overrides = None,
    against: Annotated[
        Literal["reference"] | None, typer.Option(help="Compare with a plain loop of diffusers and PEFT.")
    ] = None,
    against_set: Annotated[
        Strings,
        typer.Option(
            "--against-set",
            metavar="SECTION.KEY=VALUE",
            help="Compare with our own trainer, and this setting laid over; may be repeated.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure speed and memory of training here, on random pictures."""
    if against and against_set:
        raise UserError("cannot both be given", "--against, --against-set", "Compare with one of the two at a time.")
    from ..bench.case import Case, Protocol
    from ..bench.measure import REFERENCE, measure, settings_against
    from ..bench.telling import print_result
    from ..console import Reporter

    case = Case(base, resolution, batch, rank, targets, precision, tuple(set_ or ()))
    other = settings_against(against_set) if against_set else REFERENCE if against else None
    with Reporter() as report:
        result = measure(case, other, Protocol(warmup, steps, rounds, threads), report)
    if as_json:
        print_json(result.facts())
    else:
        print_result(result)
