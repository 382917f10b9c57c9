"""The browser app: a header with the run that is shown, and four pages. All it knows is in run folders."""

from __future__ import annotations

from typing import Any, NamedTuple

import gradio as gr

from ..trainer.errors import first_line
from ..trainer.jobs import RunFolder, find_runs
from .api import NAMES, add_endpoints
from .compare.page import compare_page
from .context import NEVER_WAITING, QUIETLY, Context
from .device import device_line
from .html import chip, esc
from .images.page import images_page
from .pacing import OFTEN, Clock, next_look, switch
from .share.page import share_page
from .train.page import train_page

_SECONDS_BETWEEN_EVENTS = 0.02
"""Between two looks of Gradio's queue for an event that waits. It looks a thousand times a second otherwise, which
costs a tenth of a processor as long as the server runs."""
PAGES = {"images": "1 Images", "train": "2 Train", "compare": "3 Compare", "share": "4 Share"}


_SESSIONS = 100
"""Open tabs whose state is kept; the one that was silent longest goes first."""


class Page(gr.Blocks):
    """Gradio's, but that a call without enough arguments is no accident of the server's, and that a tab may stay open
    for days."""

    def validate_inputs(self, block_fn: Any, inputs: list[Any]) -> None:
        try:
            super().validate_inputs(block_fn, inputs)
        except ValueError as error:
            raise gr.Error(first_line(error), print_exception=False) from error

    async def postprocess_data(self, block_fn: Any, predictions: Any, state: Any) -> list[Any]:
        """What takes the place of a component in a tab takes its number as well. Gradio gives it a new one, and at the
        component's next value keeps it under both: as many copies as there were updates, until the tab is forgotten."""
        sent = await super().postprocess_data(block_fn, predictions, state)
        if state is not None:
            for number in {block._id for block in block_fn.outputs} & state.blocks_config.blocks.keys():
                state.blocks_config.blocks[number]._id = number
        return sent


def build(context: Context) -> gr.Blocks:
    """The page over a folder of runs."""
    with Page(title="Lorasmith", analytics_enabled=False, delete_cache=(3600, 86400), fill_width=False) as blocks:
        add_endpoints(context)  # before others take their names
        _header(blocks, context)
        timers = {page: gr.Timer(OFTEN, active=page == "images") for page in PAGES}
        with gr.Tabs() as context.tabs:
            tabs = {page: gr.Tab(title, id=page, elem_id=f"page-{page}") for page, title in PAGES.items()}
        clocks = {page: Clock(timers[page], tab.select) for page, tab in tabs.items()}
        with tabs["images"]:
            images = images_page(context, clocks["images"])
        with tabs["train"]:
            train_page(context, images, clocks["train"])
        with tabs["compare"]:
            compare_page(context, clocks["compare"])
        with tabs["share"]:
            share_page(context, clocks["share"])
        by_id = {f"page-{page}": timer for page, timer in timers.items()}
        for page, tab in tabs.items():
            tab.select(None, None, [*timers.values()], js=switch(by_id, f"page-{page}"), **QUIETLY)
    for listener in blocks.fns.values():
        listener.show_progress_on = []  # for each place of a spinner the browser walks over the page at every event
        if listener.api_name not in NAMES:  # also Gradio's own, which fill a box when a page is opened
            listener.api_visibility = "private"
    blocks.state_session_capacity = _SESSIONS
    blocks.queue(default_concurrency_limit=8)
    blocks._queue.sleep_when_free = blocks._queue.progress_update_sleep_when_free = _SECONDS_BETWEEN_EVENTS
    context.queue.ensure_worker()
    return blocks


def _header(blocks: gr.Blocks, context: Context) -> None:
    with gr.Row(elem_classes="header", equal_height=True):
        with gr.Column(scale=3, min_width=240):
            title = gr.HTML(_title(), padding=False)
        with gr.Column(scale=2, min_width=240):
            context.picked = gr.Dropdown([], label="Run that is shown", interactive=True)
            state = gr.HTML(padding=False)
    seen, timer = gr.State(None), gr.Timer(OFTEN)
    shown = [context.picked, state, title, seen]

    def opened(request: gr.Request) -> list[Any]:
        context.queue.ensure_worker()  # it may have been killed since the server was started
        return look(context, request.query_params.get("run"), None)

    def looked(interval: float, name: str | None, before: Any) -> list[Any]:
        *news, now = look(context, name, before)
        return [*news, now, next_look(interval, now != before)]

    blocks.load(opened, None, shown, **QUIETLY)
    events, asked = [timer.tick, context.picked.change], [timer, context.picked, seen]
    gr.on(events, looked, asked, [*shown, timer], **NEVER_WAITING)


def look(context: Context, name: str | None, before: Any) -> list[Any]:
    """The picker, where the run that is shown stands, the title, and all three as they are now.

    What is as it was `before` is not sent again. Without a name, a run that is worked on is shown, or the newest.
    """
    standing = {run.name: _standing(context, run) for run in find_runs(context.runs)}
    is_there = name in standing
    if not is_there:
        active = (known for known, status in standing.items() if status.is_active)
        name = next(active, next(iter(standing), None))
    choices = [(f"{known} ({status.state})", known) for known, status in standing.items()]
    state = f"{chip(standing[name].state)} {esc(standing[name].sentence)}" if name else "There are no runs yet."
    now = [(name, choices), state, _title()]
    # a name that was picked is not sent: a person may have picked another one meanwhile
    picker = gr.Dropdown(choices=choices) if is_there and before else gr.Dropdown(choices=choices, value=name)
    was = before or [None] * len(now)
    sent = [value if new != old else gr.skip() for value, new, old in zip([picker, *now[1:]], now, was, strict=True)]
    return [*sent, now]


class Standing(NamedTuple):
    """Where a run stands, as the header tells it."""

    state: str
    sentence: str
    is_active: bool


def _standing(context: Context, run: RunFolder) -> Standing:
    try:
        status = run.status(context.stories.of(run))
    except OSError as error:
        return Standing("unreadable", f"Its files cannot be read ({error.strerror or error}).", False)
    return Standing(status.state, status.sentence, status.is_active)


def _title() -> str:
    return f'<h1>Lorasmith</h1><p class="quiet">{esc(device_line())}</p>'
