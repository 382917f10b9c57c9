"""`make audit`: ask which of the pinned versions have known holes, on whichever system they are installed.

pip-audit asks PyPI; AUDIT="--vulnerability-service osv" asks osv.dev. It fails if one has a hole, or could not be
asked for.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from .lock.pins import pins_of


def main(arguments: list[str]) -> int:
    with TemporaryDirectory() as folder:
        listing = Path(folder, "installed.txt")
        listing.write_text(installed(), encoding="utf-8")
        command = [sys.executable, "-m", "pip_audit", "--strict", "--disable-pip", "--requirement", str(listing)]
        return subprocess.run([*command, *arguments]).returncode


def installed() -> str:
    """Every package at the version that stays; without markers, or other systems would be left out."""
    texts = (Path("requirements", f"{name}.txt").read_text(encoding="utf-8") for name in ("hashes", "over"))
    stays = {pin.name: replace(pin, marker="") for text in texts for pin in pins_of(text)}
    return "".join(pin.block for pin in stays.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
