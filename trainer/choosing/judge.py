"""Scores a wall that is drawn: every picture against the base's own and against the training images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from ...datasets.workers import Progress
from ..jobs import RunFolder
from ..painting.orders import Cell, WallOrder
from ..painting.studio import Studio
from ..painting.wall import without_trigger
from .choice import NULL_CAPTIONS, Choice, JudgedCell, JudgedPicture, Recommended, Scores, most_of_captions
from .eye import Eye, quietly, side_of
from .features import Features
from .likeness import LikenessScale
from .recommendation import contenders, recommend
from .scales import Scales, some_captions
from .training import TrainingImages, training_images


def judge_wall(order: WallOrder, studio: Studio, progress: Progress | None = None) -> Choice:
    """Draw what is missing of a wall and of what it is compared with, and score it. `progress` counts pictures drawn,
    of so many at most.

    Raises:
        UserError: if the training images are not there, or nothing of the wall was trained.
        RunError: if a checkpoint is not there, or the base has changed.
    """
    case = Case.of(order)
    missing = sum(not file.is_file() for file in case.files())
    total, done = missing + most_of_captions(order) - NULL_CAPTIONS, count(1)

    def drawn() -> None:
        if progress:
            progress(next(done), total)

    case.draw(studio, drawn)
    return case.choice(studio, drawn=drawn)


@dataclass(frozen=True)
class Case:
    """A wall, and what its pictures are compared with."""

    order: WallOrder
    images: TrainingImages
    triggers: tuple[str, ...]
    """Of the run."""

    @classmethod
    def of(cls, order: WallOrder) -> Case:
        """
        Raises:
            UserError: if the training images are not there.
        """
        run = RunFolder(Path(order.run))
        triggers = dict.fromkeys(data.trigger for data in run.read_config().data if data.trigger)
        return cls(order, training_images(run), tuple(triggers))

    @property
    def orders(self) -> tuple[WallOrder, WallOrder, WallOrder]:
        """The wall, the base's pictures of its prompts, and of training captions."""
        alone = self.order.of_the_base()
        captions = some_captions(self.images.captions)
        return self.order, alone, replace(alone, prompts=captions, seeds=self.order.seeds[:1])

    def of_captions(self, cell: JudgedCell, captions: tuple[str, ...]) -> WallOrder:
        """What a cell makes of some training captions, on the noise on which the base has drawn them."""
        seeds = self.order.seeds[:1]
        return replace(self.order, steps=(cell.step,), strengths=(cell.strength,), prompts=captions, seeds=seeds)

    @property
    def is_leak(self) -> bool:
        """Whether the run has a trigger that no prompt holds."""
        texts, triggers = self.order.prompts, self.triggers
        return bool(triggers) and all(without_trigger(text, each) == text for text in texts for each in triggers)

    def files(self) -> set[Path]:
        """All pictures that have to be drawn."""
        return {file for order in self.orders for file in order.files().values()}

    def draw(
        self, studio: Studio, drawn: Callable[[], None] = lambda: None, after_step: Callable[[], None] = lambda: None
    ) -> None:
        """Draw what is missing of them, as `Studio.draw` does."""
        for order in self.orders:
            studio.draw(order, order.files(), drawn, after_step)

    def choice(
        self,
        studio: Studio,
        progress: Progress = quietly,
        drawn: Callable[[], None] = lambda: None,
        after_step: Callable[[], None] = lambda: None,
    ) -> Choice:
        """Score the wall, whose pictures are all there; `progress` counts those that were looked at. What the best
        cells make of training captions is drawn meanwhile."""
        studio.prepare(self.order)
        wall, *compared = (order.cells() for order in self.orders)
        total = sum(cell.strength != 0 for cell in wall) + sum(map(len, compared)) + len(self.images.examples)
        total += most_of_captions(self.order) - NULL_CAPTIONS
        judge = Judge.of(self, Eye(studio.vae, total, progress))
        choice = judge.choice(lambda order: studio.draw(order, order.files(), drawn, after_step))
        progress(total, total)  # there may have been less to look at
        return choice

    def judge(self, studio: Studio) -> Judge:
        """To score other pictures of its prompts than those of the wall; the base's are all there."""
        studio.prepare(self.order)
        return Judge.of(self, Eye(studio.vae))


@dataclass(frozen=True, eq=False)
class Judge:
    """A wall, the scales, and the base's own pictures."""

    case: Case
    eye: Eye
    base: Features
    """Of the wall's prompts, seed by seed within each."""
    scales: Scales
    likeness: LikenessScale | None
    """None where no captions tell."""
    base_pictures: int

    @classmethod
    def of(cls, case: Case, eye: Eye) -> Judge:
        _, alone, captioned = case.orders
        pictures = list(alone.files().values())
        base, others = eye.drawn(pictures), eye.drawn(list(captioned.files().values()))
        training = eye.true(case.images, side_of(pictures[0]))
        asked = [cell.prompt for one in (alone, captioned) for cell in one.cells()]
        scales = Scales.fit(base, others, training, asked, case.images.captions)
        likeness = LikenessScale.fit(others, captioned.prompts, training, case.images.captions)
        return cls(case, eye, base, scales, likeness, len(asked))

    def choice(self, draw: Callable[[WallOrder], None]) -> Choice:
        """`draw` draws what is missing of pictures that turn out to be needed."""
        cells, images = tuple(self._cells()), self.case.images
        if self.scales.style.is_known and not self.case.is_leak:
            cells = self._with_likeness(cells, draw)
        verdict = recommend(cells, self.scales.style.is_known, self.case.is_leak)
        best = verdict.cell
        return Choice(
            cells=cells,
            recommended=Recommended(best.step, best.strength) if best else None,
            reason=verdict.reason,
            is_overfitted=verdict.is_overfitted,
            images=len(images.examples),
            images_of=images.of,
            base_pictures=self.base_pictures,
            is_leak=self.case.is_leak,
        )

    def _cells(self) -> Iterator[JudgedCell]:
        order = self.case.order
        files = order.files()
        for step in order.steps:
            for strength in filter(None, order.strengths):
                asked = [Cell(step, strength, prompt, seed) for prompt in order.prompts for seed in order.seeds]
                pictures = self.judged({cell: files[cell] for cell in asked}, self.base)
                yield JudgedCell(step, strength, Scores.mean(one.scores for one in pictures), pictures)

    def _with_likeness(self, cells: Sequence[JudgedCell], draw: Callable[[WallOrder], None]) -> tuple[JudgedCell, ...]:
        """With that of those which may be the best; a single one need not be told from others."""
        looked_at = contenders(cells)
        if self.likeness is None or len(looked_at) < 2:
            return tuple(cells)
        reached: dict[str, tuple[float, ...]] = {}
        for cell in looked_at:
            order = self.case.of_captions(cell, self.likeness.captions)
            draw(order)
            reached[cell.title] = tuple(self.likeness.reached(self.eye.drawn(list(order.files().values()))))
        return tuple(replace(cell, likeness=reached.get(cell.title, ())) for cell in cells)

    def judged(self, files: Mapping[Cell, Path], base: Features) -> tuple[JudgedPicture, ...]:
        """Pictures, in the order of the base's own of the same prompts and seeds."""
        drawn = self.eye.drawn(list(files.values()))
        nearest = [self.case.images.examples[row].name for row in self.scales.content.nearest(drawn)]
        told = zip(files, self.scales.scores(drawn, base), nearest, strict=True)
        return tuple(JudgedPicture(cell.prompt, cell.seed, scores, name) for cell, scores, name in told)
