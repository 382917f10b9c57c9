"""Where a drawing stands, in words and as a bar; and sending only what has changed since it was last sent."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import lru_cache
from typing import Any

import gradio as gr

from ...trainer.errors import UserError
from ...trainer.painting.easel import Drawn, Easel, Ticket
from ...trainer.painting.orders import Order
from ...trainer.status import duration
from ..html import esc, notice

Views = dict[str, tuple[Hashable, Any]]
"""Of components by name: what each shows, as a value that can be compared, and what to send for that."""


def last_ticket(easel: Easel, is_wanted: Callable[[Order], bool]) -> Ticket | None:
    """The newest order of a kind that is known still, whichever page or command placed it."""
    return next((ticket for ticket in easel.tickets() if (order := _order(ticket)) and is_wanted(order)), None)


@lru_cache(maxsize=1000)  # an order that was placed never changes
def _order(ticket: Ticket) -> Order | None:
    try:
        return ticket.order()
    except UserError:
        return None


_SCORING = "Scoring the wall."


def progress(drawn: Drawn | None) -> str:
    """Empty if nothing was asked for. A screen reader is told each quarter, and the end."""
    if drawn is None:
        return ""
    if drawn.state == "failed":
        return notice(drawn.message, drawn.fix)
    unscored = notice(f"There are no scores: {drawn.unscored}", drawn.unscored_fix, "note") if drawn.unscored else ""
    return f"<p>{esc(sentence_of(drawn))}</p>{_bar(drawn)}{_announced(drawn)}{unscored}"


def _bar(drawn: Drawn) -> str:
    if drawn.has_ended:
        return ""
    if drawn.state == "scoring":
        return f'<progress max="1" value="{drawn.scored:g}" aria-label="Scored"></progress>'
    return f'<progress max="{drawn.total}" value="{drawn.done}" aria-label="Pictures drawn"></progress>'


def sentence_of(drawn: Drawn) -> str:
    counted = f"{drawn.done} of {pictures(drawn.total)}"
    match drawn.state:
        case "waiting":
            return "Waiting for the painter to start."
        case "loading":
            return "Loading the model."
        case "drawing":
            left = f", about {duration(drawn.seconds_left)} left" if drawn.seconds_left is not None else ""
            return f"{counted} drawn{left}."
        case "scoring":
            return f"All {pictures(drawn.total)} are drawn. {_SCORING} {drawn.scored:.0%} are looked at."
        case "done":
            return f"Done, {pictures(drawn.total)} drawn."
        case "cancelled":
            return f"Cancelled, {counted} drawn."
        case _:
            return drawn.message


def _announced(drawn: Drawn) -> str:
    quarters = 4 * drawn.done // max(drawn.total, 1)
    rare = {"drawing": f"{25 * quarters} percent are drawn.", "scoring": _SCORING}
    words = rare.get(drawn.state) or sentence_of(drawn)
    return f'<p class="sr-only" role="status">{esc(words)}</p>'


def pictures(count: int) -> str:
    return f"{count} picture" if count == 1 else f"{count} pictures"


def as_html(html: str) -> tuple[Hashable, Any]:
    """What a component of HTML shows; it takes no place while that is nothing."""
    return html, gr.update(value=html, visible=bool(html))


def changed(
    components: Iterable[str], views: Views, seen: Mapping[str, Hashable]
) -> tuple[list[Any], dict[str, Hashable]]:
    """What to send to each component, and what all show then. Those that show it already, or are in no view, stay."""
    fresh = {name: update for name, (key, update) in views.items() if name not in seen or seen[name] != key}
    keys = {**seen, **{name: key for name, (key, _) in views.items()}}
    return [fresh.get(name, gr.skip()) for name in components], keys
