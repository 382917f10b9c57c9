"""The same change to many captions: chosen, seen in a preview, made, and taken back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ...datasets import bulk
from ...datasets.bulk import Operation, Preview
from ...datasets.journal import last_deed, undo
from ...datasets.listing import list_images
from ...trainer.errors import UserError
from ..context import QUIETLY, told
from ..html import esc, notice, table
from .cards import View
from .facts import many

OPERATIONS = ("Add the trigger in front", "Find and replace", "Remove a tag", "Sort tags")
_EXAMPLES = 5
_LEFT_SHOWN = 5


def operation_of(kind: str, trigger: str, find: str, by: str, tag: str) -> Operation:
    """What was chosen, with what was typed for it.

    Raises:
        UserError: if what it needs was not typed.
    """
    if kind == OPERATIONS[0]:
        return bulk.add_trigger(trigger)
    if kind == OPERATIONS[1]:
        return bulk.replace_text(find, by)
    return bulk.remove_tag(tag) if kind == OPERATIONS[2] else bulk.sort_tags(trigger)


@told
def preview(folder: str, kind: str, trigger: str, find: str, by: str, tag: str) -> list[Any]:
    """What would be changed, the same for the click that does it, and whether there is anything to do."""
    if not folder:
        raise UserError("there are no images yet", "Folder of images", "Name a folder, or use the example images.")
    seen = bulk.preview(list_images(Path(folder)), operation_of(kind, trigger, find, by, tag))
    return [preview_html(seen), seen, gr.update(visible=bool(seen.edits))]


def preview_html(seen: Preview) -> str:
    """A sentence, some examples, and what stays as it is."""
    shown = [(esc(edit.name), esc(edit.before) or "(empty)", esc(edit.after)) for edit in seen.edits[:_EXAMPLES]]
    examples = table(["Image", "Before", "After"], shown, "Examples") if shown else ""
    sentence = seen.sentence if seen.edits else f"No caption would change: {seen.what}."
    left = "".join(notice(p.what, p.fix, "warning", p.where) for p in seen.left[:_LEFT_SHOWN])
    more = len(seen.left) - _LEFT_SHOWN
    left += f"<p>And {more} more that stay as they are.</p>" if more > 0 else ""
    return f"<p><strong>{esc(sentence)}</strong></p>{examples}{left}"


@told
def apply(folder: str, seen: Preview | None, view: View) -> list[Any]:
    """What was done, no preview, no button to do it again, and the cards anew."""
    if seen is None:
        raise UserError("there is no preview", "captions", "Press Preview first.")
    count = bulk.apply(list_images(Path(folder)), seen.what, seen.edits)
    told = notice(f"Changed {many(count, 'caption')}: {seen.what}", "Undo brings them back.", "note")
    return [told, None, gr.update(visible=False), view.anew]


@told
def take_back(folder: str, view: View) -> list[Any]:
    """What was undone, and the cards anew."""
    undone = undo(Path(folder))
    told = notice(f"Undone: {undone.what}. {many(undone.restored, 'file')} as before", kind="note")
    told += "".join(notice(p.what, p.fix, "warning", p.where) for p in undone.left)
    return [told, view.anew]


def undo_label(folder: str) -> str:
    """What the undo button says; empty if there is nothing to undo."""
    what = last_deed(Path(folder)) if folder else ""
    return f"Undo: {what}" if what else ""


def captions_panel(view: gr.State, in_use: gr.State, trigger: gr.Textbox, done: gr.HTML) -> gr.Accordion:
    """Choice, preview and the change itself; what was done is told in `done`."""
    with gr.Accordion("Change many captions at once", open=False) as panel:
        kind = gr.Radio(list(OPERATIONS), value=OPERATIONS[0], label="What to do", interactive=True)
        with gr.Row():
            find = gr.Textbox(label="Find", info="Exactly this, with upper and lower case.", visible=False)
            by = gr.Textbox(label="Replace by", info="May be empty.", visible=False)
            tag = gr.Textbox(label="Tag", info="A whole tag between commas.", visible=False)
        seen, shown = gr.State(None), gr.HTML(padding=False)
        with gr.Row():
            look = gr.Button("Preview")
            do = gr.Button("Apply", variant="primary", visible=False)
    fields: Sequence[Any] = [kind, trigger, find, by, tag]

    def choose(kind: str) -> list[Any]:
        typed = [kind == OPERATIONS[1], kind == OPERATIONS[1], kind == OPERATIONS[2]]
        return [*(gr.update(visible=visible) for visible in typed), "", None, gr.update(visible=False)]

    kind.change(choose, kind, [find, by, tag, shown, seen, do], **QUIETLY)
    look.click(preview, [in_use, *fields], [shown, seen, do], **QUIETLY)
    do.click(apply, [in_use, seen, view], [done, seen, do, view], **QUIETLY).success(lambda: "", None, shown, **QUIETLY)
    return panel
