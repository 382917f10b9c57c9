"""`python -m tools.fuzz.one TARGET ...`: one target under atheris, as `tools.fuzz` starts it; what follows it is
libFuzzer's.

A finding is kept, and the search goes on, so that one does not hide the next. What ends this process is kept by
libFuzzer: a hang, memory that grows without end, a crash of a library in C.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from random import Random

import atheris  # pyright: ignore[reportMissingImports, reportMissingModuleSource]: see requirements.txt

with atheris.instrument_imports(include=["lorasmith"]):  # pyright: ignore[reportAttributeAccessIssue]
    from .targets import TARGETS, Target

from .mutations import mutated


def fuzz(target: Target, found: Path, options: list[str]) -> None:
    """Search until libFuzzer ends the process."""
    folder = Path(tempfile.mkdtemp())
    path = target.prepare(folder)
    seeds = list(target.seeds(folder).values())
    known: set[str] = set()

    def meet(content: bytes) -> None:
        try:
            target.meet(path, content)
        except Exception as error:
            place = place_of(error)
            if place not in known:
                known.add(place)
                (found / place).write_bytes(content)
                (found / f"{place}.txt").write_text("".join(traceback.format_exception(error)), encoding="utf-8")

    def mutate(content: bytes, most: int, seed: int) -> bytes:
        random = Random(seed)
        changed = mutated(content, seeds, random) if random.randrange(2) else atheris.Mutate(content, most)
        return changed[:most]

    atheris.Setup([sys.argv[0], *options], meet, custom_mutator=mutate)
    atheris.Fuzz()


def place_of(error: Exception) -> str:
    """The kind of an error and the function of ours that let it out: what makes one finding differ from another."""
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if not {"tools", "site-packages"} & {*Path(f.filename).parts}
    ]
    where = f"{Path(frames[-1].filename).stem}.{frames[-1].name}" if frames else "nowhere"
    return f"{type(error).__name__} in {where}".replace("<", "").replace(">", "")


if __name__ == "__main__":
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", module=r"PIL\.")  # as datasets/images.py has it
    logging.disable()
    fuzz(TARGETS[sys.argv[1]], Path(sys.argv[2]), sys.argv[3:])
