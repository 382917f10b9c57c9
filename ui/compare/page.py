"""Compare: which checkpoint, at which strength? A wall of pictures, two of them side by side, and a playground."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from ...trainer.choosing.choice import most_of_captions
from ...trainer.config import RunConfig
from ...trainer.errors import LorasmithError, UserError
from ...trainer.jobs import RunFolder
from ...trainer.painting.easel import Ticket
from ...trainer.painting.orders import SAMPLERS, WallOrder
from ...trainer.painting.samplers import MOST_STEPS
from ...trainer.painting.sheet import order_sheet, save_sheet
from ..context import FOLLOWING, QUIETLY, Context, as_news, changed_at, config_of, readable_config, told
from ..html import esc, notice, problems
from ..pacing import Clock
from ..urls import picture_url
from .choices import (
    Choices,
    answers_of,
    checkpoints_of,
    choices_of,
    prompts_of,
    seconds_each,
    triggers_of,
    usual_steps,
)
from .drawing import Views, as_html, changed, last_ticket, progress
from .playground import GUIDANCE, Playground
from .rating import RatePage
from .scoring import choice_of, further_files, notes_on, summary_of, verdict_of
from .wall import (
    BASE,
    CSS,
    KEEPS_THE_SLIDER,
    PICKS,
    USE_BUTTON,
    Marks,
    Spot,
    pair,
    said_of,
    spots_of,
    title_of,
    wall,
)

_LEAK = (
    "The same prompt with the trigger word taken out: if the style still shows, it leaks into prompts that do not "
    "ask for it."
)
_HINTS = (
    "**How to choose.** If pictures at strength 1.0 copy the training images, take an earlier checkpoint. If the style "
    f"shows only above 1.2, train longer. Strength 0 is {BASE}: what a prompt gives without the LoRA."
)
_SECOND_SEED = "A second wall beneath, with the next seed: what both show is no accident."
_SCORED = (
    "Three numbers for each cell, from the base's own encoder: style gained, prompt kept, training images copied; and "
    "one cell is recommended. The run's other sample prompts are drawn for it too, for more make better scores. "
    "Off: the pictures alone."
)
_PICK_ONE = "Pick one at the top of the page, or train one first."


# ---------------------------------------------------------------------------------------------------------------------
# the page


@dataclass(frozen=True)
class Seen:
    """What was sent to one browser tab, so that it is not sent again."""

    run: str = ""
    saved: tuple[int, ...] = ()
    usual: tuple[int, ...] = ()
    keys: dict[str, Hashable] = field(default_factory=dict)


def compare_page(context: Context, clock: Clock) -> None:
    """The wall, two of its pictures side by side, the playground, and what is said of pictures."""
    gr.Markdown(
        "## Compare\nDraw the same prompt with several checkpoints and strengths, and choose by eye and by number."
    )
    with gr.Tabs():
        with gr.Tab("Wall"):
            page = WallPage(context)
        with gr.Tab("Side by side"):
            page.add_pair()
        with gr.Tab("Playground"):
            gr.Markdown("Try any prompt. Every picture is kept with its settings, the last 24 are shown.")
            play = Playground(context)
        with gr.Tab("Rate"):
            rate = RatePage(context)

    def look(name: str | None, *typed: Any) -> tuple[Any, ...]:
        return page.look(name), play.look(name), rate.look(name), typed

    news = clock.news(look, [context.picked, *page.typed], [context.picked.change])
    page.listen(news)
    play.listen(news)
    rate.listen(news)


class WallPage:
    """The components of the wall and of the pair, and what they do."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.nothing = gr.HTML(padding=False)
        with gr.Column(visible=False) as self.body:
            self._add_questions()
            self.summary = gr.HTML(padding=False)
            with gr.Row():
                self.draw = gr.Button("Draw", variant="primary")
                self.cancel = gr.Button("Cancel", visible=False)
            self.progress = gr.HTML(padding=False, visible=False)
            gr.Markdown(_HINTS)
            self.verdict = gr.HTML(padding=False, visible=False)
            self.use_best = gr.Button("Use the recommended one", visible=False)
            self.wall = gr.HTML(css_template=CSS, js_on_load=PICKS, padding=False)
            self.save = gr.Button("Save the wall as PNG")
            self.saved = gr.HTML(padding=False)
            self._add_choice()
        self.seen = gr.State(Seen())

    def _add_questions(self) -> None:
        self.prompt = gr.Dropdown(
            label="Prompt",
            info="A sample prompt of this run, or type your own.",
            allow_custom_value=True,
            interactive=True,
        )
        with gr.Row():
            self.leak = gr.Checkbox(label="Without the trigger", info=_LEAK, interactive=True)
            self.second_seed = gr.Checkbox(label="Second seed", info=_SECOND_SEED, interactive=True)
        self.scored = gr.Checkbox(label="Score and recommend", info=_SCORED, interactive=True)
        self.steps = gr.CheckboxGroup(label="Checkpoints", info="The rows of the wall.", interactive=True)
        with gr.Row():
            self.strengths = gr.Textbox(label="Strengths", info="The columns. 0 is the base alone, 1 is as trained.")
            self.seed = gr.Number(label="Seed", precision=0, minimum=0, info="All pictures start from the same noise.")
        with gr.Accordion("How the pictures are drawn", open=False):
            self.negative_prompt = gr.Textbox(label="Negative prompt", info="What the pictures should not show.")
            with gr.Row():
                self.sampler = gr.Dropdown(sampler_choices(), label="Sampler", interactive=True)
                self.sampling_steps = gr.Number(label="Sampling steps", precision=0, minimum=1, maximum=MOST_STEPS)
                self.guidance = gr.Number(label="Guidance", info=GUIDANCE, minimum=1, maximum=50)

    def _add_choice(self) -> None:
        gr.Markdown("### Use one of them")
        with gr.Row():
            self.chosen_step = gr.Dropdown(label="Checkpoint to use", interactive=True)
            self.chosen_strength = gr.Dropdown(label="Strength to use", interactive=True)
        self.use = gr.Button("Use this one", variant="primary", elem_id=USE_BUTTON)
        self.choice = gr.HTML(padding=False)
        self.go_on = gr.Button("Go on to Share", visible=False)

    def add_pair(self) -> None:
        gr.Markdown("Two pictures of the wall, one over the other. Move the slider to uncover either.")
        with gr.Row():
            self.left = gr.Dropdown(label="Left picture", interactive=True)
            self.right = gr.Dropdown(label="Right picture", interactive=True)
        self.pair = gr.HTML(js_on_load=KEEPS_THE_SLIDER, padding=False)

    # what a person answers

    @property
    def questions(self) -> dict[str, Any]:
        """The components by the names that handlers know their values by."""
        return {
            "prompt": self.prompt,
            "leak": self.leak,
            "second_seed": self.second_seed,
            "scored": self.scored,
            "steps": self.steps,
            "strengths": self.strengths,
            "seed": self.seed,
            "negative_prompt": self.negative_prompt,
            "sampler": self.sampler,
            "sampling_steps": self.sampling_steps,
            "guidance": self.guidance,
        }

    @property
    def typed(self) -> list[Any]:
        """The questions whose answers are also looked at each second: not every letter comes as an event."""
        return [self.strengths, self.negative_prompt, self.seed, self.sampling_steps, self.guidance]

    @property
    def picks(self) -> dict[str, Any]:
        return {
            "chosen_step": self.chosen_step,
            "chosen_strength": self.chosen_strength,
            "left": self.left,
            "right": self.right,
        }

    @property
    def views(self) -> dict[str, Any]:
        """The components that show something, by the names in `_views`."""
        return {
            "nothing": self.nothing,
            "body": self.body,
            "summary": self.summary,
            "draw": self.draw,
            "cancel": self.cancel,
            "progress": self.progress,
            "verdict": self.verdict,
            "use_best": self.use_best,
            "wall": self.wall,
            "choice": self.choice,
            "go_on": self.go_on,
            "chosen_step": self.chosen_step,
            "chosen_strength": self.chosen_strength,
            "saved": self.saved,
            "left": self.left,
            "right": self.right,
            "pair": self.pair,
        }

    # what happens

    def listen(self, news: gr.State) -> None:
        context, questions = self.context, self.questions
        follow: dict[str, Any] = {
            "inputs_kwargs": {"name": context.picked, "seen": self.seen, **questions, **self.picks},
            "outputs": [*questions.values(), *self.views.values(), self.seen],
            **FOLLOWING,
        }
        news.change(self.follow, **follow)
        answered = [part.input for part in [*questions.values(), self.left, self.right]]
        gr.on([*answered, *(event for part in self.typed for event in (part.blur, part.submit))], self.follow, **follow)

        asked = {"name": context.picked, **questions}
        self.draw.click(self.place, inputs_kwargs=asked, **QUIETLY).then(self.follow, **follow)
        self.cancel.click(self.stop, context.picked, **QUIETLY).then(self.follow, **follow)
        self.save.click(self.save_sheet, outputs=self.saved, inputs_kwargs=asked, api_visibility="private")
        self.wall.select(self.pick, None, [self.chosen_step, self.chosen_strength, self.choice], **QUIETLY)
        used = [self.chosen_step, self.chosen_strength, self.choice]
        self.use_best.click(self.choose_best, outputs=used, inputs_kwargs=asked, **QUIETLY).then(self.follow, **follow)
        chosen = [context.picked, self.chosen_step, self.chosen_strength]
        self.use.click(self.choose, chosen, self.choice, **QUIETLY).then(self.follow, **follow)
        self.go_on.click(lambda: gr.Tabs(selected="share"), None, context.tabs, **QUIETLY)

    @as_news
    def look(self, name: str | None) -> Any:
        """What changes when there is something new to see of a run."""
        run = self.context.run(name)
        if run is None:
            return ("no run",)
        last, written = self._last(run), [changed_at(run.config), changed_at(run.path / "compare")]
        return name, *written, checkpoints_of(run), run.chosen, last and last.state()

    @told
    def follow(self, *, name: str | None, seen: Seen, **given: Any) -> list[Any]:
        """Values of the questions where another run is shown, and all else that has changed."""
        run = self.context.run(name)
        config = readable_config(run) if run else None
        saved = checkpoints_of(run) if run and isinstance(config, RunConfig) else ()
        picks = {pick: given.pop(pick) for pick in self.picks}
        views: Views
        questions: dict[str, Any] = {}
        usual: tuple[int, ...] = ()
        if run is None or not isinstance(config, RunConfig) or not saved:
            views = _without_pictures(run, config)
        else:
            usual = usual_steps(run)
            if seen.run != run.name:
                choices = Choices.remembered(run) or Choices.usual(run, config)
                questions = asked_as(choices, saved, config)
                given, picks = answers_of(choices), dict.fromkeys(picks)
            elif seen.saved != saved:  # training goes on
                if tuple(given["steps"]) == seen.usual:
                    given["steps"] = list(usual)
                questions = {"steps": gr.update(choices=step_choices(saved), value=given["steps"])}
            views = self._views(run, config, given, picks)
        shown = run.name if run and saved else ""
        sent, keys = changed(self.views, views, seen.keys if seen.run == shown else {})
        asked = [questions.get(question, gr.skip()) for question in self.questions]
        return [*asked, *sent, Seen(shown, saved, usual, keys)]

    def _views(self, run: RunFolder, config: RunConfig, given: dict[str, Any], picks: dict[str, Any]) -> Views:
        """Of each component: what it shows, and what to send for that. A wall that cannot be stays as it is."""
        views: Views = {"nothing": ("", gr.update(visible=False)), "body": (True, gr.update(visible=True))}
        try:
            choices = choices_of(given)
            order = choices.order(run, config)
            files = list(order.files().values())
            choice = choice_of(order)
            further = further_files(order) if order.scored_with is not None and not choice else None
        except UserError as error:
            return views | {"summary": as_html(problems(error))}
        last, chosen = self._last(run), run.chosen
        drawn = last and last.state()
        active = bool(drawn and not drawn.has_ended)
        each = seconds_each(run, [*files, *(further or ())], self.context.stories.of(run))
        summary = "" if active else summary_of(files, each, further, most_of_captions(order))
        if choices.leak and order.prompts[0] == choices.prompt:
            summary += notice("This prompt does not hold the trigger word, so nothing was taken out", kind="note")
        spots = spots_of(order, order.prompts[0], order.seeds[0])
        left, right, titles = sides_of(spots, picks["left"], picks["right"])
        step, strength = pick_of(order, picks["chosen_step"], picks["chosen_strength"], chosen)
        strengths = [(f"{each:g}", each) for each in order.strengths if each]
        return views | {
            "summary": as_html(summary),
            "draw": (active, gr.update(interactive=not active)),
            "cancel": (active, gr.update(visible=active)),
            "progress": as_html(progress(drawn)),
            "verdict": as_html(verdict_of(choice, chosen) if choice else ""),
            "use_best": (bool(choice and choice.recommended), gr.update(visible=bool(choice and choice.recommended))),
            "wall": as_html(wall(order, run, Marks("waiting" if active else "not drawn", chosen, choice))),
            "choice": as_html(f"<p>Chosen: {title_of(*chosen)}.</p>" if chosen else "<p>Nothing is chosen yet.</p>"),
            "go_on": (bool(chosen), gr.update(visible=bool(chosen))),
            "chosen_step": (order.steps, gr.update(choices=step_choices(order.steps), value=step)),
            "chosen_strength": (order.strengths, gr.update(choices=strengths, value=strength)),
            "saved": (order, ""),
            "left": (titles, gr.update(choices=list(titles), value=key_of(left))),
            "right": (titles, gr.update(choices=list(titles), value=key_of(right))),
            "pair": as_html(pair(run, left, right) + f"<p>{esc(said_of(order.prompts[0], order.seeds[0]))}</p>"),
        }

    def _last(self, run: RunFolder) -> Ticket | None:
        """The last wall of a run that was asked for, by whichever page."""
        return last_ticket(
            self.context.easel, lambda order: isinstance(order, WallOrder) and order.run == str(run.path)
        )

    @told
    def place(self, *, name: str | None, **given: Any) -> None:
        """Ask for the pictures that are not there yet; `follow` shows what becomes of it."""
        run = self._run(name)
        choices = choices_of(given)
        self.context.easel.place(choices.order(run, config_of(run)))
        choices.remember(run)

    def stop(self, name: str | None) -> None:
        """Ask for no more of them; those that are drawn stay."""
        run = self.context.run(name)
        if run and (last := self._last(run)):
            last.cancel()

    @told
    def save_sheet(self, *, name: str | None, **given: Any) -> str:
        """The wall as one labelled picture, and where to download it."""
        run = self._run(name)
        order = choices_of(given).order(run, config_of(run))
        file = order.sheet()
        save_sheet(order_sheet(order, run.name, notes_on(order)), file)
        named = f'href="{esc(picture_url(run, file))}" download="{esc(run.name)}-wall.png"'
        return f"<p>Saved in the run folder as {esc(f'compare/{file.name}')}. <a {named}>Download the wall</a></p>"

    def pick(self, event: gr.EventData) -> list[Any]:
        """A cell's button: its checkpoint and strength are those that would be used."""
        step, strength = int(event.step), float(event.strength)
        return [step, strength, f"<p>Picked: {title_of(step, strength)}. Press Use this one to keep it.</p>"]

    @told
    def choose_best(self, *, name: str | None, **given: Any) -> list[Any]:
        """What the scores recommend is picked and chosen at once."""
        run = self._run(name)
        choice = choice_of(choices_of(given).order(run, config_of(run)))
        best = choice.recommended if choice else None
        if best is None:
            raise UserError("nothing is recommended", "Use the recommended one", "Draw the wall with scores first.")
        return [best.step, best.strength, self.choose(name, best.step, best.strength)]

    @told
    def choose(self, name: str | None, step: int | None, strength: float | None) -> str:
        run = self._run(name)
        if step is None or strength is None:
            raise UserError("nothing is picked", "Use this one", "Pick a checkpoint and a strength first.")
        run.choose(step, strength)
        return f"<p>Chosen: {title_of(step, strength)}.</p>"

    def _run(self, name: str | None) -> RunFolder:
        if run := self.context.run(name):
            return run
        raise UserError("no run is picked", "Run", _PICK_ONE)


def _without_pictures(run: RunFolder | None, config: RunConfig | LorasmithError | None) -> Views:
    why = "has no checkpoint yet. The wall can be drawn once the first is saved."
    text = notice(f"{run.name} {why}", kind="note") if run else notice("No run is picked", _PICK_ONE, kind="note")
    text = problems(config) if isinstance(config, LorasmithError) else text
    return {
        "nothing": as_html(text),
        "body": (False, gr.update(visible=False)),
        "pair": as_html("<p>Pick a run that has checkpoints.</p>"),
    }


# ---------------------------------------------------------------------------------------------------------------------
# between components and choices


def sampler_choices() -> list[tuple[str, str]]:
    """(label, name), as a dropdown takes them."""
    return [(label, name) for name, label in SAMPLERS.items()]


def step_choices(steps: Sequence[int]) -> list[tuple[str, int]]:
    return [(f"step {step} (last)" if step == max(steps) else f"step {step}", step) for step in steps]


def asked_as(choices: Choices, saved: Sequence[int], config: RunConfig) -> dict[str, Any]:
    """The questions of a run with their answers."""
    offered = {
        "prompt": {"choices": prompts_of(config)},
        "steps": {"choices": step_choices(saved)},
        "leak": {"interactive": bool(triggers_of(config))},
    }
    return {name: gr.update(value=value, **offered.get(name, {})) for name, value in answers_of(choices).items()}


def sides_of(
    spots: dict[tuple[int, float], Spot], left: str | None, right: str | None
) -> tuple[Spot, Spot, tuple[tuple[str, str], ...]]:
    """The two pictures that are compared, and the (title, key) of all that can be: as picked while they are on the
    wall, or else the base and the last checkpoint as trained."""
    by_key = {key_of(spot): spot for spot in spots.values()}
    base = next((spot for spot in spots.values() if not spot.strength), next(iter(spots.values())))
    last = max(spots.values(), key=lambda spot: (spot.step, -abs(spot.strength - 1)))
    titles = tuple((spot.title, key) for key, spot in by_key.items())
    return by_key.get(left or "", base), by_key.get(right or "", last), titles


def key_of(spot: Spot) -> str:
    return f"{spot.step}:{spot.strength:g}" if spot.strength else "base"


def pick_of(
    order: WallOrder, step: int | None, strength: float | None, chosen: tuple[int, float] | None
) -> tuple[int, float | None]:
    """What the pickers show: as picked while it is on the wall, or else what was chosen, or the last as trained."""
    strengths = [each for each in order.strengths if each]
    first = chosen or (0, 0.0)
    steps = [each for each in (step, first[0]) if each in order.steps]
    fitting = [each for each in (strength, first[1]) if each in strengths]
    nearest = min(strengths, key=lambda each: abs(each - 1), default=None)
    return next(iter(steps), order.steps[-1]), next(iter(fitting), nearest)
