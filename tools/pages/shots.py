"""Each page as a picture: wide and on a phone, light and dark."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page

from lorasmith.trainer.example import STYLE
from lorasmith.ui.app import PAGES

from .site import chromium, page, served

SCREENS = {"wide": {"width": 1280, "height": 1280}, "phone": {"width": 360, "height": 740}}
_QUALITY = 88


def take_shots(runs: Path, out: Path) -> Iterator[Path]:
    """Write `<page>-<screen>-<light or dark>.webp`, and yield each."""
    _train_the_example(runs)
    out.mkdir(parents=True, exist_ok=True)
    with served(runs) as server, chromium() as browser:
        for screen, size in SCREENS.items():
            for scheme in ("light", "dark"):
                with page(browser, viewport=size, color_scheme=scheme, reduced_motion="reduce") as shown:
                    shown.goto(f"{server.url}/?run={STYLE}")
                    shown.get_by_role("heading", level=1).wait_for()
                    for name, title in PAGES.items():
                        _go_to(shown, title)
                        _PREPARED[name](shown)
                        yield _save(shown, out / f"{name}-{screen}-{scheme}.webp")


def _train_the_example(runs: Path) -> None:
    if not (runs / STYLE / "exports").is_dir():
        command = [sys.executable, "-m", "lorasmith.trainer.cli", "demo", "--out", str(runs)]
        subprocess.run(command, check=True)


def _go_to(shown: Page, title: str) -> None:
    tab = shown.get_by_role("tab", name=title)
    if not tab.is_visible():  # narrow screens fold the last ones into a menu
        shown.get_by_role("button", name="More tabs").first.click()  # a page may have tabs of its own
        tab = shown.get_by_role("button", name=title)
    tab.click()
    shown.wait_for_timeout(2500)  # for what is read from disk each second


def _images(shown: Page) -> None:
    use = shown.get_by_role("button", name="Use the example images")
    if use.is_visible():
        use.click()
    shown.get_by_role("textbox", name="Caption of").first.wait_for()
    shown.get_by_text("things to look at").or_(shown.get_by_text("Nothing stops training")).first.wait_for()


def _train(shown: Page) -> None:
    """The run that is shown, not the form for the next one."""
    shown.get_by_role("button", name="New run ▼").click()
    shown.get_by_role("img", name="step 0").first.wait_for()


def _compare(shown: Page) -> None:
    """A wall whose pictures are there, with their scores."""
    shown.get_by_role("button", name="Draw", exact=True).click()
    shown.get_by_role("button", name="Use the recommended one").wait_for(timeout=1_800_000)
    shown.get_by_role("img", name="step 300").first.wait_for()
    shown.locator("table.grid").last.evaluate("table => table.scrollIntoView({block: 'start'})")


def _share(shown: Page) -> None:
    shown.get_by_role("button", name="Export and verify").wait_for()


_PREPARED = {"images": _images, "train": _train, "compare": _compare, "share": _share}


def _save(shown: Page, file: Path) -> Path:
    raw = file.with_suffix(".png")
    shown.wait_for_timeout(2000)
    shown.screenshot(path=raw)
    with Image.open(raw) as picture:
        picture.convert("RGB").save(file, "WEBP", quality=_QUALITY, method=6)
    raw.unlink()
    return file
