"""What leaks into prompts that do not ask for the style, where that was looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ..choosing.leakpage import leak_part
from ..choosing.leaks import Leaks, leak_cells, leak_order, leaks_file, read_leaks
from ..errors import LorasmithError
from ..painting.orders import WallOrder
from .facts import RunFacts
from .words import missing, section


def leaks(facts: RunFacts) -> str:
    return section("leaks", "What leaks", *_leaks(facts))


def _leaks(facts: RunFacts) -> Iterator[str]:
    files = (facts.run.path / "compare").glob("leaks-*.json")
    newest = sorted(files, key=lambda file: file.stat().st_mtime, reverse=True)
    read = ((file, found) for file in newest if (found := read_leaks(file)) and found.pictures)
    file, found = next(read, (None, None))
    if file is None or found is None:
        yield missing(
            "Whether the style comes without the trigger was not looked at yet: "
            f"<code>lorasmith leaks {facts.say(facts.run.name)}</code> does."
        )
    elif order := _order(facts, found, file):
        yield leak_part(order, found, facts.say)
    else:
        yield f'<p class="lead">{facts.say(found.sentence)}</p>'
        yield missing("Its pictures are not there any more, or are others now.")


def _order(facts: RunFacts, found: Leaks, file: Path) -> WallOrder | None:
    """What was drawn, if it is there still, and is of today's checkpoints."""
    with suppress(LorasmithError):
        prompts = [one.prompt for one in found.pictures]
        order = leak_order(facts.run, found.step, found.strength, prompts, found.seed)
        cells = [cell for one in found.pictures for cell in leak_cells(order, one.prompt, one.with_trigger)]
        if leaks_file(order).name == file.name and all(order.file(cell).is_file() for cell in cells):
            return order
    return None
