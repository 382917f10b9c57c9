"""`python -m tools.faults`: bring every fault about in real runs, and print what became of each.

Ends with 1 if one was not survived. See docs/faults.md.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from lorasmith.trainer.errors import UserError
from lorasmith.trainer.files import write_text

from .fault import Attempt, Fault, NotHere
from .material import Material
from .processes import Hangs
from .registry import FAULTS
from .report import Row, markdown, table
from .survival import Examined, examine

DOCUMENT = Path("docs/faults.md")
_TABLE = re.compile(r"(<!-- faults -->\n).*?(<!-- end -->)", re.DOTALL)
_UNDER_UNSHARE = "LORASMITH_FAULTS_UNSHARED"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
out, err = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True, highlight=False)


@app.command()
def main(
    only: Annotated[list[str], typer.Option(help="A fault whose name begins so; may be repeated.")] = [],  # noqa: B006
    times: Annotated[int, typer.Option(min=0, help="Try each at most so often, spread over its places. 0: all.")] = 0,
    file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write what was found, too.")] = None,
    document: Annotated[bool, typer.Option(help=f"Write the table into {DOCUMENT.as_posix()} as well.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="How many are tried at the same time.")] = os.cpu_count() or 1,
) -> None:
    """Say of each fault how often it was tried, how often it was survived, and what was lost."""
    mount_as_if_root()
    faults = [fault for fault in FAULTS if fault.name.startswith(tuple(only or [""]))]
    if not faults:
        refuse(f"no fault begins with {' or '.join(only)}", "--only", f"See {DOCUMENT.as_posix()}.")
    if document and (only or times):
        refuse("would leave out what was not tried", "--document", "Try all: take --only and --times away.")
    began, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="lorasmith-faults-"))
    rows = list(tried(faults, times, folder, jobs))
    out.print(table(rows))
    for row in rows:
        for slip in row.slips:
            out.print(f"{row.fault}, {slip}", markup=False)
    err.print(f"{sum(row.tried for row in rows)} attempts in {time.monotonic() - began:.0f} s")
    if file:
        write_text(file, json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if document:
        text = DOCUMENT.read_text(encoding="utf-8")
        write_text(DOCUMENT, _TABLE.sub(lambda found: f"{found[1]}{markdown(rows)}{found[2]}", text))
    if all(row.is_good for row in rows):
        shutil.rmtree(folder)
        return
    err.print(f"What is left of those that were not survived: {folder}", markup=False)
    raise typer.Exit(1)


def refuse(what: str, where: str, fix: str) -> NoReturn:
    err.print(str(UserError(what, where, fix)), markup=False)
    raise typer.Exit(UserError.exit_code)


def mount_as_if_root() -> None:
    """Start this program again under `unshare`, where small disks can be mounted, if that is needed and can be."""
    unshare = ["unshare", "--map-root-user", "--mount"]
    if os.geteuid() == 0 or os.environ.get(_UNDER_UNSHARE) or not shutil.which(unshare[0]):
        return
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode == 0:
        os.environ[_UNDER_UNSHARE] = "1"
        os.execvp(unshare[0], [*unshare, sys.executable, "-m", "tools.faults", *sys.argv[1:]])


def tried(faults: Sequence[Fault], times: int, folder: Path, jobs: int) -> Iterator[Row]:
    """What came of each fault, in their order."""
    err.print("making a base, an unbroken run and one that is killed")
    material = Material.made(folder)
    with ThreadPoolExecutor(jobs) as pool:
        coming = [
            (fault, [pool.submit(attempted, fault, number, material) for number in spread(fault.times, times)])
            for fault in faults
        ]
        for fault, attempts in coming:
            row = Row(fault.name, fault.what)
            for attempt in attempts:
                try:
                    count(row, *attempt.result())
                except NotHere as why:
                    row.skipped = str(why)
            err.print(": ".join(row.cells[::2]), markup=False)
            yield row


def spread(there: int, wanted: int) -> list[int]:
    """So many of the numbers below `there`, evenly; all for 0."""
    many = min(wanted or there, there)
    return [(2 * number + 1) * there // (2 * many) for number in range(many)]


def attempted(fault: Fault, number: int, material: Material) -> tuple[str, Examined]:
    """Where a fault has struck, and what came of it. What it leaves behind stays only if it was not survived."""
    place = material.folder / re.sub(r"\W+", "-", f"{fault.name} {number}")
    with ExitStack() as undo:
        try:
            struck = fault.strike(Attempt(number, place, material, undo))
            examined, where = examine(struck, material), struck.where
        except Hangs as hangs:
            examined, where = Examined([str(hangs)], []), ""
    if not examined.slips:
        shutil.rmtree(place)
    return f"attempt {number}" + (f" ({where})" if where else ""), examined


def count(row: Row, where: str, examined: Examined) -> None:
    row.tried += 1
    row.survived += not examined.slips
    row.lost += len(examined.lost)
    row.slips += [f"{where}: {slip}" for slip in examined.slips]


if __name__ == "__main__":
    app()
