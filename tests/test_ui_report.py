"""A report from the page: asked for by a button, written by a process of its own, and downloaded as it was written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import psutil
import pytest
from playwright.sync_api import Browser, Page, expect

from lorasmith.trainer.errors import RunError
from lorasmith.trainer.jobs import RunFolder
from lorasmith.ui.context import Context
from lorasmith.ui.train.reporting import report_html, report_news, reports_of, save_report
from lorasmith.ui.train.running import pulse, view

from .browser import Site, open_tab, watched_page

TITLES = [
    *("Dataset", "Plan and settings", "Training", "Samples over time", "Which checkpoint, which strength"),
    *("What leaks", "Exports", "Environment", "To repeat it"),
]


@pytest.fixture
def run(seen_run: Path, tmp_path: Path) -> RunFolder:
    shutil.copytree(seen_run, tmp_path / "runs" / "seen")
    return RunFolder(tmp_path / "runs" / "seen")


@pytest.mark.timeout(600)
def test_a_report_is_written_downloaded_and_opened(trained_site: Site, page: Page, chromium: Browser, tmp_path: Path):
    page.goto(f"{trained_site.url}/?run=seen")
    open_tab(page, "2 Train")
    expect(page.get_by_role("button", name="Save a report")).to_be_visible()
    expect(page.get_by_role("link", name="Download the report")).to_have_count(0)
    page.get_by_role("button", name="Save a report").press("Enter")
    link = page.get_by_role("link", name="Download the report")
    expect(page.get_by_role("status").filter(has=link)).to_contain_text("Download the report of seen")
    with page.expect_download() as downloading:
        link.click()
    assert downloading.value.suggested_filename == "seen-report.html"
    downloading.value.save_as(tmp_path / "seen-report.html")
    assert (tmp_path / "seen-report.html").read_bytes() == (trained_site.run("seen").path / "report.html").read_bytes()

    for opened in watched_page(chromium, tmp_path, java_script_enabled=False):  # it holds no script, and needs none
        opened.route("http*://**", lambda asked: pytest.fail(f"it asks for {asked.request.url}"))
        opened.goto((tmp_path / "seen-report.html").as_uri())
        expect(opened.get_by_role("heading", level=1)).to_contain_text("seen")
        assert [title.inner_text() for title in opened.get_by_role("heading", level=2).all()] == TITLES
        expect(opened.get_by_role("img", name="trained: emoji of a cat")).to_be_visible()


def test_a_report_is_offered_once_it_is_whole(run: RunFolder):
    before = report_news(run)
    assert report_html(run) == ""
    assert save_report(run) == "A report of seen was asked for."
    with pytest.raises(RunError, match="a report of this run is under way"):
        save_report(run)
    assert "Writing the report since" in report_html(run)
    assert "/reports/" not in report_html(run)
    assert report_news(run) != before
    assert reports_of(run).wait().answer.strip() == str(run.path / "report.html")
    assert "/reports/seen?v=" in report_html(run)


def test_the_panel_looks_again_when_a_report_is_there(run: RunFolder):
    context = Context.of(run.path.parent)
    context.planner.close()
    before = pulse(context, "seen")
    assert view(context, "seen")["report"][0] == ""
    (run.path / "report.html").write_text("<!doctype html>", encoding="utf-8")  # as by the command
    assert pulse(context, "seen") != before
    assert "Download the report" in view(context, "seen")["report"][0]


def test_a_report_that_fails_says_why_and_the_earlier_one_stays(run: RunFolder):
    (run.path / "report.html").write_text("<!doctype html>", encoding="utf-8")
    run.config.write_text("name = <script>", encoding="utf-8")
    save_report(run)
    assert reports_of(run).wait().answer == ""
    told = report_html(run)
    assert "the report was not written" in told
    assert "config.toml" in told
    assert "<script>" not in told
    assert "Download the report" in told


def test_a_report_that_was_killed_is_told(run: RunFolder):
    save_report(run)
    psutil.Process(json.loads((run.path / ".report/process.json").read_text())["pid"]).kill()
    reports_of(run).wait()
    assert "ended before its time" in report_html(run)
    assert "Download the report" not in report_html(run)
