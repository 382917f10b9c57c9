"""A real `lorasmith ui` process and a real Chromium, for tests of the browser app.

A page fails its test at the end if the console told an error, if anything was asked of another machine, or if the
server answered with an error of its own.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from gradio_client import Client
from playwright.sync_api import Browser, ConsoleMessage, Page, Playwright, expect, sync_playwright

from lorasmith.trainer.config import RunConfig
from lorasmith.trainer.errors import RunError
from lorasmith.trainer.jobs import RunFolder, find_runs
from lorasmith.trainer.queue import Queue

from .command import start
from .conftest import draw_picture

CHROMIUM = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)
SECONDS = 240
"""The longest that anything on a page may take, on a busy machine."""
expect.set_options(timeout=SECONDS * 1000)


@dataclass
class Site:
    """A server over a folder of runs, and a folder of captioned images."""

    runs: Path
    images: Path
    options: tuple[str, ...] = ()
    port: int = field(default_factory=lambda: free_port())
    process: BaseProcess | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        return self.runs.parent / "ui.log"

    def run(self, name: str) -> RunFolder:
        return RunFolder(self.runs / name)

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        environment = {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(self.runs.parent / "cache")}
        command = ["ui", "--runs", self.runs, "--port", self.port, *self.options]
        self.process = start(command, Path.cwd(), self.log, self.log, environment)
        try:
            wait_until(self.answers, "the server answers")
        except BaseException:
            self.kill()
            raise

    def answers(self) -> bool:
        assert self.process is not None
        assert self.process.is_alive(), self.log.read_text()
        try:
            urllib.request.urlopen(self.url, timeout=5).close()
        except urllib.error.HTTPError as error:
            error.close()
            return error.code == 401
        except OSError:
            return False
        return True

    def kill(self) -> None:
        """As if the computer had taken it away (SIGKILL)."""
        if self.process is not None:
            self.process.kill()
            self.process.join(30)
            self.process = None

    def client(self) -> Client:
        return Client(self.url, verbose=False)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    yield from empty_site(tmp_path)


def empty_site(folder: Path) -> Iterator[Site]:
    """A site without runs."""
    made = Site(folder / "runs", folder / "images")
    made.runs.mkdir()
    six_images(made.images)
    made.start()
    yield made
    close(made)


@pytest.fixture
def trained_site(tmp_path: Path, seen_run: Path) -> Iterator[Site]:
    """A site whose run "seen" is trained and exported."""
    made = Site(tmp_path / "runs", tmp_path / "images")
    six_images(made.images)
    shutil.copytree(seen_run, made.runs / "seen")
    made.start()
    yield made
    close(made)


@pytest.fixture(scope="session")
def seen_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with checkpoints and previews at 0, 2 and 4, and its files."""
    from lorasmith.trainer import run
    from lorasmith.trainer.plan import make_plan

    folder = tmp_path_factory.mktemp("seen")
    six_images(folder / "images")
    config = RunConfig.model_validate(
        {
            "name": "seen",
            "runs": str(folder / "runs"),
            "data": [{"path": str(folder / "images"), "trigger": "trg"}],
            "budget": {"images": 8, "batch": 2},
            "save": {"every": 2},
            "sample": {"every": 2, "steps": 2, "prompts": ["trg, emoji of a red circle", "emoji of a cat"]},
        }
    )
    return run.train(make_plan(config), lambda event: None).run.path


@pytest.fixture(scope="session")
def _playwright() -> Iterator[Playwright]:
    with sync_playwright() as started:
        yield started


@pytest.fixture(scope="session")
def chromium(_playwright: Playwright) -> Iterator[Browser]:
    if CHROMIUM is None and not os.environ.get("CI"):
        pytest.skip("there is no chromium on this computer")
    browser = _playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
    yield browser
    browser.close()


@pytest.fixture
def page(chromium: Browser, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Page]:
    yield from watched_page(chromium, tmp_path)


def watched_page(browser: Browser, folder: Path, **options: Any) -> Iterator[Page]:
    """A page of its own session, which fails at the end if it asked elsewhere or heard of an error."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
    context.set_default_timeout(SECONDS * 1000)
    is_traced = "LORASMITH_TRACE" in os.environ  # recording takes more than the tests themselves
    if is_traced:
        context.tracing.start(screenshots=True, snapshots=True)
    page, wrong = context.new_page(), []
    page.on("console", lambda said: wrong.append(f"console: {said.text}") if _is_told_error(said) else None)
    page.on("pageerror", lambda error: wrong.append(f"script: {error}"))
    page.on("request", lambda asked: wrong.append(f"asked {asked.url}") if not _is_local(asked.url) else None)
    page.on("response", lambda got: wrong.append(f"{got.status} {got.url}") if got.status >= 500 else None)
    yield page
    if is_traced:
        context.tracing.stop(path=folder / "trace.zip")
    page.screenshot(path=folder / "last.png", full_page=True)
    context.close()
    assert not wrong, wrong


def _is_told_error(said: ConsoleMessage) -> bool:
    """An error of the page; not that of a request which a reload has cut off, nor that of a stream of answers which
    Gradio's server has closed meanwhile."""
    cut_off = r"AbortError|Connection errored out|^Unexpected error 404: Not Found$"
    return said.type == "error" and not re.search(cut_off, said.text)


def _is_local(url: str) -> bool:
    scheme, host = urlsplit(url).scheme, urlsplit(url).hostname
    return scheme in ("data", "blob", "about", "file") or host in ("127.0.0.1", "localhost")


def open_tab(page: Page, title: str) -> None:
    """Show a tab; a click that comes before the page listens is made again. Narrow screens fold the last away."""
    expect(page.get_by_role("tab").first).to_be_visible()
    tab = page.get_by_role("tab", name=title)

    def is_open() -> bool:
        if tab.is_visible():
            tab.click()
        else:
            page.get_by_role("button", name="More tabs").first.click()  # a page may have tabs of its own
            page.get_by_role("button", name=title).click()
        return tab.get_attribute("aria-selected") == "true"

    wait_until(is_open, f"{title} is open")


def wait_until(condition: Any, what: str, seconds: float = SECONDS) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited too long until {what}"
        time.sleep(0.2)


def six_images(folder: Path) -> None:
    folder.mkdir()
    for number, name in enumerate(["circle", "square", "star", "heart", "arrow", "sun"]):
        draw_picture(number, [(160, 128), (128, 128), (96, 144)][number % 3]).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"emoji of a {name}\n", encoding="utf-8")


def close(site: Site) -> None:
    """Let nothing wait, stop what trains, then the server."""
    queue = Queue(site.runs)
    try:
        _stop_all(site, queue)
    finally:
        site.kill()
        end_painter(site.runs)


def _stop_all(site: Site, queue: Queue) -> None:
    for entry in queue.waiting():
        queue.remove(entry.name)
    for run in find_runs(site.runs):
        with suppress(RunError):  # it does not train
            run.ask_to_stop()
        wait_until(lambda run=run: not run.status().is_active, f"{run.name} has stopped")
    wait_until(lambda: not queue.worker.alive(), "the queue's worker has ended")


def end_painter(runs: Path) -> None:
    """It would wait for more orders."""
    for process in psutil.process_iter(["cmdline"]):
        if {"paint", str(runs)} <= set(process.info["cmdline"] or []):
            with suppress(psutil.Error):  # it ends just now
                process.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
