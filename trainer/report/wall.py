"""What was found when checkpoints and strengths were compared last: scores, what they recommend, and the pictures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from ..choosing.choice import Choice, choice_file
from ..choosing.page import looked_at, meanings, summary, walls
from ..errors import LorasmithError
from ..jsonfile import read_json
from ..painting.orders import Look, WallOrder, files_of
from .facts import RunFacts
from .words import missing, paragraph, section

_CHOICE = TypeAdapter(Choice)


def wall(facts: RunFacts) -> str:
    return section("wall", "Which checkpoint, which strength", *_chosen(facts), *_wall(facts))


def _chosen(facts: RunFacts) -> Iterator[str]:
    """What a person has chosen by eye."""
    if chosen := facts.run.chosen:
        yield paragraph(facts.say(f"Chosen by eye: step {chosen.step} at strength {chosen.strength:g}."))


def _wall(facts: RunFacts) -> Iterator[str]:
    newest = newest_choice(facts)
    if newest is None:
        yield missing(
            f"The run was not compared yet: <code>lorasmith compare {facts.say(facts.run.name)}</code> draws "
            "checkpoints at several strengths, scores each, and recommends one."
        )
        return
    file, choice = newest
    order, is_drawn = _order(facts, choice, file)
    yield f'<p class="lead">{facts.say(choice.reason)}</p>'
    yield summary(order, choice)
    yield walls(order, choice) if is_drawn else missing("Its pictures are not there any more, or are others now.")
    yield f'<div class="meanings">{meanings()}</div>' + paragraph(facts.say(looked_at(choice)))


def newest_choice(facts: RunFacts) -> tuple[Path, Choice] | None:
    """The file that was written last of those that can be read, and what it holds."""
    files = (facts.run.path / "compare").glob("wall-*.json")
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        with suppress(OSError, ValueError, ValidationError):
            choice = _CHOICE.validate_python(read_json(file))
            if choice.cells and all(cell.pictures for cell in choice.cells):
                return file, choice
    return None


def _order(facts: RunFacts, choice: Choice, file: Path) -> tuple[WallOrder, bool]:
    """The wall that was scored, and whether its pictures are those of today's checkpoints: the name of its file is made
    of all that is on it."""
    drawn, look = choice.cells[0].pictures, Look.of(facts.config.sample)
    strengths = tuple(dict.fromkeys(cell.strength for cell in choice.cells))
    orders = [
        WallOrder(
            run=str(facts.run.path),
            steps=tuple(dict.fromkeys(cell.step for cell in choice.cells)),
            strengths=shown,
            prompts=tuple(dict.fromkeys(one.prompt for one in drawn)),
            seeds=tuple(dict.fromkeys(one.seed for one in drawn)),
            look=look,
        )
        for shown in ((0.0, *strengths), strengths)
    ]
    with suppress(LorasmithError):  # a checkpoint may be gone
        for order in orders:
            files = files_of(order, facts.run.path.parent).values()
            if choice_file(order).name == file.name and all(picture.is_file() for picture in files):
                return order, True
    return orders[1], False
