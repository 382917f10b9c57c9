"""What was measured, for a person: a table and a sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.markup import escape
from rich.table import Table

from ..console import out
from .measure import Result

Facts = dict[str, Any]
_ROWS: list[tuple[str, Callable[[Facts], str]]] = [
    ("seconds a step", lambda facts: _seconds(facts, "s_per_step")),
    ("CPU seconds a step, of the process", lambda facts: _seconds(facts, "cpu_s_per_step")),
    ("images a second", lambda facts: number(facts["images_per_s"])),
    ("seconds to the end of the first step", lambda facts: number(facts["s_to_first_step"])),
    ("memory at its peak", lambda facts: mib(facts["peak_memory_mib"])),
    ("memory at its peak in training", lambda facts: mib(facts["training_memory_mib"])),
    ("memory that PyTorch reserved", lambda facts: mib(facts["reserved_memory_mib"])),
    ("share of the matmul peak", lambda facts: f"{facts['mfu']:.1%}"),
]


def print_result(result: Result) -> None:
    facts = result.facts()
    for line in conditions(facts):
        out.print(line, markup=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    sides = [("ours", facts), *([(result.other.name, facts["other"])] if result.other else [])]
    for name, _ in sides:
        table.add_column(escape(name), justify="right")
    for what, told in _ROWS:
        cells = [told(of_side) for _, of_side in sides]
        if any(cell != _UNKNOWN for cell in cells):
            table.add_row(what, *cells)
    out.print(table)
    out.print(sentence(result), markup=False)
    if not result.protocol.is_enough:
        out.print("Too short for a claim: take at least 2 warm-up steps, 5 steps and 3 rounds.", markup=False)


def conditions(facts: Facts) -> list[str]:
    """What was measured, and on what."""
    settings, protocol, machine = facts["settings"], facts["protocol"], facts["machine"]
    threads = "1 thread" if settings["threads"] == 1 else f"{settings['threads']} threads"
    device = machine["cpu"] if machine["device"] == "cpu" else machine["device"]
    rounds = "1 round" if protocol["rounds"] == 1 else f"{protocol['rounds']} rounds"
    return [
        f"{case_in_words(facts)}; {device}, {threads}",
        f"{rounds} of {protocol['warmup']} + {protocol['steps']} steps; an image is "
        f"{number(facts['model_tflop_per_image'])} TFLOP, and the device multiplies matrices at "
        f"{number(facts['work']['matmul_tflop_per_s'])} TFLOP/s",
    ]


def case_in_words(facts: Facts) -> str:
    settings = facts["settings"]
    words = f"{settings['base']} at {settings['resolution']} px, {settings['precision']}, batch {settings['batch']}"
    return f"{words}, rank {settings['rank']}, {settings['targets']}"


def sentence(result: Result) -> str:
    """How the two sides compare, by the clock that counts here."""
    if not result.other:
        wall = result.facts()["s_per_step"]
        return f"A step takes {number(wall)} s, {number(result.images / wall)} images a second."
    ratio, facts = result.ratio(result.clock), result.facts()
    by = "by the CPU time of the process" if result.clock == "cpu" else "by the clock"
    rounds = "1 round" if len(ratio.rounds) == 1 else f"{len(ratio.rounds)} rounds"
    whose, share = ("at its peak", facts["peak_memory_ratio"])
    if facts["training_memory_ratio"] is not None:
        whose, share = "while it trains", facts["training_memory_ratio"]
    return (
        f"Ours is {ratio.median:.2f} times as fast as {result.other.name}, {by} (median of {rounds}; the worst "
        f"{ratio.worst:.2f}), and takes {share:.0%} of its memory {whose}."
    )


_UNKNOWN = "-"


def _seconds(facts: Facts, key: str) -> str:
    least, most = facts["spreads"][key]
    return f"{number(facts[key])} ({number(least)} to {number(most)})"


def mib(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:,.0f} MiB"


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
