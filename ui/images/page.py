"""The Images page: which images, what they teach, what is wrong with them, and their captions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from ...datasets.listing import list_images
from ...datasets.uploads import EXAMPLE, UPLOADS, example_images, receive
from ...trainer.errors import LorasmithError
from ..context import FOLLOWING, IN_TURN, QUIETLY, Context, as_news, told
from ..html import esc, notice, problems
from ..pacing import Clock
from .captioning import Captioning, captioning_panel
from .captions import captions_panel, take_back, undo_label
from .cards import SHOWN, Cards, View
from .checkups import Checkup, Checkups, Question
from .facts import EXAMPLE_SIDE, SIDES, bucket_table, many, suggested_trigger, summary, trigger_check
from .findings import Wires, findings_shown, troubled
from .visit import TEACHING, Visit

_EMPTY = """<div class="empty"><p>Lorasmith learns a look from 10 to 50 images of yours.</p>
<p>Name the folder that holds them, or drop them here; captions in .txt files beside them are used as they are.</p>
<p>No images at hand? The example has 32 drawings in one style, with captions.</p></div>"""


@dataclass
class ImagesPage:
    """What the Train page reads of this one."""

    folder: gr.Textbox
    """The absolute path of the images in use; empty if there are none yet."""
    trigger: gr.Textbox
    teaching: gr.Radio
    """Style, Character or Object."""
    follow: Callable[[Any], None]
    """Show the cards of the folder that an event of another page has put into the box."""


def images_page(context: Context, clock: Clock) -> ImagesPage:
    page = Images(context)
    page.lay_out()
    page.listen(clock)
    return ImagesPage(page.folder, page.trigger, page.teaching, page.follow)


class Images:
    """Components, and what is done when one of them is used."""

    def __init__(self, context: Context) -> None:
        self.context, self.checkups = context, Checkups()
        self.uploads = context.runs / UPLOADS

    # -- layout -------------------------------------------------------------------------------------------------------

    def lay_out(self) -> None:
        self.in_use, self.view = gr.State(""), gr.State(View())
        self.examined, self.seen = gr.State(""), gr.State({})
        gr.Markdown("## Images")
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                self.folder = gr.Textbox(
                    label="Folder of images",
                    info="On this computer; type or paste its path, then press Enter. It is used where it is.",
                    placeholder=str(Path.home() / "Pictures" / "my style"),
                )
                self.empty = gr.HTML(_EMPTY, padding=False, visible=False)
                self.example = gr.Button("Use the example images", visible=False)
            with gr.Column(scale=2, min_width=260):
                self.upload = gr.File(
                    label="Or drop images and captions here, or one .zip", file_count="multiple", height=150
                )
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                self.teaching = gr.Radio(
                    list(TEACHING), value="Style", label="What are you teaching?", interactive=True
                )
                self.advice = gr.HTML(padding=False)
            with gr.Column(scale=3, min_width=280):
                self.trigger = gr.Textbox(
                    label="Trigger word",
                    info="The word that will call what you teach; may be empty.",
                )
                self.suggest = gr.Button("Suggest one", size="sm")
                self.meaning = gr.HTML(padding=False)
        with gr.Column(visible=False) as self.work:
            self._lay_out_work()

    def _lay_out_work(self) -> None:
        """All that needs images."""
        self.summary = gr.HTML(padding=False)
        self.done = gr.HTML(elem_id="images-done", padding=False)
        with gr.Row():
            self.undo = gr.Button("Undo", visible=False)
            self.go_on = gr.Button("Go on to Train", variant="primary")
        problems_go_here = gr.Column()
        gr.Markdown("## Captions")
        self.captions = captions_panel(self.view, self.in_use, self.trigger, self.done)
        self.captioning, self.captioner_says = captioning_panel(self.context, self.in_use, self.trigger)
        with gr.Accordion("How images are cut for training", open=False):
            self.resolution = gr.Radio(
                [(f"{side} px", side) for side in SIDES],
                value=512,
                label="Resolution",
                info="512 is usual for Stable Diffusion 1, 768 for 2, 1024 for SDXL; the pocket base has 64.",
                interactive=True,
            )
            self.buckets = gr.HTML(padding=False)
        with gr.Row():
            self.show = gr.Radio(list(SHOWN), value="All", label="Show", interactive=True)
            self.contains = gr.Textbox(label="Whose caption or name contains", interactive=True)
            self.refresh = gr.Button("Read the folder again", size="sm", scale=0, min_width=160)
        self.cards = Cards()
        with problems_go_here:
            gr.Markdown("## Problems")
            self._render_findings()

    def _render_findings(self) -> None:
        wires = Wires(self.view, self.done, self.folder, self.in_use, self.captions, self.captioning, self.uploads)

        asked = [self.examined, self.in_use, self.trigger, self.resolution]

        @gr.render(asked, triggers=[self.examined.change], **IN_TURN)
        def found(examined: str, folder: str, trigger: str, resolution: int) -> None:
            if not examined or not folder:
                gr.HTML('<p class="quiet">The images have not been looked at yet.</p>', padding=False)
                return
            checkup = self.checkups.of(Question(Path(folder), trigger.strip(), resolution))
            if checkup.error:
                gr.HTML(problems(checkup.error), padding=False)
            elif checkup.examination:
                findings_shown(checkup.examination, wires)

    # -- behaviour ----------------------------------------------------------------------------------------------------

    def listen(self, clock: Clock) -> None:
        used = self._used_parts()
        self.cards.listen(self.view, self.done)
        gr.on([self.folder.submit, self.folder.blur], self.use, self._asked_of_use(), used, **QUIETLY)
        self.example.click(self.use_example, self.trigger, [*used, self.resolution], **QUIETLY)
        self.upload.upload(self.take, [self.upload, self.in_use, self.trigger], [*used, self.upload], **QUIETLY)
        self.suggest.click(suggestion, self.in_use, self.trigger, **QUIETLY)
        self.undo.click(take_back, [self.in_use, self.view], [self.done, self.view], **QUIETLY)
        self.refresh.click(lambda view: view.anew, self.view, self.view, **QUIETLY)
        filters: list[Any] = [self.in_use, self.trigger, self.resolution, self.view, self.show, self.contains]
        gr.on([self.show.change, self.contains.submit, self.contains.blur], self.filter, filters, self.view, **QUIETLY)
        self.go_on.click(lambda: gr.Tabs(selected="train"), None, self.context.tabs, **QUIETLY)
        asked: list[Any] = [self.folder, self.in_use, self.trigger, self.teaching, self.resolution]
        told: list[Any] = [
            *(self.folder, self.in_use, self.trigger, self.teaching, self.view, self.summary, self.meaning),
            *(self.advice, self.buckets, self.undo, self.empty, self.example, self.work, self.captioner_says),
            *(self.examined, self.seen),
        ]
        asked_often: list[Any] = [self.in_use, self.trigger, self.teaching, self.resolution]
        also = [part.change for part in [*asked_often, self.view]]
        clock.news(self.look, asked_often, also).change(self.watch, [*asked, self.view, self.seen], told, **FOLLOWING)

    def follow(self, event: Any) -> None:
        """After an event of another page, use the folder that now stands in the box."""
        event.success(self.use, self._asked_of_use(), self._used_parts(), **QUIETLY)

    def _asked_of_use(self) -> list[Any]:
        return [self.folder, self.in_use, self.trigger]

    def _used_parts(self) -> list[Any]:
        return [self.folder, self.in_use, self.view, self.trigger, self.done]

    @told
    def use(self, typed: str, before: str, trigger: str) -> list[Any]:
        """Take a folder that was typed: its absolute path, the same, its cards, a trigger word, and no old news."""
        if not typed.strip():
            return ["", "", View(), gr.skip(), ""] if before else [gr.skip()] * 5
        folder = self.context.path(typed)
        if str(folder) == before and typed == before:
            return [gr.skip()] * 5
        list_images(folder)  # an error is told before anything changes
        return self._used(folder, trigger, "")

    @told
    def use_example(self, trigger: str) -> list[Any]:
        folder = example_images(self.uploads)
        told = notice(f"The example images are in use, from {folder}", kind="note")
        return [*self._used(folder, trigger or EXAMPLE, told), EXAMPLE_SIDE]

    @told
    def take(self, files: list[str] | None, in_use: str, trigger: str) -> list[Any]:
        """Uploaded files go to the folder in use if that was uploaded too, else to a new one."""
        into = Path(in_use) if in_use and Path(in_use).is_relative_to(self.uploads) else None
        got = receive([Path(file) for file in files or []], self.uploads, into)
        told = notice(f"{many(got.taken, 'file')} came in. They are in {got.folder}", kind="note")
        told += "".join(notice(problem.what, problem.fix, "warning", problem.where) for problem in got.left_out)
        return [*self._used(got.folder, trigger, told), None]

    def _used(self, folder: Path, trigger: str, told: str) -> list[Any]:
        return [str(folder), str(folder), View(str(folder)), trigger or suggested_trigger(folder), told]

    def filter(self, folder: str, trigger: str, resolution: int, view: View, show: Any, contains: str) -> View:
        wanted = {"show": show, "contains": contains.strip()}
        if show == "With problems" and folder:
            wanted["troubled"] = troubled(self._checkup(folder, trigger, resolution).examination)
        new = view.of(**wanted)
        return view if new == view else new

    @as_news
    def look(self, folder: str, trigger: str, teaching: str, resolution: int) -> Any:
        """What changes when there is something new to tell of the folder."""
        captioning = Captioning(self.context.runs, Path(folder))
        captioner = (captioning.sentence(), captioning.is_alive()) if folder else ()
        return folder, trigger, teaching, self._told(folder, trigger, resolution), captioner

    @told
    def watch(self, *asked: Any) -> dict[Any, Any]:
        """The news, by component."""
        news = {getattr(self, part): value for part, value in self.news(*asked).items()}
        return news or {self.seen: gr.skip()}  # of nothing, Gradio would ask for all

    def news(
        self, typed: str, folder: str, trigger: str, teaching: str, resolution: int, view: View, seen: dict[str, Any]
    ) -> dict[str, Any]:
        """All that is told of the folder, by the part of the page; what is as it was is left out."""
        first = {} if seen or typed or folder else self.remembered()
        if first:
            folder, trigger, teaching = first["in_use"], first["trigger"], first["teaching"]
        captioning = Captioning(self.context.runs, Path(folder))
        now = {"examined": seen.get("examined", "")} | self._told(folder, trigger, resolution)
        now["is visited"] = visit = Visit(folder, trigger.strip(), teaching)
        if not first and visit != seen.get("is visited", Visit()):  # this tab has gone elsewhere, by itself
            visit.keep(self.context.runs)
        now["advice"] = f'<p class="quiet">{esc(TEACHING[teaching])}</p>'
        now["captioner_says"] = captioning.sentence() if folder else ""
        now["is captioning"] = bool(folder) and captioning.is_alive()
        if seen.get("is captioning") and not now["is captioning"]:
            first["view"] = view.anew  # with what the model wrote
        changed = {part: value for part, value in now.items() if seen.get(part) != value}
        if "undo" in changed:
            changed["undo"] = gr.update(value=now["undo"] or "Undo", visible=bool(now["undo"]))
        if "is empty" in changed:
            is_empty = changed["is empty"]
            changed |= {part: gr.update(visible=is_empty) for part in ("empty", "example")}
            changed["work"] = gr.update(visible=not is_empty)
        shown = {part: value for part, value in changed.items() if not part.startswith("is ")}
        return first | shown | ({"seen": now} if changed else {})

    def remembered(self) -> dict[str, Any]:
        """What was looked at last, if it is there and may be read; by the part of the page."""
        last = Visit.last(self.context.runs)
        try:
            folder = str(self.context.path(last.folder)) if last.folder else ""
            if not folder or not Path(folder).is_dir():
                return {}
        except LorasmithError:
            return {}
        values = {"folder": folder, "in_use": folder, "view": View(folder)}
        return values | {"trigger": last.trigger, "teaching": last.teaching}

    def _told(self, folder: str, trigger: str, resolution: int) -> dict[str, Any]:
        """What the page says of a folder, by the part of the page."""
        if not folder:
            keys = ("summary", "meaning", "buckets", "undo", "examined")
            return dict.fromkeys(keys, "") | {"is empty": True}
        try:
            listing = list_images(Path(folder))
            checkup = self._checkup(folder, trigger, resolution)
            undo = undo_label(folder)
        except LorasmithError as error:
            keys = ("meaning", "buckets", "undo", "examined")
            return dict.fromkeys(keys, "") | {"summary": problems(error), "is empty": False}
        items = checkup.examination.items if checkup.examination else []
        told = {
            "summary": summary(listing, checkup),
            "meaning": trigger_check(listing, trigger),
            "buckets": bucket_table(items, resolution) if items else "",
            "undo": undo,
            "is empty": False,
        }
        if not checkup.doing:  # else what was found before stays
            told["examined"] = f"{folder} {checkup.state} {trigger.strip()} {resolution}"
        return told

    def _checkup(self, folder: str, trigger: str, resolution: int) -> Checkup:
        return self.checkups.of(Question(Path(folder), trigger.strip(), resolution))


def suggestion(folder: str) -> str:
    """A trigger word made from the folder's name."""
    return suggested_trigger(Path(folder)) if folder else "mystyle"
