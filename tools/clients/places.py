"""Environments of their own, in which clients are installed; what is there already is not installed again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lorasmith.trainer.errors import UserError
from lorasmith.trainer.files import write_text

Say = Callable[[str], None]

LOG = "log.txt"
_TORCH = "torch==2.13.0"


class NotAtHand(Exception):  # noqa: N818 (it is no failure)
    """A client cannot be tried on this computer; says why."""


@dataclass(frozen=True)
class Place:
    """A virtual environment: the Pythons that will do, and what is installed, one `pip install` after the other."""

    name: str
    pythons: tuple[str, ...]
    installs: tuple[tuple[str, ...], ...]


OLDER = Place(
    "older",
    ("3.10", "3.11", "3.12"),
    (
        (
            _TORCH,
            "transformers==4.54.1",
            "diffusers==0.32.1",
            "peft==0.15.2",
            "huggingface-hub==0.34.3",
            "accelerate==1.6.0",
        ),
        ("--no-deps", "lycoris-lora==4.1.3", "toml==0.10.2", "einops==0.8.2"),
    ),
)
"""A transformers that has `text_model.` in the paths of all text encoders, and a diffusers of its time; and LyCORIS,
which goes by those paths, and would bring another torch if it were asked for what it needs."""
INVOKEAI = Place(
    "invokeai",
    ("3.11", "3.12"),
    (
        # what it asks for of these; of the rest only what its LoRA code imports
        (_TORCH, "numpy==1.26.4", "diffusers==0.40.0", "transformers==5.5.4", "accelerate==1.15.0", "gguf==0.19.0"),
        ("pydantic-settings==2.16.3", "blake3==1.0.11", "picklescan==1.0.5", "deprecated==1.3.1"),
        ("--no-deps", "invokeai==6.14.2", "compel==2.4.0", "einops==0.8.2", "pyparsing==3.3.3"),
    ),
)
CYLLAMA = Place("cyllama", ("3.12", "3.13", "3.14"), (("cyllama==0.7.0",),))


def python_of(place: Place, root: Path, say: Say) -> Path:
    """The interpreter of an environment, which is made if it is not as it should be.

    Raises:
        NotAtHand: without a Python that will do.
        UserError: if something cannot be installed.
    """
    folder = root / place.name
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done, wanted = folder / "installed.json", json.dumps(place.installs, indent=1)
    if done.is_file() and done.read_text(encoding="utf-8") == wanted:
        return python
    say(f"installing {', '.join(package for part in place.installs for package in part)} in {folder}")
    commands = [[_interpreter(place), "-m", "venv", str(folder)]]
    commands += [[str(python), "-m", "pip", "install", "--quiet", *packages] for packages in place.installs]
    for command in commands:
        if subprocess.run(command, check=False).returncode:
            raise UserError("could not be installed", place.name, f"Run it to see why: {' '.join(command)}")
    write_text(done, wanted)
    return python


def _interpreter(place: Place) -> str:
    """The running Python if it will do, else one by its name on PATH."""
    if f"{sys.version_info.major}.{sys.version_info.minor}" in place.pythons:
        return sys.executable
    for version in place.pythons:
        found = shutil.which(f"python{version}")
        # pyenv has such names on PATH for versions that are not switched on
        if found and subprocess.run([found, "--version"], capture_output=True, check=False).returncode == 0:
            return found
    raise NotAtHand(f"there is no python{' or python'.join(place.pythons)} on PATH")


def run_script(python: Path, job: Mapping[str, object], script: str, folder: Path) -> list[dict[str, object]]:
    """Run a runner with a job, and return the lines of JSON that it printed, up to where it ended or died.

    It runs in a folder, offline; what it says besides goes to the end of the log there.
    """
    file = folder / "job.json"
    write_text(file, json.dumps(job, indent=1))
    settings = {"HF_HUB_OFFLINE": "1", "INVOKEAI_ROOT": str(folder / "invokeai"), "PYTHONUTF8": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | settings
    with (folder / LOG).open("a", encoding="utf-8") as errors:
        done = subprocess.run(
            [str(python), str(Path(__file__).parent / "runners" / script), str(file)],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            check=False,
        )
        print(f"{script} ended with {done.returncode}", file=errors)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
