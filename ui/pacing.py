"""How often a page looks for news: each second while there are any, and less often while nothing changes.

An event costs the browser a walk over all that was ever read in events, several times; so a page looks only while it is
shown, and what it found is followed only when it is something else than before.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from .context import FOLLOWING

OFTEN, SELDOM = 1.0, 4.0
"""Seconds."""
_SLOWER = 1.5


@dataclass(frozen=True)
class Clock:
    """What makes a page look."""

    timer: gr.Timer
    opened: Any
    """The event of its tab."""

    def news(self, look: Callable[..., Any], asked: Sequence[Any], also: Sequence[Any] = ()) -> gr.State:
        """What a look finds, as a state that changes only when it finds something else; it is asked with the values of
        components, at each tick, when the page is opened, and at further events."""
        found = gr.State(None)

        def paced(interval: float, before: Any, *answers: Any) -> list[Any]:
            now = look(*answers)
            return [now if now != before else gr.skip(), next_look(interval, now != before)]

        events = [self.timer.tick, self.opened, *also]
        gr.on(events, paced, [self.timer, found, *asked], [found, self.timer], **FOLLOWING)
        return found


def next_look(interval: float, is_news: bool) -> Any:
    """For a timer: in how many seconds to look again; nothing if that is as it was."""
    wanted = OFTEN if is_news else min(_SLOWER * interval, SELDOM)
    return gr.skip() if wanted == interval else gr.Timer(wanted)


def switch(timers: Mapping[str, gr.Timer], chosen: str) -> str:
    """JavaScript that lets the timer of the page that is shown tick, each second at first, and no other.

    It looks which one that is: a page tells of its first tab late, when a person may have chosen another. `timers` are
    by the pages' ids in the document; `chosen` is the one that was told, should none be in sight.
    """
    return f"""async () => {{
        await new Promise((done) => setTimeout(done, 50));
        const pages = {json.dumps([*timers])};
        const shown = pages.find((page) => document.getElementById(page)?.checkVisibility()) ?? {json.dumps(chosen)};
        return pages.map((page) => ({{ __type__: "update", active: page === shown, value: {OFTEN} }}));
    }}"""
