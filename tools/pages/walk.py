"""The whole story, timed: a folder, captions, 200 steps on the embedded base, a wall, a choice, verified files.

Once as a person walks it in the browser, and once as another program does by the named endpoints.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gradio_client import Client
from playwright.sync_api import Page

from lorasmith.trainer.example import EXAMPLES, STYLE, TRIGGER

from .site import chromium, page, served

STEPS, BATCH = 200, 8
_MINUTES = 10 * 60 * 1000
_SETTINGS = {
    "budget": {"images": STEPS * BATCH, "batch": BATCH},
    "optimizer": {"lr": 7e-4, "text_encoder_lr": 2e-4},
    "save": {"every": 100},
    "sample": {"every": 100, "steps": 20, "guidance": 2.5},
}


def walk(folder: Path) -> Iterator[tuple[str, float]]:
    """What was done, and its seconds; the files are then in `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    images, runs = folder / "images", folder / "runs"
    shutil.copytree(EXAMPLES / STYLE, images)
    with served(runs) as server:
        with chromium() as browser, page(browser, accept_downloads=True) as shown:
            yield from _timed("in the browser", _in_the_browser(shown, server.url, images, folder))
        yield from _timed("by the endpoints", _by_the_endpoints(server.url, images))


def _timed(where: str, story: Iterator[str]) -> Iterator[tuple[str, float]]:
    began = before = time.perf_counter()
    for chapter in story:
        now = time.perf_counter()
        yield f"{where}: {chapter}", now - before
        before = now
    yield f"{where}: all of it", before - began


# -- in the browser ---------------------------------------------------------------------------------------------------


def _in_the_browser(shown: Page, url: str, images: Path, folder: Path) -> Iterator[str]:
    shown.goto(url)
    box = shown.get_by_label("Folder of images")
    box.fill(str(images))
    box.press("Enter")
    shown.get_by_role("textbox", name=re.compile("^Caption of")).first.wait_for()
    shown.get_by_label("Trigger word").fill(TRIGGER)
    _press(shown, "Change many captions at once")
    _press(shown, "Preview")
    _press(shown, "Apply")
    shown.get_by_role("button", name="Undo").first.wait_for()
    yield "the folder, and the trigger in front of each caption"

    _press(shown, "Go on to Train")
    name = shown.get_by_role("textbox", name=re.compile(r"^Name\b"))
    name.fill("walked")
    name.blur()
    _press(shown, "The same as a file, and as a command")
    document = shown.get_by_role("textbox", name=re.compile("^Configuration"))
    shown.wait_for_function(
        "() => [...document.querySelectorAll('textarea')].some(t => t.value.includes('name = \"walked\"'))"
    )
    document.fill(_with_settings(document.input_value()))
    document.blur()
    shown.get_by_text(f": {STEPS} steps of at most {BATCH} images").filter(visible=True).first.wait_for()
    _press(shown, "Start training")
    yield "the plan"

    shown.get_by_text(f"Done, {STEPS} steps.").first.wait_for(timeout=_MINUTES)
    yield f"{STEPS} steps, previews, export and verification"

    shown.get_by_role("tab", name="3 Compare").click()
    strengths = shown.get_by_role("textbox", name="Strengths")
    strengths.fill("0.8, 1")
    strengths.blur()
    _press(shown, "Draw")
    pick = shown.get_by_role("button", name=f"Pick step {STEPS} at 1", exact=True)
    shown.get_by_text("pictures of this wall are there").wait_for(timeout=_MINUTES)
    pick.click()
    _press(shown, "Use this one")
    shown.get_by_text(f"Chosen: step {STEPS} at 1.").wait_for()
    shown.screenshot(path=folder / "wall.png")
    yield "a wall of checkpoints and strengths, and the choice"

    _press(shown, "Go on to Share")
    _press(shown, "Export and verify")
    shown.get_by_text(re.compile("wrote and verified")).wait_for(timeout=_MINUTES)
    shown.screenshot(path=folder / "verified.png", full_page=True)
    yield "the files, and the table that shows that each client reads them"


def _press(shown: Page, name: str) -> None:
    shown.get_by_role("button", name=name, exact=True).or_(shown.get_by_role("button", name=f"{name} ▼")).first.click()


def _with_settings(document: str) -> str:
    """The form's file with these settings in place of its own."""
    for table, values in _SETTINGS.items():
        for key, value in values.items():
            line = f"{key} = {value}"
            head, found, rest = document.partition(f"[{table}]\n")
            if not found:
                document = f"{document.rstrip()}\n\n[{table}]\n{line}\n"
                continue
            own, _, others = rest.partition("\n[")
            own, replaced = re.subn(rf"(?m)^{key} = .*$", line, own)
            own = own if replaced else f"{line}\n{own}"
            document = f"{head}{found}{own}" + (f"\n[{others}" if others else "")
    return document


# -- by the endpoints -------------------------------------------------------------------------------------------------


def _by_the_endpoints(url: str, images: Path) -> Iterator[str]:
    client = Client(url, verbose=False)
    settings = [f"{table}.{key}={value}" for table, values in _SETTINGS.items() for key, value in values.items()]
    answers = (str(images), "pocket", "called", TRIGGER)
    planned = client.predict(*answers, settings=settings, api_name="/plan")
    assert planned["steps"] == STEPS, planned
    yield "the plan"
    client.predict(*answers, settings=settings, api_name="/train")
    _until(lambda: client.predict("called", api_name="/status"))
    yield f"{STEPS} steps, previews, export and verification"
    client.predict("called", [f"{TRIGGER} emoji of owl"], step=STEPS, strength=0.8, api_name="/sample")
    yield "a picture"
    exported = client.predict("called", step=STEPS, strength=0.8, api_name="/export")
    assert exported["verified"], exported
    yield "the files, verified"


def _until(status: Callable[[], dict[str, Any]]) -> None:
    while (stands := status())["state"] != "done":
        if stands["state"] in ("failed", "interrupted"):
            raise SystemExit(stands["sentence"])
        time.sleep(0.5)
