"""How quick the page is: to its first paint, in a second's look at a long run, and over a folder of many images."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Page

from lorasmith.trainer.config import RunConfig
from lorasmith.trainer.configfile import write_config
from lorasmith.trainer.events import EventLog, PlanMade, Step
from lorasmith.trainer.jobs import RunFolder

from ..measured import Measured
from .site import Served, chromium, page, served
from .watching import answers, count_answers, load_of

STEPS, IMAGES = 5_000, 500
_SECONDS = 20
"""How long a page is watched for each number of what it costs."""


def measure_speed(folder: Path) -> Iterator[Measured]:
    """Each number as it is known."""
    shutil.rmtree(folder, ignore_errors=True)
    images, runs = folder / "images", folder / "runs"
    _many_images(images)
    run = _long_run(runs / "long")
    with served(runs) as server, chromium() as browser, page(browser) as shown:
        yield Measured("start of the server, until it answers", server.seconds, 3, "s")
        count_answers(shown.context)
        yield from _first_paint(shown, server)
        shown.wait_for_timeout(10_000)  # it looks less often by and by
        yield from _costs(shown, server, "no run trains", 0.1, 0.3)
        run.take_ownership()
        try:
            yield from _ticks(shown, server)
        finally:
            run.give_up_ownership()
        yield from _paging(shown, images)


def _first_paint(shown: Page, server: Served) -> Iterator[Measured]:
    began = time.perf_counter()
    shown.goto(server.url)
    shown.get_by_role("heading", level=1).wait_for()
    there = time.perf_counter() - began
    painted = shown.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime") / 1000
    yield Measured("a page's first paint", painted, 3, "s")
    yield Measured("its header stands there", there, 3, "s")
    shown.get_by_text("interrupted").first.wait_for()


def _ticks(shown: Page, server: Served) -> Iterator[Measured]:
    """With a run that trains, as far as its folder tells: this process owns it."""
    shown.get_by_role("tab", name="2 Train").click()
    shown.get_by_text(f"Step {STEPS}").first.wait_for()
    shown.wait_for_timeout(5_000)  # for the plots
    took = sorted(answers(shown, _SECONDS))
    what = f"a look at a run of {STEPS:,} steps"
    yield Measured(f"{what}, half of all", took[len(took) // 2], 0.1, "s")
    yield Measured(f"{what}, nine of ten, also while plots are drawn", took[9 * len(took) // 10], 0.5, "s")
    yield from _costs(shown, server, "a run is watched", 0.2, 0.5)


def _costs(shown: Page, server: Served, when: str, most_own: float, most_browser: float) -> Iterator[Measured]:
    own, browser = load_of(shown, server.process, _SECONDS)
    yield Measured(f"work of the server for one page each second, {when}", own, most_own, "s")
    yield Measured(f"work of the browser each second, {when}", browser, most_browser, "s")


def _paging(shown: Page, images: Path) -> Iterator[Measured]:
    shown.get_by_role("tab", name="1 Images").click()
    box = shown.get_by_label("Folder of images")
    box.fill(str(images))
    began = time.perf_counter()
    box.press("Enter")
    cards = shown.locator(".cards img")
    cards.nth(23).wait_for()
    yield Measured(f"a folder of {IMAGES} images, until its first 24 cards", time.perf_counter() - began, 3, "s")
    yield Measured("the next 24, while the images are still looked at", _turned(shown), 3, "s")
    shown.get_by_text("Nothing stops training").wait_for()
    shown.wait_for_timeout(5_000)  # for what is told of the findings, and the next thumbnails
    took = sorted(_turned(shown) for _ in range(5))
    yield Measured("each further 24, half of all", took[len(took) // 2], 1, "s")


def _turned(shown: Page) -> float:
    """Seconds until the next page of cards is there."""
    before = shown.locator(".cards img").first.get_attribute("src")
    began = time.perf_counter()
    shown.get_by_role("button", name="Next page").first.click()
    shown.wait_for_function(
        "before => (document.querySelector('.cards img')?.getAttribute('src') ?? before) !== before", arg=before
    )
    took = time.perf_counter() - began
    shown.wait_for_timeout(1_000)  # as a person looks at them
    return took


def _many_images(folder: Path) -> None:
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(IMAGES):
        small = random.integers(0, 256, (12, 16, 3), np.uint8)
        picture = Image.fromarray(small).resize((1024, 768), Image.Resampling.BICUBIC)
        picture.save(folder / f"{number:03d}.jpg", quality=90)
        (folder / f"{number:03d}.txt").write_text(f"pattern {number} of colours\n", encoding="utf-8")


def _long_run(path: Path) -> RunFolder:
    run = RunFolder(path)
    path.mkdir(parents=True)
    write_config(RunConfig.model_validate({"name": path.name, "data": [{"path": "images"}]}), run.config)
    log = EventLog(run.events)
    log.append(PlanMade(2 * STEPS, 8 * STEPS))
    for step in range(1, STEPS + 1):
        log.append(Step(step, 4 * step, 0.1 + 1 / step, 0.5, {"unet": 1e-4}, 0.5))
    return run
