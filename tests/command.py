"""`lorasmith` as a user runs it: a process in a folder, with what it says and its exit code.

The process is forked, where the system can, from one that has imported torch and the rest already: to import them anew
takes many times longer than what most commands do. A few tests start an interpreter of their own.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import torch

MAIN = [sys.executable, "-m", "lorasmith.trainer.cli"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::UserWarning"}
_LONGEST = 300  # seconds

_server: Any = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")
if _server.get_start_method() == "forkserver":
    _server.set_forkserver_preload(["tools.faults.warm", "lorasmith.ui.server"])  # a process has one such server


@dataclass(frozen=True)
class Said:
    """What a command printed."""

    stdout: str
    stderr: str


def lorasmith(folder: Path, *arguments: object, code: int = 0) -> Said:
    """Run a command, which must end with this exit code."""
    with TemporaryDirectory() as temporary:
        out, err = Path(temporary, "out"), Path(temporary, "err")
        child = start(arguments, folder, out, err)
        child.join(_LONGEST)
        if child.exitcode is None:
            child.kill()
            child.join()
        said = Said(out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8"))
    assert child.exitcode == code, said.stdout + said.stderr
    assert "Traceback" not in said.stderr
    return said


def start(
    arguments: Sequence[object],
    folder: Path,
    out: Path,
    err: Path,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> BaseProcess:
    """Start a command in a folder, with what it says at the end of two files, or of one."""
    given = list(map(str, arguments)), folder, dict(os.environ) | dict(environment), out, err
    child = _server.Process(target=_command, args=given)
    child.start()
    return child


def _command(arguments: list[str], folder: Path, environment: dict[str, str], out: Path, err: Path) -> None:
    """What the process does."""
    from lorasmith.trainer import cli

    for number, file in ((1, out), (2, err)):
        with file.open("ab") as opened:
            os.dup2(opened.fileno(), number)
    os.chdir(folder)
    os.environ.update(environment)
    warnings.simplefilter("error", UserWarning)
    torch.set_num_threads(1)  # models as small as the tests' lose time to a second thread
    sys.argv = ["lorasmith", *arguments]
    cli.main()
