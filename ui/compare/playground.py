"""The playground: any prompt, with a checkpoint of the run that is shown or a base alone, and other LoRA files on."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr

from ...trainer.config import RunConfig
from ...trainer.errors import UserError
from ...trainer.jobs import RunFolder, find_runs
from ...trainer.painting.easel import Ticket
from ...trainer.painting.orders import SAMPLERS, Look, PictureOrder, drawn_folder, settings_of
from ...trainer.painting.samplers import MOST_STEPS
from ..context import FOLLOWING, QUIETLY, Context, as_news, changed_at, readable_config, told
from ..html import cell, esc
from ..urls import drawn_url
from .choices import checkpoints_of
from .drawing import Views, as_html, changed, last_ticket, progress

CSS = """
  ul.shots { list-style: none; padding: 0; margin: 0; display: grid; gap: 0.75rem;
    grid-template-columns: repeat(auto-fill, minmax(min(200px, 100%), 1fr)); }
  ul.shots li { margin: 0; padding: 0.5rem; border: 1px solid var(--line); border-radius: 4px; overflow-wrap: anywhere;
    font-size: 0.85rem; }
  ul.shots a.cell { padding: 0; }
  ul.shots a.cell img { width: 100%; max-width: 320px; }
  ul.shots p { display: block; margin: 0.3rem 0; font-size: 0.85rem; }
  ul.shots .waiting { display: grid; place-items: center; min-height: 128px; color: var(--quiet); }
  button.load { min-height: 28px; border: 1px solid var(--line); border-radius: 4px; cursor: pointer; padding: 2px 8px;
    background: var(--ground); color: inherit; font-size: 0.85rem; }
  button.load:hover { border-color: currentColor; }
"""
LOADS = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button.load');
  if (button) trigger('select', { file: button.dataset.file });
});
"""
"""The button of a picture tells its name, as the `file` of a `select` event."""

GUIDANCE = "How closely a picture follows its prompt; 1 is not at all."
WITH_RUN, BASE_ALONE = "A checkpoint of the run that is shown", "A base model alone"
_NO_CHECKPOINT = "Pick a run with checkpoints at the top of the page, or draw with a base model alone."
_SHOWN, _MOST_AT_ONCE, _LARGEST_SEED = 24, 8, 2**32 - 1
_FILE = re.compile(r"[\w-]+\.png")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Seen:
    """What was sent to one browser tab, so that it is not sent again."""

    run: str | None = None
    keys: dict[str, Hashable] = field(default_factory=dict)


class Playground:
    """The components of the playground, and what they do."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.prompt = gr.Textbox(label="What to draw", lines=2, info="The prompt, with the trigger word for the style.")
        self.negative_prompt = gr.Textbox(label="What not to show", info="The negative prompt; may be empty.")
        self._add_model()
        self._add_look()
        with gr.Row():
            self.draw = gr.Button("Draw pictures", variant="primary")
            self.cancel = gr.Button("Cancel drawing", visible=False)
        self.progress = gr.HTML(padding=False, visible=False)
        gr.Markdown("### Pictures, newest first")
        self.pictures = gr.HTML(css_template=CSS, js_on_load=LOADS, padding=False)
        self.seen = gr.State(Seen())

    def _add_model(self) -> None:
        self.model = gr.Radio([WITH_RUN, BASE_ALONE], value=WITH_RUN, label="Draw with", interactive=True)
        with gr.Row():
            self.step = gr.Dropdown(label="Checkpoint to draw with", interactive=True)
            self.strength = gr.Number(1, label="Strength of the LoRA", info="0: off, 1: as trained.", step=0.1)
            self.base = gr.Textbox(
                "pocket", label="Base model to draw with", info="A Hub id, a folder, a file, or pocket.", visible=False
            )
        with gr.Accordion("Further LoRA files", open=False):
            self.loras = gr.Textbox(
                label="Files",
                lines=3,
                info="One on each line, with its strength after a colon, as in detail.safetensors:0.6.",
            )
            self.exported = gr.Dropdown(
                label="Add an exported file", info="The files of all runs of this folder.", interactive=True
            )

    def _add_look(self) -> None:
        with gr.Row():
            self.count = gr.Slider(1, _MOST_AT_ONCE, 1, step=1, label="Number of pictures")
            self.seed = gr.Number(1234, label="First seed", precision=0, minimum=0)
            self.new_seed = gr.Checkbox(label="New seed each time", info="It is shown, so that it can be used again.")
        with gr.Accordion("Sampler, steps, guidance, size", open=False), gr.Row():
            usual = Look()
            names = [(label, name) for name, label in SAMPLERS.items()]
            self.sampler = gr.Dropdown(names, value=usual.sampler, label="Sampling method", interactive=True)
            self.sampling_steps = gr.Number(
                usual.steps, label="Steps of sampling", precision=0, minimum=1, maximum=MOST_STEPS
            )
            self.guidance = gr.Number(usual.guidance, label="Guidance scale", minimum=1, maximum=50, info=GUIDANCE)
            self.size = gr.Number(
                0,
                label="Size in pixels",
                precision=0,
                minimum=0,
                info="Of each side; 0: as the base was trained.",
            )

    @property
    def settings(self) -> dict[str, Any]:
        """The components that a picture's settings fill, by the names that handlers know their values by."""
        return {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "model": self.model,
            "step": self.step,
            "strength": self.strength,
            "base": self.base,
            "loras": self.loras,
            "seed": self.seed,
            "sampler": self.sampler,
            "sampling_steps": self.sampling_steps,
            "guidance": self.guidance,
            "size": self.size,
        }

    @property
    def views(self) -> dict[str, Any]:
        """The components that `follow` keeps in step with what is on disk."""
        return {
            "prompt": self.prompt,
            "model": self.model,
            "step": self.step,
            "exported": self.exported,
            "draw": self.draw,
            "cancel": self.cancel,
            "progress": self.progress,
            "pictures": self.pictures,
        }

    # what happens

    def listen(self, news: gr.State) -> None:
        picked = self.context.picked
        follow: dict[str, Any] = {
            "inputs_kwargs": {"name": picked, "seen": self.seen, "step": self.step, "prompt": self.prompt},
            "outputs": [*self.views.values(), self.seen],
            **FOLLOWING,
        }
        news.change(self.follow, **follow)
        asked = {"name": picked, "count": self.count, "new_seed": self.new_seed, **self.settings}
        self.draw.click(self.place, inputs_kwargs=asked, outputs=self.seed, **QUIETLY).then(self.follow, **follow)
        self.cancel.click(self.stop, **QUIETLY).then(self.follow, **follow)
        self.model.change(self.show_model, self.model, [self.step, self.strength, self.base], **QUIETLY)
        self.exported.input(add_file, [self.loras, self.exported], [self.loras, self.exported], **QUIETLY)
        self.pictures.select(self.load, picked, [*self.settings.values(), self.new_seed], **QUIETLY)

    @as_news
    def look(self, name: str | None) -> Any:
        """What changes when there is something new to see."""
        runs, run, last = self.context.runs, self.context.run(name), self._last()
        steps = checkpoints_of(run) if run else ()
        return name, steps, tuple(exported_files(runs)), changed_at(drawn_folder(runs)), last and last.state()

    @told
    def follow(self, *, name: str | None, seen: Seen, step: int | None, prompt: str) -> list[Any]:
        """What has changed: the checkpoints and files there are, where the drawing stands, and the pictures."""
        runs, run = self.context.runs, self.context.run(name)
        steps = checkpoints_of(run) if run else ()
        files = tuple(exported_files(runs))
        last = self._last()
        drawn = last and last.state()
        active, bar = bool(drawn and not drawn.has_ended), progress(drawn)
        shown = shots(runs, last.files() if last and active else [])
        kept = step if step in steps and seen.run == name else step_to_draw_with(run, steps)
        choices = [(f"step {each}", each) for each in steps]
        views: Views = {
            "model": (bool(steps), gr.update(value=WITH_RUN if steps else BASE_ALONE)),
            "step": ((name, steps), gr.update(choices=choices, value=kept)),
            "exported": (files, gr.update(choices=list(files), value=None)),
            "draw": (active, gr.update(interactive=not active)),
            "cancel": (active, gr.update(visible=active)),
            "progress": as_html(bar),
            "pictures": as_html(shown),
        }
        if run and seen.run != name and not prompt:
            views["prompt"] = (name, first_prompt(run))
        sent, keys = changed(self.views, views, seen.keys)
        return [*sent, Seen(name, keys)]

    def _last(self) -> Ticket | None:
        """The last pictures that were asked for, by whichever page."""
        return last_ticket(self.context.easel, lambda order: isinstance(order, PictureOrder))

    @told
    def place(self, *, name: str | None, count: int, new_seed: bool, **given: Any) -> int:
        """Ask for the pictures, and say which seed the first has."""
        if new_seed:
            given["seed"] = random.randint(0, _LARGEST_SEED)
        order = self._order(name, int(count), given)
        self.context.easel.place(order)
        return order.seeds[0]

    def _order(self, name: str | None, count: int, given: dict[str, Any]) -> PictureOrder:
        numbers = {
            "seed": "First seed",
            "strength": "Strength of the LoRA",
            "sampling_steps": "Steps of sampling",
            "guidance": "Guidance scale",
            "size": "Size in pixels",
        }
        for key, label in numbers.items():
            if given[key] is None:
                raise UserError("is empty", label, "Type a number.")
        look = Look(
            given["negative_prompt"] or "",
            int(given["sampling_steps"]),
            float(given["guidance"]),
            given["sampler"],
            int(given["size"]),
        )
        rest: dict[str, Any] = {"prompts": (given["prompt"] or "",), "loras": self._loras(given["loras"]), "look": look}
        rest["seeds"] = tuple(range(int(given["seed"]), int(given["seed"]) + count))
        if given["model"] == BASE_ALONE:
            return PictureOrder(base=self._base(given["base"]), **rest)
        run = self.context.run(name)
        if run is None or given["step"] not in checkpoints_of(run):
            raise UserError("there is no checkpoint to draw with", "Checkpoint", _NO_CHECKPOINT)
        return PictureOrder(run=str(run.path), step=given["step"], strength=float(given["strength"]), **rest)

    def _loras(self, text: str) -> tuple[tuple[str, float], ...]:
        lines = [line.strip() for line in (text or "").splitlines() if line.strip()]
        return tuple((str(self.context.path(file)), strength) for file, strength in map(file_and_strength, lines))

    def _base(self, text: str) -> str:
        """A path is one that may be read; what is none stays as it is."""
        text = text.strip()
        is_path = Path(text).expanduser().exists() or not _HUB_ID.fullmatch(text)
        if text == "pocket" or text.startswith("random:") or (text and not is_path):
            return text
        return str(self.context.path(text))

    def stop(self) -> None:
        """Ask for no more of them; those that are drawn stay."""
        if last := self._last():
            last.cancel()

    def show_model(self, model: str) -> list[Any]:
        """The questions that belong to what is drawn with."""
        with_run = model == WITH_RUN
        return [gr.update(visible=with_run), gr.update(visible=with_run), gr.update(visible=not with_run)]

    @told
    def load(self, name: str | None, event: gr.EventData) -> list[Any]:
        """Fill in how a picture was drawn. The seed stays then, so that the same comes out."""
        file = str(event.file)
        order = settings_of(drawn_folder(self.context.runs) / file) if _FILE.fullmatch(file) else None
        if order is None:
            raise UserError("its settings cannot be read", file, "Take another picture.")
        with_run = bool(order.run)
        if with_run and Path(order.run).name != name:
            what = f"it was drawn with the run {Path(order.run).name}, which is not the one that is shown"
            raise UserError(what, file, "Pick that run at the top of the page, then load again.")
        values = {
            "prompt": order.prompts[0],
            "negative_prompt": order.look.negative_prompt,
            "model": WITH_RUN if with_run else BASE_ALONE,
            "step": order.step if with_run else gr.skip(),
            "strength": order.strength if with_run else gr.skip(),
            "base": order.base or gr.skip(),
            "loras": "\n".join(f"{path}:{strength:g}" for path, strength in order.loras),
            "seed": order.seeds[0],
            "sampler": order.look.sampler,
            "sampling_steps": order.look.steps,
            "guidance": order.look.guidance,
            "size": order.look.size,
        }
        return [*(values[key] for key in self.settings), False]


# ---------------------------------------------------------------------------------------------------------------------
# runs and files


def step_to_draw_with(run: RunFolder | None, steps: tuple[int, ...]) -> int | None:
    """The one that was chosen, or the last."""
    chosen = run.chosen if run else None
    return chosen[0] if chosen and chosen[0] in steps else max(steps, default=None)


def first_prompt(run: RunFolder) -> str:
    config = readable_config(run)
    return next(iter(config.sample.prompts), "") if isinstance(config, RunConfig) else ""


def exported_files(runs: Path) -> Iterator[tuple[str, str]]:
    """(label, path) of every LoRA file that a run of this folder has exported."""
    for run in find_runs(runs):
        for file in sorted(run.exports.glob("*.safetensors")):
            if not file.name.startswith(".") and ".unverified." not in file.name:
                yield f"{run.name}: {file.name}", str(file)


def add_file(text: str, file: str | None) -> list[Any]:
    """A further line, and the picker is free for another."""
    lines = [line for line in (text or "").splitlines() if line.strip()]
    return ["\n".join([*lines, f"{file}:1"]) if file else text, None]


def file_and_strength(line: str) -> tuple[str, float]:
    """From "detail.safetensors:0.6"; without a number, or with a drive's colon only, at strength 1.

    Raises:
        UserError: if the strength is no finite number.
    """
    path, colon, number = line.rpartition(":")
    if not colon or "\\" in number or "/" in number:
        return line, 1.0
    try:
        strength = float(number)
    except ValueError:
        strength = math.nan
    if not path or not math.isfinite(strength):
        raise UserError(f"{number!r} is no strength", line, "Write a path and a number, as in detail.safetensors:0.6.")
    return path, strength


# ---------------------------------------------------------------------------------------------------------------------
# pictures


def shots(runs: Path, awaited: Sequence[Path]) -> str:
    """The newest pictures with their settings, after those that are yet to come."""
    folder = drawn_folder(runs)
    waiting = sum(not file.is_file() for file in awaited)
    newest = sorted(folder.glob("*.png"), key=lambda file: file.stat().st_mtime_ns, reverse=True)
    items = ['<li><span class="waiting">waiting</span></li>'] * waiting
    items += [_shot(file) for file in newest[:_SHOWN]]
    return f'<ul class="shots">{"".join(items)}</ul>' if items else "<p>Nothing was drawn yet.</p>"


@lru_cache(maxsize=1000)  # a picture that was drawn never changes
def _shot(file: Path) -> str:
    order = settings_of(file)
    if order is None:
        return f"<li>{cell(drawn_url(file), file.stem)}<p>Its settings cannot be read.</p></li>"
    prompt = order.prompts[0] or "(empty prompt)"
    told_apart = f"{prompt}, seed {order.seeds[0]}"
    return (
        f"<li>{cell(drawn_url(file), told_apart)}<p><strong>{esc(prompt)}</strong></p>"
        f"<p>{esc(how_drawn(order))}</p>"
        f'<button type="button" class="load" data-file="{esc(file.name)}" '
        f'aria-label="Load the settings of {esc(told_apart)}">Load these settings</button></li>'
    )


def how_drawn(order: PictureOrder) -> str:
    """Everything that makes a picture, in one line."""
    look = order.look
    by = f"{Path(order.run).name}, step {order.step} at {order.strength:g}" if order.run else order.base
    parts = [
        by,
        *(f"with {Path(path).name} at {strength:g}" for path, strength in order.loras),
        f"seed {order.seeds[0]}",
        f"{look.steps} steps of {SAMPLERS[look.sampler]}",
        f"guidance {look.guidance:g}",
        *([f"{look.size} pixels"] if look.size else []),
        *([f"not: {look.negative_prompt}"] if look.negative_prompt else []),
    ]
    return ", ".join(parts) + "."
