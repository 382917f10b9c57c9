"""Rating: two pictures of one prompt, of which one is better; and the run that learns from what was said."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import combinations
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ...trainer.config import RunConfig
from ...trainer.errors import UserError
from ...trainer.jobs import RunFolder, preview_files
from ...trainer.painting.easel import Ticket
from ...trainer.painting.orders import Look, WallOrder
from ...trainer.preferences.ratings import Neither, Pair, Rating, Ratings, Thumb
from ...trainer.preferences.refining import refined
from ..context import FOLLOWING, QUIETLY, Context, as_news, changed_at, readable_config, told
from ..html import esc, notice, picture, problems
from ..train.starting import start_document
from ..urls import picture_url
from .choices import checkpoints_of, prompts_of
from .drawing import Views, as_html, changed, last_ticket, progress

CSS = """
  .two { display: grid; gap: 1rem; grid-template-columns: repeat(2, minmax(0, 320px)); }
  .two figure { margin: 0; }
  .two img { width: 100%; aspect-ratio: 1; object-fit: contain; border: 1px solid var(--line); border-radius: 4px; }
  .two figcaption { font-size: 0.9rem; color: var(--quiet); }
"""
ENOUGH = 20
"""Pairs from which on a run can be expected to learn something that holds for other prompts."""
_OF_EACH_PROMPT = 24
"""The newest pictures that are compared with each other."""
_SEEDS_AT_ONCE = 4


# ---------------------------------------------------------------------------------------------------------------------
# what can be rated


@dataclass(frozen=True)
class Candidate:
    """A picture that a run has drawn."""

    file: Path
    prompt: str
    seed: int
    step: int
    size: str

    @property
    def key(self) -> tuple[str, str]:
        """Pictures with the same can be compared."""
        return self.prompt, self.size


def candidates(run: RunFolder) -> list[Candidate]:
    """Previews and pictures of walls that show what the run has trained; not those of the base alone."""
    samples = sorted((run.path / "samples").glob("step-*"))
    files = [file for folder in samples for file in preview_files(folder)]
    files += sorted(file for file in (run.path / "compare").glob("*.png") if re.fullmatch(r"[0-9a-f]{16}", file.stem))
    found = (_candidate(file, changed_at(file)) for file in files)
    return [one for one in found if one]


@lru_cache(maxsize=5000)  # a picture is read again when it was written anew
def _candidate(file: Path, written: int) -> Candidate | None:  # noqa: ARG001
    try:
        with Image.open(file) as opened:
            told = {key: value for key, value in opened.info.items() if isinstance(value, str)}
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    step = re.search(r" step (\d+)", told.get("lora", ""))
    if step is None or "positive_prompt" not in told or not told.get("seed", "").isdecimal():
        return None
    return Candidate(file, told["positive_prompt"], int(told["seed"]), int(step[1]), told.get("size", ""))


def next_pair(
    found: Sequence[Candidate], said: Sequence[Rating], ratings: Ratings
) -> tuple[Candidate, Candidate] | None:
    """Two pictures of one prompt that nobody has compared yet: those first that were compared least, of checkpoints as
    late as possible; none if there are no more. Which is left does not follow from what they are."""
    done = {frozenset(rating.pictures) for rating in said}
    times: dict[str, int] = {}
    for rating in said:
        for name in rating.pictures:
            times[name] = times.get(name, 0) + 1

    def order(pair: tuple[Candidate, Candidate]) -> tuple[int, int, str]:
        names = [ratings.name_of(one.file) for one in pair]
        return sum(times.get(name, 0) for name in names), -sum(one.step for one in pair), _mark(*names)

    fresh = (pair for pair in _pairs(found) if frozenset(ratings.name_of(one.file) for one in pair) not in done)
    pair = min(fresh, key=order, default=None)
    if pair and int(_mark(*(ratings.name_of(one.file) for one in pair)), 16) % 2:
        return pair[1], pair[0]
    return pair


def _pairs(found: Sequence[Candidate]) -> Iterator[tuple[Candidate, Candidate]]:
    alike: dict[tuple[str, str], list[Candidate]] = {}
    for one in found:
        alike.setdefault(one.key, []).append(one)
    for several in alike.values():
        yield from combinations(sorted(several, key=lambda one: one.step)[-_OF_EACH_PROMPT:], 2)


def _mark(*names: str) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# the tab


@dataclass(frozen=True)
class Seen:
    """What was sent to one browser tab, so that it is not sent again."""

    run: str | None = None
    keys: dict[str, Hashable] = field(default_factory=dict)


class RatePage:
    """The components of the tab, and what they do."""

    def __init__(self, context: Context) -> None:
        self.context = context
        gr.Markdown(
            "Say which of two pictures is better. What you say is kept with the run, and a new run can learn from it."
        )
        self.nothing = gr.HTML(padding=False)
        with gr.Column(visible=False) as self.body:
            self.two = gr.HTML(css_template=CSS, padding=False)
            with gr.Row():
                self.left = gr.Button("Left is better", variant="primary")
                self.right = gr.Button("Right is better", variant="primary")
                self.neither = gr.Button("Neither")
            with gr.Row():
                self.left_up, self.left_down = gr.Button("Thumb up for left"), gr.Button("Thumb down for left")
                self.right_up, self.right_down = gr.Button("Thumb up for right"), gr.Button("Thumb down for right")
        self.counted = gr.HTML(padding=False)
        with gr.Row():
            self.undo = gr.Button("Take back the last")
            self.refine = gr.Button("Refine with these", variant="primary")
        self.refining = gr.HTML(padding=False)
        self._add_drawing()
        self.shown = gr.State(())
        self.seen = gr.State(Seen())

    def _add_drawing(self) -> None:
        with gr.Accordion("Draw pictures to rate", open=False):
            self.prompts = gr.Textbox(
                label="Prompts to rate", lines=4, info="One on each line. More prompts teach more than more pictures."
            )
            self.seeds = gr.Slider(
                2, 8, _SEEDS_AT_ONCE, step=1, label="Pictures of each prompt", info="Each with a new seed."
            )
            with gr.Row():
                self.draw = gr.Button("Draw these")
                self.cancel = gr.Button("Cancel these", visible=False)
            self.progress = gr.HTML(padding=False, visible=False)

    @property
    def views(self) -> dict[str, Any]:
        return {
            "nothing": self.nothing,
            "body": self.body,
            "two": self.two,
            "counted": self.counted,
            "undo": self.undo,
            "refine": self.refine,
            "refining": self.refining,
            "prompts": self.prompts,
            "draw": self.draw,
            "cancel": self.cancel,
            "progress": self.progress,
        }

    # what happens

    def listen(self, news: gr.State) -> None:
        picked = self.context.picked
        follow: dict[str, Any] = {
            "inputs": [picked, self.seen],
            "outputs": [*self.views.values(), self.shown, self.seen],
            **FOLLOWING,
        }
        news.change(self.follow, **follow)
        for button, say in (
            (self.left, _first_is_better),
            (self.right, _second_is_better),
            (self.neither, _neither),
            (self.left_up, partial(_thumb, place=0, up=True)),
            (self.left_down, partial(_thumb, place=0, up=False)),
            (self.right_up, partial(_thumb, place=1, up=True)),
            (self.right_down, partial(_thumb, place=1, up=False)),
        ):
            button.click(partial(self.rate, say), [picked, self.shown], **QUIETLY).then(self.follow, **follow)
        self.undo.click(self.take_back, picked, **QUIETLY).then(self.follow, **follow)
        self.refine.click(self.start, picked, self.refining, api_visibility="private").then(self.follow, **follow)
        self.draw.click(self.place, [picked, self.prompts, self.seeds], **QUIETLY).then(self.follow, **follow)
        self.cancel.click(self.stop, picked, **QUIETLY).then(self.follow, **follow)

    @as_news
    def look(self, name: str | None) -> Any:
        """What changes when there is something new to rate or said."""
        run = self.context.run(name)
        if run is None:
            return ("no run",)
        last = self._last(run)
        written = [changed_at(run.path / "samples"), changed_at(run.path / "compare"), changed_at(Ratings.of(run).file)]
        return name, *written, checkpoints_of(run), last and last.state()

    @told
    def follow(self, name: str | None, seen: Seen) -> list[Any]:
        """The next two pictures, and what was said."""
        run = self.context.run(name)
        config = readable_config(run) if run else None
        shown: tuple[str, ...] = ()
        if run is None or not isinstance(config, RunConfig):
            views: Views = {
                "nothing": as_html(notice("No run is picked", "Pick one at the top of the page.", kind="note")),
                "body": (False, gr.update(visible=False)),
                "counted": as_html(""),
            }
        else:
            try:
                views, shown = self._views(run)
            except UserError as error:  # of a file of ratings that somebody has changed
                views = {"nothing": as_html(problems(error)), "body": (False, gr.update(visible=False))}
            if seen.run != name:
                views |= {"prompts": (name, "\n".join(prompts_of(config))), "refining": (name, "")}
        sent, keys = changed(self.views, views, seen.keys if seen.run == name else {})
        return [*sent, shown, Seen(name, keys)]

    def _views(self, run: RunFolder) -> tuple[Views, tuple[str, ...]]:
        ratings = Ratings.of(run)
        said, found = ratings.standing(), candidates(run)
        pair = next_pair(found, said, ratings)
        last = self._last(run)
        drawn = last and last.state()
        active = bool(drawn and not drawn.has_ended)
        learned = sum(not isinstance(rating, Neither) for rating in said)
        names = tuple(ratings.name_of(one.file) for one in pair or ())
        views: Views = {
            "nothing": as_html("" if pair else _nothing_to_rate(found)),
            "body": (bool(pair), gr.update(visible=bool(pair))),
            "counted": as_html(counted(said)),
            "undo": (bool(said), gr.update(interactive=bool(said))),
            "refine": (bool(learned), gr.update(interactive=bool(learned))),
            "draw": (active, gr.update(interactive=not active)),
            "cancel": (active, gr.update(visible=active)),
            "progress": as_html(progress(drawn)),
        }
        return views | ({"two": as_html(two(run, *pair))} if pair else {}), names

    def _last(self, run: RunFolder) -> Ticket | None:
        return last_ticket(
            self.context.easel, lambda order: isinstance(order, WallOrder) and order.run == str(run.path)
        )

    @told
    def rate(self, say: Any, name: str | None, shown: Sequence[str]) -> None:
        """Keep what was said of the two pictures that were shown."""
        if len(shown) == 2:
            Ratings.of(self._run(name)).add(say(*shown))

    @told
    def take_back(self, name: str | None) -> None:
        Ratings.of(self._run(name)).undo()

    @told
    def start(self, name: str | None) -> str:
        """Put a run that learns from the ratings in the queue, and say how a terminal would."""
        run = self._run(name)
        new = start_document(self.context, refined(run, Ratings.of(run)))
        return (
            f"<p>{esc(new.name)} is in the queue: pick it at the top of the page, and see it on Train. "
            f"The same in a terminal: <code>lorasmith refine {esc(run.path)}</code></p>"
        )

    @told
    def place(self, name: str | None, prompts: str, seeds: int) -> None:
        """Ask for pictures with new seeds, by the checkpoint that would be refined."""
        run = self._run(name)
        config, saved = run.read_config(), checkpoints_of(run)
        asked = tuple(dict.fromkeys(line.strip() for line in prompts.splitlines() if line.strip()))
        if not asked:
            raise UserError("is empty", "Prompts to rate", "Write at least one.")
        if not saved:
            raise UserError("has no checkpoint yet", run.name, "Pictures can be drawn once the first is saved.")
        first = max((one.seed for one in candidates(run)), default=config.sample.seed) + 1
        step = run.chosen.step if run.chosen else saved[-1]
        new = tuple(range(first, first + int(seeds)))
        self.context.easel.place(WallOrder(str(run.path), (step,), (1.0,), asked, new, Look.of(config.sample)))

    def stop(self, name: str | None) -> None:
        run = self.context.run(name)
        if run and (last := self._last(run)):
            last.cancel()

    def _run(self, name: str | None) -> RunFolder:
        if run := self.context.run(name):
            return run
        raise UserError("no run is picked", "Run", "Pick one at the top of the page, or train one first.")


def _first_is_better(left: str, right: str) -> Rating:
    return Pair(better=left, worse=right)


def _second_is_better(left: str, right: str) -> Rating:
    return Pair(better=right, worse=left)


def _neither(left: str, right: str) -> Rating:
    return Neither(neither=[left, right])


def _thumb(left: str, right: str, place: int, up: bool) -> Rating:
    return Thumb(picture=(left, right)[place], up=up)


# ---------------------------------------------------------------------------------------------------------------------
# what is shown


def two(run: RunFolder, left: Candidate, right: Candidate) -> str:
    """Two pictures side by side. What they were drawn with is not told, for it is not to be judged by."""
    figures = "".join(
        f"<figure>{picture(picture_url(run, one.file), f'{side} picture of: {one.prompt}')}"
        f"<figcaption>{side}</figcaption></figure>"
        for side, one in (("Left", left), ("Right", right))
    )
    return f'<p>Prompt: {esc(left.prompt or "(empty)")}</p><div class="two">{figures}</div>'


def counted(said: Sequence[Rating]) -> str:
    """How much was said, and whether it is enough."""
    pairs, thumbs = (sum(isinstance(rating, kind) for rating in said) for kind in (Pair, Thumb))
    words = f"{pairs} {'pair' if pairs == 1 else 'pairs'} and {thumbs} {'thumb' if thumbs == 1 else 'thumbs'} so far."
    few = f" Below {ENOUGH} pairs of several prompts a run learns little that holds for others."
    return f'<p role="status">{words}{few if pairs < ENOUGH else ""}</p>'


def _nothing_to_rate(found: Sequence[Candidate]) -> str:
    what = "All pictures there are have been compared" if found else "There are no two pictures of one prompt yet"
    fix = "Draw more below, a wall with a second seed, or let the run draw previews."
    return notice(what, fix, kind="note")
