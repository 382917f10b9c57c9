"""Ten browsers on one run while it trains: the server's memory stays flat, and each page answers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import linear_regression
from typing import Any

import psutil
from playwright.sync_api import Page

from lorasmith.trainer.config import RunConfig
from lorasmith.trainer.jobs import RunFolder
from lorasmith.trainer.queue import Queue, begin

from ..measured import Measured
from ..pages.site import chromium, page, served
from ..pages.watching import count_answers
from .material import some_images

TABS, _SECONDS = 10, 120


def many_browsers(folder: Path) -> Iterator[Measured]:
    queue, images = Queue(folder / "runs"), some_images(folder / "images")
    run = begin(_config(images, folder), queue)
    try:
        with served(queue.runs) as server, chromium() as browser, ExitStack() as pages:
            tabs = [pages.enter_context(page(browser)) for _ in range(TABS)]
            for tab in tabs:
                count_answers(tab.context)
                tab.goto(server.url)
                tab.get_by_role("tab", name="2 Train").click()
            for tab in tabs:
                tab.get_by_text(" of 100000.").first.wait_for()
            yield from _watched(tabs, server.process)
            slowest = max(map(_seconds_of_a_click, tabs))
            yield Measured(f"{TABS} tabs: a click that opens another page, the slowest", slowest, 3, "s")
    finally:
        _stop(run, queue)


def _config(images: Path, folder: Path) -> RunConfig:
    """A run that would take days."""
    values: dict[str, Any] = {
        "name": "watched",
        "data": [{"path": str(images), "trigger": "mystyle"}],
        "adapter": {"rank": 2, "alpha": 2.0},
        "budget": {"images": 100_000, "batch": 1},
        "save": {"every": 50, "keep": 2},
        "sample": {"every": 50, "steps": 2, "prompts": ["mystyle", "a cat"]},
        "runtime": {"cache": str(folder / "cache")},
    }
    return RunConfig.model_validate(values)


def _watched(tabs: Sequence[Page], server: psutil.Process) -> Iterator[Measured]:
    """The memory of the server from minute to minute, and how long the pages wait for their answers."""
    tabs[0].wait_for_timeout(30_000)  # until what is read once is read
    for tab in tabs:
        tab.evaluate("window.answered = []")
    minutes, mib = [], []
    began = time.monotonic()
    while (now := time.monotonic() - began) < _SECONDS:
        minutes.append(now / 60)
        mib.append(server.memory_info().rss / 2**20)
        tabs[0].wait_for_timeout(2_000)
    yield Measured(f"{TABS} tabs on a run that trains: what the server grows each minute",
                   linear_regression(minutes, mib).slope, 3, "MiB")  # fmt: skip
    waits = [sorted(tab.evaluate("window.answered")) for tab in tabs]
    silent = sum(not wait for wait in waits)
    yield Measured(f"{TABS} tabs: without any answer", silent, 0, "tabs")
    slowest = max(wait[9 * len(wait) // 10] for wait in waits if wait)
    yield Measured(f"{TABS} tabs: nine of ten looks of the slowest", slowest / 1000, 1, "s")


def _seconds_of_a_click(tab: Page) -> float:
    began = time.perf_counter()
    tab.get_by_role("tab", name="4 Share").click()
    tab.get_by_text("The files that others need").wait_for()
    return time.perf_counter() - began


def _stop(run: RunFolder, queue: Queue) -> None:
    if run.status().is_active:
        run.ask_to_stop()
    while queue.worker.alive():
        time.sleep(0.5)
