"""A run is a process and a folder of its own: whatever happens to pages and server, it goes on, and is found again."""

from __future__ import annotations

import json
import re
from typing import Any

import psutil
from gradio_client import Client
from playwright.sync_api import Browser, Page, expect

from lorasmith.trainer.config import RunConfig
from lorasmith.trainer.configfile import write_config

from .browser import SECONDS, Site, open_tab, wait_until, watched_page

_LONG = ["budget.images=4000", "budget.batch=2", "save.every=5", "sample.every=0", "adapter.rank=2", "adapter.alpha=2"]


def begin(site: Site, name: str = "long", settings: list[str] = _LONG) -> Client:
    """Start a run that takes long, and wait until it trains."""
    client = site.client()
    client.predict(str(site.images), "pocket", name, "trg", settings=settings, api_name="/train")
    wait_until(lambda: told(client, name)["step"] >= 2, "it trains")
    return client


def told(client: Client, name: str) -> dict[str, Any]:
    return client.predict(name, api_name="/status")


def step_on(page: Page) -> int:
    """The step that the header tells."""
    sentence = page.get_by_text(re.compile(r"Step \d+ of \d+")).first
    expect(sentence).to_be_visible(timeout=SECONDS * 1000)
    found = re.search(r"Step (\d+) of", sentence.inner_text())
    assert found
    return int(found[1])


def test_reloads_other_tabs_and_a_killed_server_leave_the_run_alone(
    site: Site, chromium: Browser, page: Page, tmp_path
):
    begin(site)
    page.goto(site.url)
    first = step_on(page)

    page.reload()
    assert step_on(page) >= first
    for other in watched_page(chromium, tmp_path / "other"):  # another browser
        other.goto(f"{site.url}/?run=long")
        assert step_on(other) >= first
    before = step_on(page)
    wait_until(lambda: step_on(page) > before, "the page goes on by itself")


def test_a_browser_with_more_tabs_than_lines_follows_in_all_of_them(site: Site, chromium: Browser):
    with chromium.new_context() as browser:
        browser.set_default_timeout(SECONDS * 1000)
        tabs = [browser.new_page() for _ in range(7)]
        for tab in tabs:
            tab.goto(site.url)
            expect(tab.get_by_text("There are no runs yet.")).to_be_visible()
        run = site.run("late")
        run.path.mkdir()
        write_config(RunConfig.model_validate({"name": "late", "data": [{"path": str(site.images)}]}), run.config)
        for tab in tabs:
            tab.bring_to_front()
            expect(tab.get_by_text("There are no runs yet.")).to_be_hidden()


def test_a_run_outlives_the_server_and_is_found_again(site: Site, chromium: Browser, tmp_path):
    client = begin(site)
    before, trainer = told(client, "long")["step"], _trainer_of(site, "long")
    site.kill()
    wait_until(lambda: site.run("long").status().step > before, "the run goes on without a server")
    assert psutil.pid_exists(trainer)
    site.start()
    for page in watched_page(chromium, tmp_path):
        page.goto(site.url)
        assert step_on(page) > before
    assert _trainer_of(site, "long") == trainer
    site.client().predict("long", api_name="/stop")
    wait_until(lambda: site.run("long").status().state == "stopped", "it has stopped")


def test_a_killed_trainer_reads_interrupted_and_resumes(site: Site, page: Page):
    client = begin(site)
    wait_until(lambda: told(client, "long")["saved_step"] >= 5, "there is a checkpoint")
    page.goto(site.url)
    psutil.Process(_trainer_of(site, "long")).kill()
    expect(page.get_by_text(re.compile("interrupted")).first).to_be_visible(timeout=60_000)
    status = told(client, "long")
    assert status["state"] == "interrupted"
    open_tab(page, "2 Train")
    page.get_by_role("button", name="Resume").click()
    wait_until(lambda: told(client, "long")["state"] == "training", "it goes on", 2 * SECONDS)
    wait_until(lambda: told(client, "long")["step"] > status["saved_step"], "it takes further steps", 2 * SECONDS)


def _trainer_of(site: Site, name: str) -> int:
    """The process that trains a run."""
    return json.loads(site.run(name).owner_file.read_text(encoding="utf-8"))["pid"]
