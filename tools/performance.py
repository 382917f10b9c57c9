"""`python -m tools.performance`: measure the trainer, and write the tables of docs/performance.md; an hour or more.

Each row is a `lorasmith bench` of its own: against the plain loop, and each technique alone against ours without it.
A row stays in the document until it is measured again, but rows of two computers never stand in one table. On an NVIDIA
GPU other trainings are measured, and docs/gpu-results.md is written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from lorasmith.trainer.bench.case import Case, Protocol
from lorasmith.trainer.bench.machine import machine
from lorasmith.trainer.bench.measure import REFERENCE, Against, Result, measure, settings_against
from lorasmith.trainer.bench.telling import case_in_words, mib, number
from lorasmith.trainer.config import RuntimeSection
from lorasmith.trainer.console import Reporter
from lorasmith.trainer.errors import LorasmithError, UserError

from .measured import write_into

Value = bool | str


@dataclass(frozen=True)
class Book:
    """What is measured on a kind of computer, and where it is written."""

    document: Path
    cases: Mapping[str, Case]
    alone_on: tuple[str, ...]
    """Cases of which each technique is measured alone."""
    left_out: tuple[str, ...]
    """Switches that do nothing there."""
    further: Mapping[str, tuple[Value, Value]]
    """Settings that are more than a switch: the value that is the technique, and the one without it."""


ON_A_CPU = Book(
    document=Path("docs/performance.md"),
    cases={
        "pocket": Case(precision="bf16"),
        "pocket-batch-4": Case(precision="bf16", batch=4),
        "pocket-fp32": Case(precision="fp32"),
        "sd15": Case("random:sd15", resolution=256, precision="bf16"),
    },
    alone_on=("pocket", "sd15"),
    left_out=("cuda_graphs", "channels_last"),
    further={"base_weights": ("int8", "full")},
)
ON_A_GPU = Book(
    document=Path("docs/gpu-results.md"),
    cases={
        "sd15-1": Case("random:sd15", resolution=512, precision="bf16"),
        "sd15-4": Case("random:sd15", resolution=512, precision="bf16", batch=4),
        "sd15-16": Case("random:sd15", resolution=512, precision="bf16", batch=16),
        "sdxl-1": Case("random:sdxl", resolution=1024, precision="bf16"),
        "sdxl-4": Case("random:sdxl", resolution=1024, precision="bf16", batch=4),
    },
    alone_on=("sd15-1", "sdxl-4"),
    left_out=("cpu_kernels",),
    further={"base_weights": ("int8", "full"), "attention": ("auto", "sdpa")},
)
_STEPS_OF_A_SMALL_ONE = 40
"""Steps of a tenth of a second: five of them would be over before anything evens out."""
_OFF_IS_THE_TECHNIQUE = ("autocast",)
_ONLY_WITH = {"autocast": ("fast_lora",), "cuda_graphs": ("flat_optimizer",)}
"""Techniques that do nothing without others."""


def book() -> Book:
    """Of this computer."""
    return ON_A_GPU if torch.cuda.is_available() else ON_A_CPU


err = Console(stderr=True, soft_wrap=True, highlight=False)


@dataclass(frozen=True)
class Row:
    """One bench, and its place in the document."""

    name: str
    case: Case
    against: Against
    table: str

    @property
    def steps(self) -> int:
        """Of a round; 0 leaves it to the bench."""
        return _STEPS_OF_A_SMALL_ONE if self.case.base == "pocket" else 0


@dataclass(frozen=True)
class Form:
    """A table of the document: its columns after the row's name."""

    columns: tuple[tuple[str, Callable[[Result, dict[str, Any]], str]], ...]

    def head(self) -> list[str]:
        titles = ["row", *(title for title, _ in self.columns)]
        return [_line(titles), _line(["---"] * len(titles))]

    def line(self, name: str, result: Result) -> str:
        facts = result.facts()
        return _line([f"`{name}`", *(cell(result, facts) for _, cell in self.columns)])


def _both(key: str, told: Callable[[float], str] = number) -> Callable[[Result, dict[str, Any]], str]:
    return lambda _, facts: f"{told(facts[key])} / {told(facts['other'][key])}"


def _share(key: str) -> Callable[[Result, dict[str, Any]], str]:
    return lambda _, facts: "not known" if facts[key] is None else f"{facts[key]:.0%}"


def _by_clock(result: Result, facts: dict[str, Any]) -> str:
    return _both("cpu_s_per_step" if result.clock == "cpu" else "s_per_step")(result, facts)


_WHAT = ("what", lambda _, facts: case_in_words(facts))
_SECONDS = ("seconds a step, ours / other", _by_clock)
_MEDIAN = ("times as fast", lambda result, _: f"{result.ratio(result.clock).median:.2f}")
_WORST = ("in the worst round", lambda result, _: f"{result.ratio(result.clock).worst:.2f}")
_MEMORY = ("memory in training", _both("training_memory_mib", mib))
_LESS = ("share of it", _share("training_memory_ratio"))

_AGAINST_REFERENCE = (
    _WHAT,
    _SECONDS,
    _MEDIAN,
    _WORST,
    _MEMORY,
    _LESS,
    ("memory at its peak", _both("peak_memory_mib", mib)),
    ("seconds to the first step", _both("s_to_first_step")),
    ("TFLOP an image", lambda _, facts: number(facts["model_tflop_per_image"])),
    ("share of the matmul peak", _both("mfu", "{:.0%}".format)),
)
_HOST = ("the CPU works, of a step", lambda _, facts: f"{facts['cpu_s_per_step'] / facts['s_per_step']:.0%}")


def forms() -> dict[str, Form]:
    """The tables of the document."""
    of_a_gpu = (_HOST,) if book() is ON_A_GPU else ()
    return {
        "reference": Form((*_AGAINST_REFERENCE, *of_a_gpu)),
        "techniques": Form((_WHAT, _SECONDS, _MEDIAN, _WORST, _MEMORY, _LESS)),
    }


def rows() -> list[Row]:
    """All that are measured on this computer, in the order of the document."""
    here = book()
    against_reference = [Row(name, case, REFERENCE, "reference") for name, case in here.cases.items()]
    return against_reference + [_alone(technique, on) for technique in techniques() for on in here.alone_on]


def techniques() -> dict[str, tuple[Value, Value]]:
    """The settings of `[runtime]` that are measured here, each with the value that is a technique, and the one without
    it; a new switch needs no word here."""
    switches = [name for name, field in RuntimeSection.model_fields.items() if field.annotation is bool]
    there = {name: name not in _OFF_IS_THE_TECHNIQUE for name in switches if name not in book().left_out}
    return {name: (is_on, not is_on) for name, is_on in there.items()} | dict(book().further)


def _alone(technique: str, on: str) -> Row:
    """A technique, with what it needs, against what it needs alone."""
    needed = _ONLY_WITH.get(technique, ())
    values = {name: value if name in needed else without for name, (value, without) in techniques().items()}
    overrides = tuple(_override(name, value) for name, value in values.items())
    value, without = techniques()[technique]
    switched, other = _override(technique, value), settings_against([_override(technique, without)])
    case = replace(book().cases[on], overrides=(*overrides, switched))
    return Row(f"{on} {switched}", case, other, "techniques")


def _override(name: str, value: Value) -> str:
    return f"runtime.{name}={str(value).lower()}"


# ---------------------------------------------------------------------------------------------------------------------
# the document


def this_computer() -> str:
    """In one line; two that differ are not to be compared."""
    facts = machine()
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if name != "lorasmith")
    gpu = f", {facts['gpu']}" if "gpu" in facts else ""
    computer = f"{facts['cpu']}, {facts['cores']} cores, {facts['instructions']}, {facts['memory_gib']} GiB{gpu}"
    return f"{computer}; {versions}\n"


def region(document: str, name: str) -> str:
    """What stands between `<!-- name -->` and `<!-- end -->`."""
    [found] = re.findall(rf"<!-- {name} -->\n(.*?)<!-- end -->", document, re.DOTALL)
    return found


def with_lines(table: str, name: str, new: dict[str, str], order: Sequence[str]) -> str:
    """A table with new lines in place of those of the same rows, in their order; rows that there are no more go."""
    old = {match[1]: line for line in table.splitlines() if (match := re.match(r"\| `([^`]+)` \|", line))}
    lines = old | new
    return "\n".join([*forms()[name].head(), *(lines[row] for row in order if row in lines)]) + "\n"


def write(results: dict[str, Result], document: Path) -> None:
    """Put the lines of these rows into their tables."""
    there, text = rows(), document.read_text(encoding="utf-8")
    write_into(document, "machine", this_computer())
    for name, form in forms().items():
        order = [row.name for row in there if row.table == name]
        new = {row: form.line(row, results[row]) for row in order if row in results}
        write_into(document, name, with_lines(region(text, name), name, new, order))


def make_ready(is_whole: bool, document: Path) -> None:
    """Let no line stay that was not measured on this computer.

    Raises:
        UserError: if only some rows are measured, and the others were on another computer, or with other versions.
    """
    text = document.read_text(encoding="utf-8")
    before = region(text, "machine").strip()
    if is_whole:
        for name in forms():
            write_into(document, name, with_lines("", name, {}, []))
    elif before and before != this_computer().strip():
        what = f"its other rows were measured on {before}"
        raise UserError(what, document.as_posix(), "Measure all of them: take --only away.")


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


# ---------------------------------------------------------------------------------------------------------------------
# the command


def main(
    only: Annotated[list[str], typer.Option(help="A row whose name begins so; may be repeated.")] = [],  # noqa: B006
    steps: Annotated[int, typer.Option(min=0, help="As of lorasmith bench. 0: as each row needs them.")] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="Likewise.")] = 3,
    dry: Annotated[bool, typer.Option("--dry", help="Print the lines, and leave the document as it is.")] = False,
) -> None:
    """Measure each row, and write it into the document as soon as it is known."""
    chosen = [row for row in rows() if row.name.startswith(tuple(only or [""]))]
    try:
        if not chosen:
            raise UserError(f"no row begins with {' or '.join(only)}", "--only", ", ".join(row.name for row in rows()))
        if not dry:
            make_ready(len(chosen) == len(rows()), book().document)
        for row in chosen:
            err.print(row.name)
            with Reporter() as report:
                result = measure(row.case, row.against, Protocol(steps=steps or row.steps, rounds=rounds), report)
            typer.echo(forms()[row.table].line(row.name, result))
            if not dry:
                write({row.name: result}, book().document)
    except LorasmithError as error:
        err.print(f"error: {error}", markup=False)
        raise typer.Exit(error.exit_code) from None


if __name__ == "__main__":
    typer.run(main)
