"""The Share page: files of a checkpoint for others, what they say, whether they are right, and where they go."""

from __future__ import annotations

from functools import partial
from typing import Any

import gradio as gr

from ..context import Context, as_news, changed_at
from ..pacing import Clock
from .outcome import Outcome, exported
from .wish import WishForm


def share_page(context: Context, clock: Clock) -> None:
    """The page, inside its tab."""
    gr.Markdown("## Share\nThe files that others need, compared with what was trained, and what they tell of it.")
    nothing = gr.HTML(padding=False)
    with gr.Column(visible=False) as page:
        form = WishForm(context)
        outcome = Outcome(context)
    news = clock.news(partial(look, context), [context.picked], [context.picked.change])
    form.listen(news, nothing, page)
    outcome.listen(news, form)


@as_news
def look(context: Context, name: str | None) -> Any:
    """What changes when there is something new to see of a run."""
    run = context.run(name)
    if run is None:
        return ("no run",)
    written = [changed_at(file) for file in (run.config, run.path / "samples", run.path / "compare")]
    return name, *written, run.saved_steps(), run.chosen, exported(run)
