"""Finds strengths by block, and across checkpoints, that do better than one strength for all: by what it draws.

The scores are those of a wall, for the same prompts and noise, and so is the rule. From a wall's recommended cell the
search goes block by block (`search.py`); then the mean of the last checkpoints is tried at the best strengths. Every
picture is kept under a name made of all that makes it, so that a search that was interrupted goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...datasets.workers import Progress
from ..config import RunConfig
from ..errors import RunError, UserError
from ..jobs import RunFolder
from ..painting.orders import Cell, WallOrder
from ..painting.studio import Studio
from ..painting.wall import wall_order
from ..run import saved_step
from ..strengths import Strengths
from .choice import Scores, read_choice
from .features import Features
from .judge import Case, Judge
from .mixing import Mixer, Sizes, share_of
from .mixture import Mixture
from .search import GRID, Layers, descend, leader
from .tuned import Tried, Tuned, decided

CONFIRMED_BY = 2
"""Seeds besides those of the search, for what has come out of it."""
_MEANS = (2, 3)
"""Of so many checkpoints, up to that of the start."""


@dataclass(frozen=True)
class Task:
    """Where a search starts, and what it may cost."""

    run: RunFolder
    order: WallOrder
    """The start, as a wall of one cell: prompts, seeds and look."""
    told: str
    """What the start is, in words."""
    rank: int
    """Of the plain LoRA that is made of another kind of adapter; 0: none is."""
    most: int
    """Pictures that may be drawn."""

    @property
    def start(self) -> Mixture:
        return Mixture(self.order.steps, Strengths(self.order.strengths[0]))

    @property
    def cells(self) -> list[Cell]:
        """Prompts and seeds that are drawn for each candidate."""
        return self.order.cells()

    @property
    def others(self) -> WallOrder:
        """The start with other noise."""
        taken, first = set(self.order.seeds), max(self.order.seeds)
        after = [seed for seed in range(first + 1, first + 1 + CONFIRMED_BY) if seed < 2**63]
        free = after + [seed for seed in range(len(taken) + CONFIRMED_BY) if seed not in taken]
        return replace(self.order, seeds=tuple(free[:CONFIRMED_BY]))

    @property
    def means(self) -> list[tuple[int, ...]]:
        """The checkpoints of each mean that is tried."""
        saved = [step for step in self.run.saved_steps() if step <= self.order.steps[0]]
        return [tuple(saved[-count:]) for count in _MEANS if len(saved) >= count] if self.why_no_means == "" else []

    @property
    def why_no_means(self) -> str:
        kind = self.run.read_config().adapter.kind
        if kind not in ("lora", "full") and not self.rank:
            return f"No mean of checkpoints was tried: that of a {kind} is a plain LoRA, whose rank --bake gives."
        if min(self.run.saved_steps()) >= self.order.steps[0]:
            return "No mean of checkpoints was tried: there is one alone up to this step."
        return ""


def task_of(
    run: RunFolder,
    prompts: Sequence[str] = (),
    seeds: Sequence[int] = (),
    step: int | None = None,
    strength: float | None = None,
    rank: int = 0,
    most: int = 120,
) -> Task:
    """A search from a checkpoint at a strength; from what the run's wall recommends, if neither is given and there is
    such a wall; else from the newest checkpoint at 1.

    Raises:
        RunError: if there is no such checkpoint.
        UserError: for a rank without effect or one that is missing, or if the start is the base alone.
    """
    config = run.read_config()
    _require_rank(config, rank)
    wall = wall_order(run, prompts=prompts or config.sample.prompts, seeds=seeds)
    choice = read_choice(wall) if step is None and strength is None else None
    if choice and choice.recommended:
        start, told = choice.recommended, "which the wall recommends"
        found, at = start.step, start.strength
    else:
        found, at = saved_step(run, step), 1.0 if strength is None else strength
        is_given = step is not None or strength is not None
        told = "as asked" if is_given else "for no wall of these prompts recommends another: lorasmith compare draws it"
    if not at:
        raise UserError("0 is the base alone", "--strength", "Start from a strength that is not 0.")
    return Task(run, replace(wall, steps=(found,), strengths=(float(at),)), told, rank, most)


def _require_rank(config: RunConfig, rank: int) -> None:
    kind = config.adapter.kind
    if kind == "full" and rank:
        raise UserError("has no effect: the run trained the base's own weights", "--bake", "Remove it.")
    if kind == "dora" and not rank:
        fix = "Have a plain LoRA made of it, which has: add --bake RANK."
        raise UserError("a DoRA has no half: no file of its kind holds it at other strengths", "--bake", fix)


class Tuning:
    """A search that goes on: what may still be drawn, and what was found."""

    _judge: Judge
    """Once it has begun: the scales, which are the same for all that are tried."""
    _whole: Sizes
    """Likewise: the sizes of what was trained, at the start's checkpoint."""

    def __init__(self, task: Task, studio: Studio, progress: Progress | None = None) -> None:
        """Load the base, and see what there is to search. `progress` counts pictures drawn.

        Raises:
            UserError: if the training images are not there, or too few pictures may be drawn.
            RunError: if a checkpoint is not there, or the base has changed.
        """
        self.task = task
        self._case = Case.of(task.order)
        if self._case.is_leak:
            raise UserError("no prompt holds the run's trigger", "--prompt", "Ask for the style: put the trigger in.")
        self._studio, self._progress = studio, progress
        self.mixer = Mixer(task.order, studio, task.rank)
        self.layers = Layers(self.mixer.layers(task.order.steps[0]))
        self._drawn, self._reserved = 0, len(task.means) * len(task.cells) + self._to_confirm
        self._notes: list[str] = []
        if task.most < (least := self.compared_with + self._reserved + len(task.cells)):
            what = f"{task.most} pictures are too few to try anything"
            raise UserError(what, "--pictures", f"Give {least} at least, or fewer prompts and seeds.")

    @property
    def compared_with(self) -> int:
        """Pictures of the start, of the base and of training captions that are not there yet."""
        return sum(not file.is_file() for file in self._case.files())

    @property
    def _to_confirm(self) -> int:
        """At most."""
        return 3 * len(self.task.others.prompts) * CONFIRMED_BY

    @property
    def foreseen(self) -> str:
        """What it takes at most, in words."""
        task, blocks = self.task, self.layers.blocks
        each = len(task.cells)
        return (
            f"Start: {task.start.title}, {task.told}.\n"
            f"{len(blocks)} blocks: {', '.join(blocks)}.\n"
            f"At most {task.most} pictures are drawn: {self.compared_with} to compare with, {each} for each that is "
            f"tried (once through all blocks at {len(GRID)} strengths: up to {each * len(blocks) * len(GRID)}), "
            f"{each * len(task.means)} for means of checkpoints, {self._to_confirm} to confirm what was found."
        )

    def search(self) -> Tuned:
        """
        Raises:
            RunError: if the base's own pictures have the style already.
        """
        task, start = self.task, self.task.start
        self._case.draw(self._studio, self._one_more)
        self._judge = self._case.judge(self._studio)
        if not self._judge.scales.style.is_known:
            what = "the base's own pictures are as near to the training images as these are to each other"
            raise RunError(what, str(task.run.path), "No gain of style can be told: choose strengths by eye.")
        self._whole = self.mixer.sizes(start.steps)
        tried = [self._tried(start)]

        def attempt(strengths: Strengths) -> Tried | None:
            mixture = replace(start, strengths=strengths)
            if not self._can_draw(mixture):
                self._notes.append(f"Not all could be tried with {task.most} pictures: --pictures allows more.")
                return None
            tried.append(self._tried(mixture))
            return tried[-1]

        descend(tried[0], self.layers, attempt)
        best = leader(tried)
        for steps in task.means:
            self._reserved -= len(task.cells)
            tried.append(self._tried(replace(best.mixture, steps=steps)))
        if task.why_no_means:
            self._notes.append(task.why_no_means)
        self._reserved = 0
        verdict = decided(tried, self._confirmed)
        command = verdict.best.mixture.command(task.run.path, task.rank)
        return Tuned(tuple(tried), verdict, command, self._drawn, tuple(self._notes))

    def write(self, tuned: Tuned, file: Path) -> Path:
        """The best as one file, verified; raises as `Mixer.write`."""
        self.mixer.write(tuned.verdict.best.mixture, file)
        return file

    def _can_draw(self, mixture: Mixture) -> bool:
        missing = sum(not file.is_file() for file in self._files(mixture, self.task.order).values())
        return self._drawn + missing + self._reserved <= self.task.most

    def _one_more(self) -> None:
        self._drawn += 1
        if self._progress:
            self._progress(self._drawn, self.task.most)

    def _files(self, mixture: Mixture, order: WallOrder) -> dict[Cell, Path]:
        return mixture.files(order, order.cells(), self.task.rank)

    def _tried(self, mixture: Mixture) -> Tried:
        return self._scored(mixture, self.task.order, self._judge.base)

    def _scored(self, mixture: Mixture, order: WallOrder, base: Features) -> Tried:
        """Drawn, and held against the base's own pictures of an order."""
        files = self._files(mixture, order)
        self.mixer.draw(mixture, files, self._one_more)
        pictures = self._judge.judged(files, base)
        sizes = self.mixer.sizes(mixture.steps) if mixture.is_mean else self._whole
        change = share_of(sizes, mixture.strengths, self._whole)
        return Tried(mixture, change, Scores.mean(one.scores for one in pictures), pictures)

    def _confirmed(self, best: Tried) -> tuple[Tried, Tried]:
        """The start and what looked best, with other noise."""
        order = self.task.others
        alone = order.of_the_base().files()
        self._studio.draw(order.of_the_base(), alone, self._one_more)
        base = self._judge.eye.drawn(list(alone.values()))
        return self._scored(self.task.start, order, base), self._scored(best.mixture, order, base)
