"""Work on many files at once: in this process for a few, in worker processes for many, in order either way."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeVar

import psutil

from ..trainer.errors import DataError

T = TypeVar("T")
Progress = Callable[[int, int], None]
"""Called with (done, total)."""

_WORTH_PROCESSES = 200
"""Starting processes takes about as long as decoding this many images."""
_MOST_PROCESSES = 8
_CHUNK = 8
_LOWER = 10
"""How much lower the priority of a worker is than that of the process that started it."""


def map_files(function: Callable[[Path], T], files: Sequence[Path], progress: Progress | None = None) -> Iterator[T]:
    """`function` of each file, in their order; it must be importable, and its results small, since they are sent over.

    Where a worker dies, which is most often because the memory is full, one alone does what is left.

    Raises:
        DataError: if that one dies too, naming the file.
    """
    report = progress or (lambda _done, _total: None)
    workers = min(os.cpu_count() or 1, _MOST_PROCESSES)
    report(0, len(files))
    if len(files) < _WORTH_PROCESSES or workers == 1:
        results = map(function, files)
        yield from _counted(results, len(files), report)
        return
    yield from _counted(_in_workers(function, files, workers), len(files), report)


def _in_workers(function: Callable[[Path], T], files: Sequence[Path], workers: int) -> Iterator[T]:
    done = 0
    try:
        with _pool(workers) as pool:
            for result in pool.map(function, files, chunksize=_CHUNK):
                done += 1
                yield result
    except BrokenProcessPool:
        with _pool(1) as pool:
            for file in files[done:]:
                yield _alone(pool, function, file)


def _alone(pool: ProcessPoolExecutor, function: Callable[[Path], T], file: Path) -> T:
    """Not in this process, which would die with a file that kills whoever reads it."""
    try:
        return pool.submit(function, file).result()
    except BrokenProcessPool as error:
        what = "the process that read it died, so the memory is full, or the file breaks its decoder"
        raise DataError(what, str(file), "Close other programs and try again, or else remove the file.") from error


def _pool(workers: int) -> ProcessPoolExecutor:
    """Spawned, as on Windows: a forked child of a process that uses torch or a server's threads may hang."""
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_give_way)


def _give_way() -> None:
    """In a worker: whoever turns the pages of the browser app meanwhile comes first."""
    if os.name == "nt":
        psutil.Process().nice(psutil.BELOW_NORMAL_PRIORITY_CLASS)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        os.nice(_LOWER)


def _counted(results: Iterator[T], total: int, report: Progress) -> Iterator[T]:
    for done, result in enumerate(results, start=1):
        yield result
        report(done, total)
