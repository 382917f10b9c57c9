"""Train: three answers, a plan that follows them, and a start; all other settings with their reasons under Advanced.

Behind the page is one document, the values that were given. Every control changes it, and all that is shown is made of
it anew: the controls, its TOML, the command line, and the plan, which another process makes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import astuple, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.context import Context as Building

from ...configs import recipe_names
from ...trainer.configfile import read_toml, set_value
from ...trainer.errors import LorasmithError, Problem, UserError
from ...trainer.jobs import RunFolder, find_runs, free_name
from ..context import FOLLOWING, QUIETLY, Context, as_news, told
from ..html import esc, notice
from ..images.page import ImagesPage
from ..pacing import Clock, next_look
from ..paths import require_allowed_path
from ..planner import Recognised
from .choosing import (
    NO_RECIPE,
    fitted,
    prompted,
    with_base,
    with_images,
    with_name,
    with_prompts,
    with_quality,
    with_recipe,
)
from .desk import Answer, Desk
from .draft import ABSENT, Teaching, Values, choose, from_text, of_config, problems_of, to_text, value_at
from .form import Look, controls, edited, edits_of, looks_of
from .plancard import PLANNING, in_the_way
from .running import OFTEN, Panel, View, pulse, running_panel, spoken, view
from .showing import QUALITY, SHOWN_PARTS, parts_shown
from .starting import before, plan_document, start_document
from .waiting import queue_table, rows_of, welcome

_SECONDS_OF_CALM = 0.3
"""So long nothing may change before a plan is made."""
_RECENT_BASES = 12
_WRITING: dict[str, Any] = QUIETLY | {
    "trigger_mode": "always_last",
    "concurrency_id": "document",
    "concurrency_limit": 1,
}
"""What changes the document: one after the other, or the later of two would not know of the earlier one's change."""
_FIRST_IMAGES = Problem("images", "no folder of images is chosen yet", "Choose one on the page 1 Images.")


FIRST: Values = {"recipe": "demo", "base": {"model": "pocket"}}
"""The document of a tab that was just opened."""


@dataclass
class TrainPage:
    """The states behind the page, and the components that show them."""

    context: Context
    images: ImagesPage
    draft: gr.State
    """The document."""
    found: gr.State
    """What the base was found to be, a `Recognised`; None as long as that is not known."""
    answer: gr.State
    """The newest `Answer`; None before the first."""
    recipe_chosen: gr.State
    """The recipe that this page chose by base and teaching: it may choose another one when these change."""
    filled: gr.State
    """The previews' prompts that this page filled in: it may do so again as long as nobody changes them."""
    desk: gr.State
    parts: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Under Advanced, by table and dotted path, a control for each setting."""


def train_page(context: Context, images: ImagesPage, clock: Clock) -> TrainPage:
    """The page, inside its tab."""
    greeting = welcome(context)
    page = TrainPage(
        context,
        images,
        draft=gr.State(FIRST),
        found=gr.State(None),
        answer=gr.State(None),
        recipe_chosen=gr.State(FIRST["recipe"]),
        filled=gr.State([]),
        desk=gr.State(Desk()),
    )
    with gr.Accordion("New run", open=True) as page.parts["new run"]:
        _answers(page)
        _start(page)
        _advanced(page)
    rows = queue_table(context)
    panel = running_panel(context)
    _listen(page)
    _listen_to_start(page)
    _listen_to_panel(page, panel)
    _watch(page, clock, panel, {"greeting": greeting, "rows": rows, "new run": page.parts["new run"]})
    return page


# ---------------------------------------------------------------------------------------------------------------------
# what stands on it


def _answers(page: TrainPage) -> None:
    parts = page.parts
    parts["images"] = gr.HTML(padding=False)
    with gr.Row():
        parts["base"] = gr.Dropdown(
            ["pocket"],
            value="pocket",
            allow_custom_value=True,
            label="Base model",
            info="pocket, a diffusers folder, a .safetensors file, or a Hub id such as owner/name.",
            min_width=280,
        )
        parts["name"] = gr.Textbox(
            label="Name", info="The run's folder and the file to share are called so.", min_width=280
        )
    parts["family"] = gr.HTML(padding=False)
    parts["quality"] = gr.Radio(
        ["Quick", "Balanced", "Thorough"],
        value="Balanced",
        label="Quality",
        info=QUALITY,
    )
    parts["prompts"] = gr.Textbox(
        label="Sample prompts, one a line",
        info=(
            "Drawn before the first step and with each further preview, always with the same seeds. The last one does "
            "without the trigger word: if the style shows there too, it leaks. Empty: these suggestions come back."
        ),
        lines=4,
        max_lines=12,
    )


def _start(page: TrainPage) -> None:
    parts = page.parts
    parts["card"] = gr.HTML(PLANNING, padding=False, elem_id="plan")
    with gr.Row(equal_height=True):
        parts["start"] = gr.Button("Start training", variant="primary", interactive=False)
        parts["queue"] = gr.Button("Add to queue", interactive=False)
    parts["why not"] = gr.HTML(padding=False)
    parts["said"] = gr.HTML(padding=False)


def _advanced(page: TrainPage) -> None:
    parts = page.parts
    with gr.Accordion("Advanced: every setting, with its reason", open=False):
        with gr.Row():
            parts["recipe"] = gr.Dropdown(
                [NO_RECIPE, *recipe_names()], value="demo", label="Recipe", min_width=280, interactive=True
            )
            with gr.Column(min_width=280):
                parts["changed"] = gr.Dropdown([], label="Changed settings", interactive=True)
                parts["put back"] = gr.Button("Back to the recipe's value", interactive=False)
        parts["further"] = gr.HTML(padding=False)
        page.settings = controls()
    with gr.Accordion("The same as a file, and as a command", open=False):
        parts["toml"] = gr.Textbox(
            label="Configuration (TOML): what differs from the recipe and the defaults",
            info="What you change here is taken over when you leave the field.",
            lines=12,
            max_lines=40,
            elem_classes="mono",
        )
        parts["toml wrong"] = gr.HTML(padding=False)
        with gr.Row():
            _copy_button("Copy the TOML", parts["toml"])
            parts["load"] = gr.UploadButton("Load a file", file_types=[".toml"], type="filepath", size="sm")
        for shell, system in (("bash", "Linux, macOS"), ("powershell", "PowerShell")):
            label = f"Command line ({system})"
            parts[shell] = gr.Textbox(label=label, lines=2, max_lines=8, interactive=False, elem_classes="mono")
            _copy_button(f"Copy the command line ({system})", parts[shell])


def _copy_button(label: str, text: gr.Textbox) -> None:
    """Gradio's own one takes the name of the text field away from it."""
    button = gr.Button(label, size="sm")
    button.click(None, text, button, js=_COPY.replace("LABEL", label), **QUIETLY)


_COPY = """(text) => {
  const area = document.createElement("textarea");
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");  // navigator.clipboard is there for https and this computer only
  area.remove();
  return "LABEL: copied";
}"""


# ---------------------------------------------------------------------------------------------------------------------
# what follows from what


def _listen(page: TrainPage) -> None:
    parts, images, draft = page.parts, page.images, page.draft
    load = Building.root_block.load  # pyright: ignore[reportOptionalMemberAccess]

    # what a person changes goes to the document
    taught = [images.folder.change, images.trigger.change, load]
    gr.on(taught, with_images, [draft, images.folder, images.trigger], draft, **_WRITING)
    gr.on([parts["base"].input, parts["base"].blur], with_base, [draft, parts["base"]], draft, **_WRITING)
    gr.on(edits_of(parts["name"]), with_name, [draft, parts["name"]], draft, **_WRITING)
    gr.on(edits_of(parts["prompts"]), with_prompts, [draft, parts["prompts"]], draft, **_WRITING)
    parts["quality"].input(with_quality, [draft, parts["quality"]], draft, **_WRITING)
    parts["recipe"].input(with_recipe, [draft, parts["recipe"]], [draft, page.recipe_chosen], **_WRITING)
    for dotted, control in (setting for table in page.settings.values() for setting in table.items()):
        gr.on(edits_of(control), partial(_edit, dotted), [draft, control], draft, **_WRITING)
    parts["put back"].click(_put_back, [draft, parts["changed"]], draft, **_WRITING)
    loaded = [draft, page.recipe_chosen, images.folder, images.trigger, parts["toml wrong"]]
    images.follow(parts["toml"].blur(with_text, [draft, parts["toml"]], loaded, **_WRITING))
    images.follow(parts["load"].upload(with_file, [draft, parts["load"]], loaded, **_WRITING))

    # what the page itself fills in
    fitting = [draft, page.found, images.teaching, page.recipe_chosen]
    gr.on([page.found.change, images.teaching.change], fitted, fitting, [draft, page.recipe_chosen], **_WRITING)
    filling = [draft, page.found, images.teaching, page.answer, page.filled]
    page.answer.change(prompted, filling, [draft, page.filled], **_WRITING)

    # the document is shown, and planned
    seen = [draft, page.found, images.teaching, page.answer, page.desk]
    looks = {table: gr.State({}) for table in page.settings}
    shown = [*(parts[name] for name in SHOWN_PARTS), *looks.values()]
    changes = [load, draft.change, page.found.change, page.answer.change, images.teaching.change]
    changes.append(page.context.picked.change)  # a run that was started has taken its name
    gr.on(changes, partial(_show, page), seen, shown, **FOLLOWING)
    for table, look in looks.items():
        look.change(_show_settings, [look, page.desk], list(page.settings[table].values()), **FOLLOWING)
    asked = [draft, page.found, page.answer, page.desk]
    gr.on([load, draft.change], partial(_plan, page.context), asked, [page.found, page.answer], **FOLLOWING)
    load(partial(_bases, page.context), None, parts["base"], **FOLLOWING)


def with_text(values: Values, text: str) -> list[Any]:
    """The document that was typed; one that cannot be read leaves the earlier one, and says so."""
    if text.strip() == to_text(values).strip():
        return [*_UNCHANGED, ""]
    try:
        return [*_taken_over(from_text(text), values), ""]
    except LorasmithError as error:
        return [*_UNCHANGED, in_the_way(error)]


def with_file(values: Values, file: str) -> list[Any]:
    """The document of a file that was loaded."""
    try:
        return with_text(values, Path(file).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        return [*_UNCHANGED, in_the_way(UserError(f"cannot be read ({error})", Path(file).name, "Choose a TOML file."))]


_UNCHANGED = [gr.skip()] * 4


def _taken_over(values: Values, before: Values) -> list[Any]:
    """A whole document: itself, whether its recipe is the page's to change, and its folder and trigger word."""
    folder, trigger = value_at(values, "data.0.path"), value_at(values, "data.0.trigger")
    return [
        values,
        gr.skip() if values.get("recipe") == before.get("recipe") else "",
        folder if isinstance(folder, str) else gr.skip(),
        trigger if isinstance(trigger, str) else "",
    ]


def _edit(dotted: str, values: Values, shown: Any) -> Values:
    return edited(values, dotted, shown)


def _put_back(values: Values, dotted: str | None) -> Values:
    return choose(values, dotted, None) if dotted else values


def _bases(context: Context) -> Any:
    """The bases to choose from: pocket, and those of earlier runs, the newest first."""
    models = []
    for run in list(find_runs(context.runs))[:_RECENT_BASES]:
        with suppress(LorasmithError):
            models.append(value_at(read_toml(run.config), "base.model"))
    return gr.Dropdown(choices=list(dict.fromkeys([*(m for m in models if isinstance(m, str)), "pocket"])))


# ---------------------------------------------------------------------------------------------------------------------
# the plan


def _plan(context: Context, values: Values, found: Recognised | None, before: Answer | None, desk: Desk) -> list[Any]:
    """Plan the document when it has been left alone for a moment; if it changed meanwhile, say nothing."""
    desk.asked += 1
    mine = desk.asked
    if before is not None and before.values == values:
        return [gr.skip(), gr.skip()]
    time.sleep(_SECONDS_OF_CALM)
    if desk.asked != mine:
        return [gr.skip(), gr.skip()]
    found, answer = answered(context, values, found)
    return [found, answer] if desk.asked == mine else [gr.skip(), gr.skip()]


def answered(context: Context, values: Values, found: Recognised | None = None) -> tuple[Recognised | None, Answer]:
    """What the document's base is, and its plan, or what stands in its way."""
    model = value_at(values, "base.model")
    if isinstance(model, str) and (found is None or found.model != model):
        try:
            require_allowed_path(context, model)
            found = context.planner.recognise(model)
        except UserError:
            found = None  # the plan says why
    try:
        if value_at(values, "data.0.path") in (ABSENT, ""):
            raise UserError.of([_FIRST_IMAGES])
        return found, Answer(values, plan_document(context, values))
    except LorasmithError as error:
        return found, Answer(values, error=error)


# ---------------------------------------------------------------------------------------------------------------------
# what is shown


def _show(
    page: TrainPage, values: Values, found: Recognised | None, teaching: Teaching, answer: Answer | None, desk: Desk
) -> list[Any]:
    """The parts of the page as the document has them, and by table what the controls are to show."""
    fresh = answer if answer is not None and answer.values == values else None
    problems = fresh.error.problems if fresh and fresh.error else problems_of(values)
    now = parts_shown(page.context, values, found, teaching, fresh)
    looks = looks_of(values, problems)
    tables = [{dotted: astuple(looks[dotted]) for dotted in table} for table in page.settings.values()]
    return [*desk.news(now, {name: gr.update(**now[name]) for name in SHOWN_PARTS}), *tables]


def _show_settings(looks: dict[str, tuple[Any, ...]], desk: Desk) -> list[Any]:
    return desk.news(looks, {dotted: Look(*look).update() for dotted, look in looks.items()})


# ---------------------------------------------------------------------------------------------------------------------
# starting


def _listen_to_start(page: TrainPage) -> None:
    parts, context = page.parts, page.context
    outputs = [context.picked, parts["said"]]
    parts["start"].click(told(partial(_started, context, True)), page.draft, outputs, **QUIETLY)
    parts["queue"].click(told(partial(_started, context, False)), page.draft, outputs, **QUIETLY)


def _started(context: Context, at_once: bool, values: Values) -> list[Any]:
    """Start or queue the document's run, and show it."""
    if at_once and (other := before(context)):
        words = notice(f"{other} comes first, one run at a time", "Add this one to the queue instead.", kind="warning")
        return [gr.skip(), words]
    waits_for = before(context)
    run = start_document(context, values)
    said = f"{run.name} waits in the queue, after {waits_for}." if waits_for else f"{run.name} is being started."
    picked = gr.skip() if waits_for else _picking(context, run)
    return [picked, f'<p role="status">{esc(said)} Closing this page does not stop it.</p>']


def _picking(context: Context, run: RunFolder) -> Any:
    names = [other.name for other in find_runs(context.runs)]
    return gr.Dropdown(choices=names, value=run.name)


# ---------------------------------------------------------------------------------------------------------------------
# while something runs


def _watch(page: TrainPage, clock: Clock, panel: Panel, around: dict[str, Any]) -> None:
    """Each second the sentence of the run that is shown; all else when there is news of it."""
    context, shown = page.context, panel.shown | around
    often = {key: shown[key] for key in OFTEN}
    seldom = {key: component for key, component in shown.items() if key not in OFTEN}
    news = gr.State(())

    @as_news
    def found(name: str | None) -> Any:
        return (*pulse(context, name), _around(context, name))

    def look(interval: float, name: str | None, desk: Desk, before: Any) -> list[Any]:
        seen = found(name)
        now = {} if isinstance(seen, str) else spoken(context, name, desk.sent)
        is_news = seen != before or any(desk.sent.get(key) != signature for key, (signature, _) in now.items())
        return [*desk.news(*_sides(now, often)), seen if seen != before else gr.skip(), next_look(interval, is_news)]

    @told
    def look_closely(name: str | None, desk: Desk) -> list[Any]:
        now = view(context, name)
        rows, none, trains = _around(context, name)
        now["rows"] = (rows, rows)
        now["greeting"] = (none, gr.update(visible=none))
        # the form makes room when a run begins; when it ends, a person may be looking at it
        now["new run"] = ((name, trains), gr.Accordion(open=False) if trains else gr.skip())
        return desk.news(*_sides(now, seldom))

    asked = [context.picked, page.desk]
    answers = [panel.answer.change, page.parts["said"].change]
    events = [clock.timer.tick, clock.opened, context.picked.change, *answers]
    gr.on(events, look, [clock.timer, *asked, news], [*often.values(), news, clock.timer], **FOLLOWING)
    news.change(look_closely, asked, list(seldom.values()), **FOLLOWING)


def _sides(now: View, shown: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What tells whether each thing is as it was sent, and its update."""
    return (
        {key: signature for key, (signature, _) in now.items()},
        {key: now[key][1] if key in now else gr.skip() for key in shown},
    )


def _around(context: Context, name: str | None) -> tuple[Any, bool, bool]:
    """The queue, whether there is no run yet, and whether the run that is shown trains."""
    run = context.run(name)
    trains = run is not None and run.status(context.stories.of(run)).is_active
    return rows_of(context), not any(True for _ in find_runs(context.runs)), trains


def _listen_to_panel(page: TrainPage, panel: Panel) -> None:
    """A run that is over gives its settings to a new one."""
    context, images = page.context, page.images
    outputs = [page.draft, page.recipe_chosen, images.folder, images.trigger, page.parts["new run"], panel.answer]
    for button, act in ((panel.buttons["anew"], _over_again), (panel.mend_anew, _mended_anew)):
        images.follow(button.click(told(_with_run(context, act)), context.picked, outputs, **_WRITING))
    context.picked.change(_forget_answer, [context.picked, page.desk], panel.answer, **QUIETLY)


def _forget_answer(name: str | None, desk: Desk) -> Any:
    """What a click did is of no interest when another run is shown; the picker also changes with a run's state."""
    return desk.news({"answer": name}, {"answer": ""})[0]


def _with_run(context: Context, act: Callable[[Context, RunFolder], Values]) -> Callable[[str | None], list[Any]]:
    def clicked(name: str | None) -> list[Any]:
        run = context.run(name)
        if run is None:
            raise UserError("there is no such run any more", str(name), "Pick another one above.")
        values = act(context, run)
        said = f"<p>The settings of {esc(run.name)} are in the form under New run, as {esc(values['name'])}.</p>"
        return [*_taken_over(values, {}), gr.Accordion(open=True), said]

    return clicked


def _over_again(context: Context, run: RunFolder) -> Values:
    """A run's settings, under the next free name."""
    return of_config(run.read_config(), free_name(context.runs, run.name))


def _mended_anew(context: Context, run: RunFolder) -> Values:
    """Likewise, with what its failure says would mend it."""
    values = _over_again(context, run)
    for setting in run.status(context.stories.of(run)).anew:
        set_value(values, setting)
    return values
