"""What several commands share: their arguments and options, and how they print and refuse."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import UserError

if TYPE_CHECKING:
    from ...datasets.workers import Progress


def _above_zero(energy: float | None) -> float | None:
    if energy == 0:
        raise UserError("0 is no share to keep", "--energy", "Give a number above 0, at most 1, such as 0.95.")
    return energy


Strings = list[str] | None

ConfigFile = Annotated[Path, typer.Argument(help="The configuration, a TOML file.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or its name under runs/.")]
Overrides = Annotated[
    Strings, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a setting; may be repeated.")
]
LoraPath = Annotated[Path, typer.Argument(metavar="FILE", help="A LoRA .safetensors file of any kind and trainer.")]
NewFile = Annotated[Path, typer.Option("--out", help="The new .safetensors file.")]
BaseOfFile = Annotated[
    str, typer.Option("--base", help="The base it was made for, as in base.model; the published one if not given.")
]
FilePrecision = Annotated[Literal["fp16", "bf16", "fp32"], typer.Option("--precision", help="Precision of the file.")]
LoraFormat = Annotated[
    Literal["kohya", "diffusers"],
    typer.Option("--format", help="Names of the layers: kohya's, which every client reads, or diffusers'."),
]
Rank = Annotated[int | None, typer.Option("--rank", min=1, help="The rank of every layer.")]
Energy = Annotated[
    float | None,
    typer.Option(
        "--energy",
        min=0,
        max=1,
        callback=_above_zero,
        help="Of each layer the least rank that keeps this share of the change's energy.",
    ),
]
Strength = Annotated[
    float,
    typer.Option("--strength", help="Strength of the change: 0 is the untouched base, 1 what was trained."),
]
BlockStrengths = Annotated[
    Strings,
    typer.Option("--block", metavar="PATH=NUMBER", help="That of one block, as unet.up_blocks.1=0.5; may be repeated."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines.")]


def numbers(text: str, kind: Callable[[str], Any], where: str) -> list[Any]:
    """Those of a list with commas."""
    try:
        return [kind(part) for part in text.split(",")] if text else []
    except ValueError:
        raise UserError(f"{text!r} is no list of numbers", where, "Write them with commas, as in 300,400.") from None


def print_lost(lost: Mapping[str, float]) -> None:
    """What a lower rank lacks."""
    for component, share in lost.items():
        typer.echo(f"{component}: {share:.2%} of the change is lost")


@contextmanager
def progress_of(what: str) -> Iterator[Progress]:
    """A bar on a terminal."""
    from ..console import Reporter
    from ..events import Phase

    with Reporter() as report:
        yield lambda done, total: report(Phase(what, done, total))


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def refuse_unwritable(folder: Path, where: str) -> None:
    """Before anything is loaded."""
    from ..files import writable

    if reason := writable(folder):
        raise UserError(reason, where, "Choose another place.")


def refuse_taken(target: Path, where: str) -> None:
    """A new file or folder never takes the place of another one."""
    if target.exists():
        raise UserError("exists already", f"{where} {target}", "Choose another name.")
    refuse_unwritable(target.parent, where)


def require_file_name(target: Path, where: str) -> None:
    """Of a new file of weights."""
    if target.suffix != ".safetensors":
        raise UserError("does not end in .safetensors", f"{where} {target}", "Clients go by the ending: add it.")
    refuse_taken(target, where)
