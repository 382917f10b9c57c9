"""The header: which run is shown, where it stands, and what this computer trains with; and that it opens at once."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from gradio.state_holder import SessionState, StateHolder
from playwright.sync_api import Page, Request, expect

from lorasmith.trainer.config import RunConfig
from lorasmith.trainer.errors import UserError
from lorasmith.trainer.events import Done, EventLog, PlanMade, Step, Stopped
from lorasmith.trainer.jobs import RunFolder, create_run
from lorasmith.ui.app import Page as Shell
from lorasmith.ui.app import look
from lorasmith.ui.context import Context, as_news, changed_at, told
from lorasmith.ui.device import device_line
from lorasmith.ui.html import chip, notice, problems, table
from lorasmith.ui.pacing import OFTEN, SELDOM, next_look

from .browser import Site, open_tab, wait_until


@pytest.fixture
def context(tmp_path: Path):
    made = Context.of(tmp_path / "runs")
    yield made
    made.planner.close()


def a_run(context: Context, name: str, *events: Any) -> RunFolder:
    config = RunConfig.model_validate({"name": name, "runs": str(context.runs), "data": [{"path": "images"}]})
    run = create_run(config)
    log = EventLog(run.events)
    for event in events:
        log.append(event)
    return run


def a_step(number: int) -> Step:
    return Step(number, 2 * number, 0.5, 0.1, {"unet": 1e-4}, 0.1)


def test_the_page_needs_neither_torch_nor_diffusers():
    said = subprocess.run([sys.executable, "-c", _SERVER], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["False", "False", "True", "True"]


_SERVER = """
import inspect, sys
from lorasmith.ui.quickly import without_stubs
before = inspect.getfile
with without_stubs():
    import lorasmith.ui.server, gradio
print("torch" in sys.modules, "diffusers" in sys.modules, inspect.getfile is before, callable(gradio.Textbox().change))
"""


def test_without_runs_the_header_says_so(context: Context):
    picker, state, title, _ = look(context, None, None)
    assert (picker.value, picker.choices) == (None, [])
    assert state == "There are no runs yet."
    assert "<h1>Lorasmith</h1>" in title
    assert device_line() in title


def test_the_newest_run_is_shown_with_the_state_of_each(context: Context):
    a_run(context, "first", PlanMade(2, 4), a_step(2), Done(2, []))
    a_run(context, "second", PlanMade(4, 8), a_step(1), Stopped(1))
    picker, state, _, _ = look(context, None, None)
    assert sorted(picker.choices) == [("first (done)", "first"), ("second (stopped)", "second")]
    assert "stopped" in state
    assert "Stopped and saved" in state


def test_the_run_that_a_person_picked_stays(context: Context):
    a_run(context, "first", PlanMade(2, 4), a_step(2), Done(2, []))
    a_run(context, "second")
    picker, state, *_ = look(context, "first", None)
    assert picker.value == "first"
    assert "Done, 2 steps." in state


def test_a_run_that_is_gone_gives_way(context: Context):
    a_run(context, "first")
    assert look(context, "removed", None)[0].value == "first"


def test_what_has_not_changed_is_not_sent_again(context: Context):
    run = a_run(context, "x", PlanMade(4, 8), a_step(1))
    *_, seen = look(context, None, None)
    picker, state, *_ = look(context, "x", seen)
    assert (picker, state) == (gr.skip(), gr.skip())
    EventLog(run.events).append(a_step(2))
    picker, state, *_ = look(context, "x", seen)
    assert picker == gr.skip()
    assert "step 2 of 4" in state


def test_a_run_whose_files_cannot_be_read_leaves_the_others_as_they_are(context: Context):
    a_run(context, "good", PlanMade(2, 4), a_step(2), Done(2, []))
    a_run(context, "bad").events.mkdir()
    picker, state, *_ = look(context, "bad", None)
    assert sorted(picker.choices) == [("bad (unreadable)", "bad"), ("good (done)", "good")]
    assert "Its files cannot be read" in state


def test_what_fails_in_a_look_is_news_once():
    def fail() -> None:
        raise UserError("bad", "here", "Mend it.")

    assert as_news(fail)() == as_news(fail)() == "UserError: here: bad. Mend it."
    assert as_news(lambda: 1)() == 1


def test_a_page_looks_less_often_while_nothing_changes_and_at_once_again_when_something_does():
    intervals = [OFTEN]
    while (update := next_look(intervals[-1], is_news=False)) != gr.skip():
        intervals.append(update.value)
    assert intervals == sorted(intervals)
    assert intervals[-1] == SELDOM
    assert next_look(SELDOM, is_news=True).value == OFTEN
    assert next_look(OFTEN, is_news=True) == gr.skip()


def test_only_the_page_that_is_shown_looks_for_news(trained_site: Site, page: Page):
    page.goto(f"{trained_site.url}/?run=seen")
    dependencies = page.evaluate("window.gradio_config.dependencies")
    timers = {target for found in dependencies for target, event in found["targets"] if event == "tick"}
    assert len(timers) == 1 + 4  # of the header, and of each page
    seen, asked = [], set()
    page.on("request", lambda request: asked.update(_trigger_of(request)))

    def two_look() -> bool:
        asked.clear()
        page.wait_for_timeout(1000 * (SELDOM + 2))
        return len(asked & timers) == 2

    for title in ("3 Compare", "4 Share"):
        open_tab(page, title)
        wait_until(two_look, "the header and this page alone look for news")  # a busy machine is late
        seen.append(asked & timers)
    assert len(seen[0] & seen[1]) == 1


def _trigger_of(request: Request) -> set[int]:
    """By which component an event came about that a request tells the server of."""
    return {json.loads(request.post_data or "")["trigger_id"]} if "/queue/join" in request.url else set()


def test_a_tab_that_stays_open_for_days_keeps_each_component_once():
    with Shell() as blocks:
        shown, timer = gr.HTML(), gr.Timer(1)

        def looked(interval: float, before: str) -> list[Any]:
            was_value = before.startswith("value")
            return [gr.Timer(interval + 1), gr.update(value="update") if was_value else "value"]

        timer.tick(looked, [timer, shown], [timer, shown])
    [event] = blocks.fns.values()
    session = SessionState(blocks)
    StateHolder().set_blocks(blocks)

    async def ticks(count: int) -> list[Any]:
        sent: list[Any] = [1, "value"]
        for _ in range(count):
            answer = await blocks.process_api(event, [sent[0], sent[1]], session)
            sent = [value["value"] if isinstance(value, dict) else value for value in answer["data"]]
        return sent

    def in_a_loop(work: Coroutine[Any, Any, list[Any]]) -> list[Any]:
        with ThreadPoolExecutor(1) as thread:  # where a browser is driven, this one has a loop that runs
            return thread.submit(asyncio.run, work).result()

    assert in_a_loop(ticks(2)) == [3, "value"]
    kept = len(session.blocks_config.blocks), len(session.config_values)
    assert in_a_loop(ticks(12)) == [13, "value"]
    assert (len(session.blocks_config.blocks), len(session.config_values)) == kept


def test_when_something_was_changed_is_known_also_of_what_is_not_there(tmp_path: Path):
    assert changed_at(tmp_path / "none") == 0
    before = changed_at(tmp_path)
    (tmp_path / "new").touch()
    assert changed_at(tmp_path) >= before > 0


def test_all_text_is_shown_as_text():
    hostile = '<script>alert(1)</script>"'
    for html in (
        chip(hostile),
        notice(hostile, hostile, where=hostile),
        table([hostile], [], hostile),
        problems(UserError(hostile)),
    ):
        assert "<script>" not in html
        assert 'alert(1)</script>"' not in html


def test_an_error_reaches_the_page_as_text():
    def fail() -> None:
        raise UserError("<b>bad</b>", "here", "Mend it.")

    with pytest.raises(gr.Error, match=r"here: &lt;b&gt;bad&lt;/b&gt;\. Mend it\.") as raised:
        told(fail)()
    assert raised.value.duration is None


def test_the_page_opens_with_its_four_pages_and_the_run_that_is_asked_for(trained_site: Site, page: Page):
    page.goto(f"{trained_site.url}/?run=seen")
    expect(page.get_by_role("heading", level=1)).to_have_text("Lorasmith")
    for title in ("1 Images", "2 Train", "3 Compare", "4 Share"):
        expect(page.get_by_role("tab", name=title)).to_be_visible()
    expect(page.get_by_label("Run that is shown")).to_have_value("seen (done)")
    expect(page.get_by_text("Done, 4 steps.").first).to_be_visible()
