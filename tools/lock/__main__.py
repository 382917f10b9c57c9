"""Write requirements/ from constraints.txt and pyproject.toml."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import tomlkit

from .files import texts_of
from .pins import Pin, merged, pins_of, require_same, with_further

_OLDEST_PYTHON = "3.11"
"""Several packages have left 3.10 in these versions."""


def main() -> None:
    project = tomlkit.parse(Path("pyproject.toml").read_text(encoding="utf-8")).unwrap()
    beside = ["pip", *project["build-system"]["requires"]]
    options = ("--all-extras", "--group", "supply", "--constraint", "constraints.txt", "pyproject.toml")
    needed = _compiled(beside, *options)
    over = _compiled(project["dependency-groups"]["over"], "--no-deps")
    try:
        require_same(_read("constraints.txt"), needed)
        elsewhere = merged(_read("tools/lock/elsewhere.txt"))
        texts = texts_of(project, with_further(needed, elsewhere), over, elsewhere)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    for name, text in texts.items():
        Path("requirements", f"{name}.txt").write_text(text, encoding="utf-8", newline="\n")


def _read(file: str) -> list[Pin]:
    return pins_of(Path(file).read_text(encoding="utf-8"))


def _compiled(requirements: list[str], *options: str) -> list[Pin]:
    """What is needed of them, on whichever system and Python, with the hashes that PyPI tells."""
    command = [
        *(sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-config", "--no-header", "--no-annotate"),
        *("--universal", "--python-version", _OLDEST_PYTHON, "--only-binary", ":all:", "--generate-hashes"),
        *("--default-index", "https://pypi.org/simple", *options, "-"),
    ]
    done = subprocess.run(command, input="\n".join(requirements), stdout=subprocess.PIPE, encoding="utf-8")
    if done.returncode:
        raise SystemExit(done.returncode)
    return pins_of(done.stdout)


if __name__ == "__main__":
    main()
