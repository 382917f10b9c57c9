"""`python -m tools.profiling CASE`: what the time of a step goes to, operation by operation, longest first.

The cases are those of `tools.performance`: `pocket` and `sd15` on a CPU, `sd15-1`, `sdxl-4` and others on a GPU.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.profiler import ProfilerActivity, profile

from lorasmith.trainer.bench.case import Case, base_and_side, make_pictures
from lorasmith.trainer.bench.measure import OURS
from lorasmith.trainer.bench.ours import Ours
from lorasmith.trainer.bench.work import synchronise

from .performance import book

_WARM_UPS = 3
_ACTIVITIES = (ProfilerActivity.CPU, ProfilerActivity.CUDA)


def profiled(case: Case, steps: int) -> profile:
    """What happened in so many steps of ours, after a few that are slower."""
    with tempfile.TemporaryDirectory(prefix="lorasmith-profile-", ignore_cleanup_errors=True) as folder:
        config = case.config(Path(folder), OURS, _WARM_UPS + steps + 2)
        make_pictures(config, base_and_side(config)[1])
        side = Ours(config, lambda event: None)  # noqa: ARG005
        seen = profile(activities=_ACTIVITIES[: 1 + torch.cuda.is_available()])
        program = _program(seen, side.device, steps)
        side.train(lambda: next(program))
        return seen


def _program(seen: profile, device: torch.device, steps: int) -> Iterator[bool]:
    """Whether the side should stop, which it asks before each step."""
    yield from [False] * _WARM_UPS
    synchronise(device)
    with seen:
        yield from [False] * steps
        synchronise(device)
    yield True


def main(
    case: Annotated[str, typer.Argument(help="Of tools.performance, such as pocket or sdxl-4.")],
    steps: Annotated[int, typer.Option(min=1, help="After three that are not counted.")] = 5,
    set_: Annotated[list[str], typer.Option("--set", help="A setting, as of lorasmith bench.")] = [],  # noqa: B006
    rows: Annotated[int, typer.Option(min=1, help="Operations that are told.")] = 25,
) -> None:
    """Profile a few steps, and print the operations that took most."""
    cases = book().cases
    if case not in cases:
        raise typer.BadParameter(f"there is no such case; there are {', '.join(cases)}")
    seen = profiled(replace(cases[case], overrides=tuple(set_)), steps)
    by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    typer.echo(seen.key_averages().table(sort_by=by, row_limit=rows, max_name_column_width=60))


if __name__ == "__main__":
    typer.run(main)
