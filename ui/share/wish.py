"""What is wanted of an export: the questions of the Share page, filled in from the run, and the answers as a `Wish`."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ...trainer.config import RunConfig
from ...trainer.errors import LorasmithError, UserError
from ...trainer.formats import Format, formats_of
from ...trainer.jobs import Chosen, RunFolder
from ...trainer.sharing.licenses import usual_license
from ..context import FOLLOWING, Context, readable_config, told
from ..html import esc, notice, problems
from .covers import covers_of, pictures_css
from .exported import size_in_words
from .exporting import PRECISIONS, Wish, expected_size, settings_of
from .remembered import remembered

_FORMATS: dict[Format, str] = {
    "kohya": "kohya's names (.safetensors): A1111, Forge, ComfyUI and all others",
    "diffusers": "diffusers' names (.safetensors): for programs in Python",
    "ldm": "one file (.safetensors): A1111, Forge, ComfyUI and all others",
}
_WHOLE_MODEL = {"diffusers": "a folder: for programs in Python"}
_TOLD = {
    "safe": "Safe: settings, counts, and tags that several images share. No path, user name or caption is told, and no "
    "prompt that may be a caption.",
    "all": "All: also complete tag counts, all prompts, and the configuration with the paths of this computer.",
    "none": "None: only the trigger word, and what clients need to load and recognise the file.",
}
_CHOICES = "thumbnail-choice"
_LONGEST_TEXT, _LONGEST_LINE = 5000, 300
_QUESTIONS = 16
"""Of which `form_of` tells how they are shown, after the two for a run that has nothing to share."""


class WishForm:
    """The questions, and the button."""

    def __init__(self, context: Context) -> None:
        self.context = context
        with gr.Row():
            with gr.Column(min_width=280):
                self._what_is_written()
            with gr.Column(min_width=280):
                self._what_is_told()
        self.style = gr.HTML(padding=False)
        self.thumbnail = gr.Radio(
            [],
            label="Thumbnail",
            info="The picture that clients and sites show: a preview, or a cell of this checkpoint's wall.",
            elem_id=_CHOICES,
        )
        with gr.Accordion("Advanced", open=False), gr.Row():
            self._what_is_changed()
        self.export = gr.Button("Export and verify", variant="primary")
        self.seen = gr.State(None)

    def _what_is_written(self) -> None:
        self.checkpoint = gr.Dropdown([], label="Checkpoint", interactive=True)
        self.note = gr.HTML(padding=False)
        self.strength = gr.Number(
            1.0,
            label="Suggested strength",
            info="What others are told to use. The weights in the file stay as they were trained.",
            minimum=0.01,
            maximum=10,
            step=0.05,
        )
        self.formats = gr.CheckboxGroup([], label="Formats")
        self.precision = gr.Radio(list(PRECISIONS), value="fp16", label="Precision")
        self.bundle = gr.Checkbox(
            False,
            label="Bundle (.zip)",
            info="All of it in one file, with a model card, a license note and checksums; it is what is published.",
        )

    def _what_is_told(self) -> None:
        self.title = gr.Textbox(label="Title", info="Empty: the run's name.", max_length=_LONGEST_LINE)
        self.author = gr.Textbox(
            label="Author", info="Remembered for the next run. Empty: not told.", max_length=_LONGEST_LINE
        )
        self.description = gr.Textbox(
            label="Description", info="Empty: which models it is for.", lines=3, max_length=_LONGEST_TEXT
        )
        self.license = gr.Textbox(label="License", info="Empty: that of the base.", max_length=_LONGEST_LINE)
        self.tags = gr.Textbox(
            label="Tags", info="Words by which others find it, with commas: ink, watercolour", max_length=_LONGEST_TEXT
        )
        self.metadata = gr.Radio(
            [(sentence, value) for value, sentence in _TOLD.items()], value="safe", label="What the files tell"
        )

    def _what_is_changed(self) -> None:
        self.bake = gr.Number(
            0,
            label="Bake to rank",
            info="Write a plain LoRA of this rank of whatever was trained, for clients that read no other. 0: no.",
            precision=0,
            minimum=0,
            maximum=1024,
        )
        self.merged = gr.Number(
            1.0,
            label="Merged strength",
            info="Becomes a part of the file: with 0.8, it does at strength 1 what was trained at 0.8. 1: no change.",
            minimum=-10,
            maximum=10,
            step=0.05,
        )

    @property
    def answers(self) -> list[Any]:
        """In the order in which `wish_of` takes them."""
        written = [self.checkpoint, self.strength, self.formats, self.precision, self.bundle]
        told = [self.title, self.author, self.description, self.license, self.tags, self.metadata]
        return [*written, *told, self.thumbnail, self.bake, self.merged]

    def listen(self, news: gr.State, nothing: gr.HTML, page: gr.Column) -> None:
        context, pick = self.context, [self.checkpoint, self.note, self.strength]
        texts = [self.title, self.author, self.description, self.license, self.tags, self.metadata, self.bundle]
        shown: list[Any] = [*pick, *texts, self.bake, self.merged, self.style, self.thumbnail]
        by_bake = [self.formats, self.precision]

        @told
        def look(name: str | None, step: int | None, picture: str | None, bake: float | None, seen: Any) -> list[Any]:
            return form_of(context, name, step, picture, int(bake or 0), seen)

        gr.on(
            [news.change, self.checkpoint.change, self.bake.change],
            look,
            [context.picked, self.checkpoint, self.thumbnail, self.bake, self.seen],
            [nothing, page, *shown, *by_bake, self.seen],
            **FOLLOWING,
        )


# ---------------------------------------------------------------------------------------------------------------------
# as a run fills it in


def form_of(
    context: Context, name: str | None, step: int | None, picture: str | None, bake: int, seen: dict[str, Any] | None
) -> list[Any]:
    """How the form is shown, and what that was read from; what has not changed since it was `seen` is left alone.

    What is told is filled in when a run is picked, and belongs to the person from then on; checkpoint and strength
    follow what is chosen in Compare.
    """
    run, before = context.run(name), seen or {}
    config = readable_config(run) if run else None
    reason = problems(config) if isinstance(config, LorasmithError) else nothing_yet(run)
    if reason or run is None or not isinstance(config, RunConfig):
        is_seen = before.get("nothing") == reason
        shown = [gr.skip(), gr.skip()] if is_seen else [reason, gr.Column(visible=False)]
        return [*shown, *[gr.skip()] * _QUESTIONS, {"nothing": reason}]
    steps, chosen = tuple(run.saved_steps()), run.chosen
    if name != before.get("run") or chosen != before.get("chosen") or step not in steps:
        step = chosen.step if chosen else steps[-1]
    covers = covers_of(run, step)
    now = {
        "run": name,
        "steps": steps,
        "chosen": chosen,
        "note": (step, chosen),
        "covers": tuple(covers),
        "bake": (bool(bake),),
        "size": (step, bake),
    }

    def changed(what: str) -> bool:
        return before.get("run") != name or before.get(what) != now[what]

    pictures = [(cover.label, cover.file.relative_to(run.path).as_posix()) for cover in covers]
    files = [file for _, file in pictures]
    shown = picture if picture in files and not changed("run") else next(iter(files), None)
    return [
        *(["", gr.Column(visible=True)] if changed("run") else [gr.skip()] * 2),
        _checkpoints(steps, step) if changed("steps") or changed("chosen") else gr.skip(),
        _note(steps, step, chosen) if changed("note") else gr.skip(),
        (chosen.strength if chosen and chosen.strength > 0 else 1.0) if changed("chosen") else gr.skip(),
        *(_told_of(context, run, config) if changed("run") else [gr.skip()] * 9),
        pictures_css(run, covers, _CHOICES) if changed("covers") else gr.skip(),
        gr.Radio(choices=pictures, value=shown, visible=bool(pictures)) if changed("covers") else gr.skip(),
        _formats(config, bake, is_other=changed("run")) if changed("bake") else gr.skip(),
        _precisions(run, config, step, bake, is_other=changed("run")) if changed("size") else gr.skip(),
        now,
    ]


def nothing_yet(run: RunFolder | None) -> str:
    """Why there is nothing to share; empty if there is something."""
    if run is None:
        return notice("There is no run to share yet.", "Train one, or choose one at the top of the page.", "note")
    if not run.saved_steps():
        return notice("This run has no checkpoint yet.", "Wait for its first, on the Train page.", "note")
    return ""


def _checkpoints(steps: tuple[int, ...], step: int) -> gr.Dropdown:
    named = [(f"step {known}{' (the newest)' if known == steps[-1] else ''}", known) for known in steps]
    return gr.Dropdown(choices=named, value=step)


def _note(steps: tuple[int, ...], step: int, chosen: Chosen | None) -> str:
    """Where checkpoint and strength come from, in a sentence."""
    if chosen is None:
        words = "Nothing was chosen in Compare, so the newest checkpoint stands here, at strength 1."
        words = words if step == steps[-1] else "Not the newest checkpoint; in Compare nothing was chosen."
    elif chosen.step == step:
        words = f"Chosen in Compare: step {chosen.step} at strength {chosen.strength:g}."
    else:
        words = f"In Compare another one was chosen: step {chosen.step} at strength {chosen.strength:g}."
    return f'<p class="quiet">{esc(words)}</p>'


def _told_of(context: Context, run: RunFolder, config: RunConfig) -> list[Any]:
    """What is told with the files, as the last time or as the run's configuration has it; and no changes."""
    settings = settings_of(run, config)
    author = settings.author or remembered(context.runs, "author")
    license = gr.Textbox(value=settings.license, info=f"Empty: {license_in_words(context, run, config)}.")
    texts = [settings.title, author, settings.description, license, ", ".join(settings.tags)]
    is_lora = config.adapter.kind != "full"
    return [*texts, settings.metadata, settings.bundle, gr.Number(value=0, visible=is_lora), 1.0]


def license_in_words(context: Context, run: RunFolder, config: RunConfig) -> str:
    """The one that stands where none is given."""
    plan = context.stories.of(run).plan
    family = plan.plan.get("base", {}).get("family") if plan else None
    if family is None:
        return "that of the base's family"
    license = usual_license(config.base.model, family)
    if license is None:
        return "none, because nobody made the random base"
    return f"{license.name}, that of the base, because what is trained from a base is a derivative of it"


def _formats(config: RunConfig, bake: int, is_other: bool) -> gr.CheckboxGroup:
    """Those there are; a plain LoRA that is baked can have others."""
    there = formats_of(config, baked=bool(bake))
    labels = _FORMATS | (_WHOLE_MODEL if config.adapter.kind == "full" else {})
    ticked = config.export.formats if is_other and config.export.formats else list(there)
    return gr.CheckboxGroup(choices=[(labels[name], name) for name in there], value=ticked)


def _precisions(run: RunFolder, config: RunConfig, step: int, bake: int, is_other: bool) -> gr.Radio:
    """With the size that a file will have."""
    sizes = {precision: expected_size(run, config, step, precision, bake) for precision in PRECISIONS}
    told = {name: f"about {size_in_words(size)} a file" if size else "size not known" for name, size in sizes.items()}
    choices = [(f"{name}: {words}", name) for name, words in told.items()]
    return gr.Radio(choices=choices, value=config.export.precision) if is_other else gr.Radio(choices=choices)


# ---------------------------------------------------------------------------------------------------------------------
# as a person has answered


def wish_of(run: RunFolder, answers: list[Any]) -> Wish:
    """What the form asks for.

    Raises:
        UserError: if an answer is missing or out of its bounds.
    """
    step, strength, formats, precision, bundle, *texts, metadata, picture, bake, merged = answers
    title, author, description, license, tags = (str(text or "").strip() for text in texts)
    if not formats:
        raise UserError("no format is ticked", "Formats", "Tick one at least.")
    if not strength or not 0 < strength <= 10:
        raise UserError("is no strength to suggest", "Suggested strength", "Give a number above 0, up to 10.")
    if not merged:
        raise UserError("0 leaves nothing of what was trained", "Merged strength", "Give another number, as 0.8.")
    pictures = {cover.file.relative_to(run.path).as_posix(): cover.file for cover in covers_of(run, step)}
    if picture and picture not in pictures:
        raise UserError("is none of the pictures of this checkpoint", "Thumbnail", "Choose one of them.")
    settings = {
        "strength": float(strength),
        "metadata": metadata,
        "title": title,
        "author": author,
        "description": description,
        "license": license,
        "tags": [tag for tag in map(str.strip, tags.split(",")) if tag],
    }
    return Wish(
        step=step,
        formats=tuple(formats),
        precision=precision,
        settings=tuple(settings.items()),
        thumbnail=pictures[picture] if picture else None,
        bake=int(bake or 0),
        merged=float(merged),
        bundle=bool(bundle),
    )
