"""The server, as a person starts it, and a browser on it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from playwright.sync_api import Browser, Page, sync_playwright


@dataclass(frozen=True)
class Served:
    """A server that answers."""

    url: str
    seconds: float
    """From its start to its first answer."""
    process: psutil.Process


@contextmanager
def served(runs: Path) -> Iterator[Served]:
    """A server over a folder of runs."""
    port, began = _free_port(), time.perf_counter()
    command = [sys.executable, "-m", "lorasmith.trainer.cli", "ui", "--runs", str(runs), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while not _answers(f"http://127.0.0.1:{port}"):
            if process.poll() is not None:
                raise SystemExit("the server could not be started")
            time.sleep(0.02)
        yield Served(f"http://127.0.0.1:{port}", time.perf_counter() - began, psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def chromium() -> Iterator[Browser]:
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def page(browser: Browser, **options: Any) -> Iterator[Page]:
    context = browser.new_context(**options)
    context.set_default_timeout(120_000)
    yield context.new_page()
    context.close()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except OSError:
        return False
    return True


def _free_port() -> int:
    if given := os.environ.get("PORT"):
        return int(given)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
