"""`python tools/install.py`: make .venv, and install Lorasmith into it with what it needs, each file by its hash.

pip takes nothing that is not in requirements/. The project itself has no hash, so it comes last, and brings nothing.
What .venv holds already stays, such as a PyTorch for one's own graphics card. Where pip's settings name a folder with a
PyTorch without CUDA (PIP_FIND_LINKS), that is taken, for it needs a twentieth of the room.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dev", action="store_true", help="what the tests need as well")
    parser.add_argument(
        "--copy", action="store_true", help="install as users get it, in place of a link to this folder"
    )
    arguments = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036 (whoever reads this has not installed it)
        raise SystemExit(
            "The versions in requirements/ need Python 3.11 or newer: py -3.11 tools/install.py, or the like."
        )
    is_new = not PYTHON.exists()
    if is_new:
        run(sys.executable, "-m", "venv", str(VENV))
    pip("--quiet", "-r", "requirements/pip.txt")
    if is_new:
        take_small_torch()
    pip("-r", "requirements/dev.txt" if arguments.dev else "requirements/run.txt")
    pip("--quiet", "--no-deps", "--no-warn-conflicts", "-r", "requirements/over.txt")
    pip("--quiet", "--no-deps", "--no-build-isolation", *((".",) if arguments.copy else ("--editable", ".")))


def take_small_torch() -> None:
    """pip itself would rather take PyPI's, whose hash the index tells; of a folder it must read the file."""
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "-r", "requirements/cpu.txt"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode and "No matching distribution" not in done.stderr:
        raise SystemExit(done.stderr)


def pip(*arguments: str) -> None:
    run(str(PYTHON), "-m", "pip", "install", *arguments)


def run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT)
    if done.returncode:
        raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
