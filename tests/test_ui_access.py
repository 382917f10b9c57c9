"""Anyone can use the page: controls have names, texts stand out, the keyboard is enough, phones are wide enough."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from lorasmith.ui.app import PAGES

from .browser import Site, open_tab, watched_page

MISSED = (Path(__file__).parent / "access.js").read_text(encoding="utf-8")


@pytest.fixture(params=["light", "dark"])
def wide_page(request: pytest.FixtureRequest, chromium: Browser, tmp_path: Path) -> Iterator[Page]:
    yield from watched_page(chromium, tmp_path, color_scheme=request.param)


@pytest.fixture
def phone_page(chromium: Browser, tmp_path: Path) -> Iterator[Page]:
    yield from watched_page(chromium, tmp_path, viewport={"width": 360, "height": 740})


def open_all(page: Page) -> None:
    """Unfold what is folded on the page that is seen."""
    for fold in page.get_by_role("tabpanel").locator("button.label-wrap:not(.open)").all():
        if fold.is_visible():
            fold.click()


@pytest.mark.timeout(1200)
def test_every_control_has_a_name_and_every_text_stands_out(trained_site: Site, wide_page: Page):
    wide_page.goto(trained_site.url)
    expect(wide_page.get_by_role("heading", level=1)).to_have_count(1)
    for title in PAGES.values():
        open_tab(wide_page, title)
        open_all(wide_page)
        wide_page.wait_for_timeout(1500)  # for what is read from disk each second
        assert wide_page.evaluate(MISSED) == {"nameless": [], "faint": [], "withoutAlt": []}, title


def test_a_phone_is_wide_enough(trained_site: Site, phone_page: Page):
    phone_page.goto(trained_site.url)
    expect(phone_page.get_by_role("heading", level=1)).to_be_visible()
    for title in PAGES.values():
        open_tab(phone_page, title)
        open_all(phone_page)
        phone_page.wait_for_timeout(1000)
        width = phone_page.evaluate("() => document.documentElement.scrollWidth")
        assert width <= 360, f"{title} is {width} px wide"
