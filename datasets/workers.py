"""Work on many files at once: in this process for a few, in worker processes for many, in order either way."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
Progress = Callable[[int, int], None]
"""Called with (done, total)."""

_WORTH_PROCESSES = 200
"""Starting processes takes about as long as decoding this many images."""
_MOST_PROCESSES = 8
_CHUNK = 8


def map_files(function: Callable[[Path], T], files: Sequence[Path], progress: Progress | None = None) -> Iterator[T]:
    """`function` of each file, in their order; it must be importable, and its results small, since they are sent over.

    At most a few chunks of files are under way, so that memory does not grow with their number.
    """
    report = progress or (lambda _done, _total: None)
    workers = min(os.cpu_count() or 1, _MOST_PROCESSES)
    report(0, len(files))
    if len(files) < _WORTH_PROCESSES or workers == 1:
        results = map(function, files)
        yield from _counted(results, len(files), report)
        return
    # spawned, as on Windows: a forked child of a process that uses torch or a server's threads may hang
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from _counted(pool.map(function, files, chunksize=_CHUNK), len(files), report)


def _counted(results: Iterator[T], total: int, report: Progress) -> Iterator[T]:
    for done, result in enumerate(results, start=1):
        yield result
        report(done, total)
