"""The queue as a table with its buttons, and what the page says before there is any run."""

from __future__ import annotations

from functools import partial
from typing import Any

import gradio as gr

from ...trainer.example import example_config
from ...trainer.queue import begin
from ..context import IN_TURN, QUIETLY, Context, told
from ..html import esc

Row = tuple[str, str, str]
"""Name, place, and what is said of it."""
WELCOME = """
## Train a style of your own
Lorasmith learns a style from 10 to 50 images, and writes a small file, a LoRA, that draws anything in it.
To see how that goes, train the example: 32 pictures, a tiny base model, some minutes on any computer, no download.
Or go to **1 Images**, and show it a folder of yours.
"""


def queue_table(context: Context) -> gr.State:
    """The run that trains and those that wait, with buttons to reorder them; nothing while nobody waits.

    Returns the state that holds its rows, as `rows_of` gives them.
    """
    rows = gr.State(())

    @gr.render(inputs=rows, show_progress="hidden", **IN_TURN)
    def queue(shown: tuple[Row, ...]) -> None:
        if not any(place != "now" for _, place, _ in shown):
            return
        gr.Markdown("## Queue")
        for name, place, words in shown:
            with gr.Row(key=("queue", name), equal_height=True):
                text = f"<p><strong>{esc(name)}</strong> {esc(words)}</p>"
                gr.HTML(text, key=("words", name), preserved_by_key=[], padding=False, min_width=200)
                if place != "now":
                    _buttons(context, rows, name)

    return rows


def _buttons(context: Context, rows: gr.State, name: str) -> None:
    queue = context.queue

    def done(act: Any) -> tuple[Row, ...]:
        act()
        return rows_of(context)

    for label, act in (
        (f"Move {name} up", partial(queue.move, name, -1)),
        (f"Move {name} down", partial(queue.move, name, 1)),
        (f"Remove {name} from the queue", partial(queue.remove, name)),
    ):
        button = gr.Button(label, size="sm", min_width=100, key=(label, name))
        button.click(told(partial(done, act)), None, rows, **QUIETLY)


def rows_of(context: Context) -> tuple[Row, ...]:
    """The run that trains, then those that wait, in their order."""
    running, waiting = context.queue.running(), context.queue.waiting()
    rows = [(running, "now", "trains now.")] if running else []
    for number, entry in enumerate(waiting, 1):
        ahead = "is next" if number == 1 else f"waits as number {number}"
        changes = f", with {', '.join(entry.overrides)}" if entry.overrides else ""
        rows.append((entry.name, str(number), f"{ahead}{changes}."))
    return tuple(rows)


def welcome(context: Context) -> gr.Column:
    """What this is for, and the example in one click; to be seen before there is a run."""
    with gr.Column(visible=False) as column:
        gr.Markdown(WELCOME)
        example = gr.Button("Train the example", variant="primary")
        said = gr.HTML(padding=False)

    def train_the_example() -> list[Any]:
        run = begin(example_config(context.runs), context.queue)
        return [gr.Dropdown(choices=[run.name], value=run.name), "<p>The example is being started.</p>"]

    example.click(told(train_the_example), None, [context.picked, said], **QUIETLY)
    return column
