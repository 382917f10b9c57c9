"""`python -m tools.fuzz [--target NAME] [--seconds N]`: search for files that the product's readers stumble over.

Each target is searched by atheris, which sees what of our code a file has reached and goes on from there. It prints a
table, and keeps every file that was found in .cache/fuzz/found, with the traceback beside it. What is mended belongs
into `findings.py`, so that the tests hold it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from .targets import TARGETS

CACHE = Path(".cache/fuzz")
_LIMITS = ["-timeout=20", "-rss_limit_mb=3072", "-max_len=50000", "-print_final_stats=1", "-verbosity=1"]
"""libFuzzer's: seconds for one file, memory of the whole process, bytes of a file."""


def main(
    target: Annotated[str, typer.Option(help=f"One of: {', '.join(TARGETS)}; all if none is named.")] = "",
    seconds: Annotated[int, typer.Option(help="How long each target is searched.")] = 60,
) -> None:
    """Search, and print what was found."""
    if importlib.util.find_spec("atheris") is None:
        raise SystemExit("atheris is missing, which searches: pip install -r tools/fuzz/requirements.txt (make fuzz)")
    if target and target not in TARGETS:
        raise SystemExit(f"there is no target {target!r}; there are: {', '.join(TARGETS)}")
    typer.echo(f"{'target':20} {'runs':>8} found")
    total = 0
    for name in [target] if target else TARGETS:
        runs, found = searched(name, seconds)
        total += len(found)
        typer.echo(f"{name:20} {runs:8} {', '.join(found) or 'nothing'}")
    if total:
        raise SystemExit(f"{total} findings are in {CACHE / 'found'}")


def searched(name: str, seconds: int) -> tuple[int, list[str]]:
    """How many files one target has met, and what was found."""
    corpus, found = CACHE / "corpus" / name, CACHE / "found" / name
    for folder in (corpus, found):
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as around:
        for seed, content in TARGETS[name].seeds(Path(around)).items():
            (corpus / seed).write_bytes(content)
        command = [sys.executable, "-m", "tools.fuzz.one", name, str(found), str(corpus), *_LIMITS]
        command += [f"-max_total_time={seconds}", f"-artifact_prefix={found}/"]
        environment = os.environ | {"TMPDIR": around, "XDG_CACHE_HOME": around, "OMP_NUM_THREADS": "1"}
        before = {file.name for file in found.iterdir()}
        said = subprocess.run(command, capture_output=True, env=environment, check=False)
    log = said.stderr.decode("utf-8", "replace")
    (CACHE / f"{name}.log").write_text(log, encoding="utf-8")
    runs = re.search(r"stat::number_of_executed_units: (\d+)", log)
    new = sorted(file.name for file in found.iterdir() if file.suffix != ".txt" and file.name not in before)
    if said.returncode and not new:
        new = [f"its process has ended with {said.returncode}, see {CACHE / name}.log"]
    return int(runs[1]) if runs else 0, new


typer.run(main)
