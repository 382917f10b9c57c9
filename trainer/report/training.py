"""How the training went: its state, its curves, what it warned of, and the previews it drew on the way."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from PIL import Image

from ...datasets.images import DECODING_ERRORS, formats_here
from ..console import scores_sentence
from ..events import Failed, Sampled
from ..sharing.pictures import data_uri
from ..status import duration
from ..story import comparable
from .curves import chart, loss_sentence, losses, rates, rates_sentence, scores_by_step
from .facts import RunFacts
from .words import missing, pairs, paragraph, section, table

MOST_PICTURES = 120
"""Previews on the page; of more, steps are left out, evenly."""
_FEWEST_ROWS, _MOST_ROWS = 3, 16


def training(facts: RunFacts) -> str:
    return section("training", "Training", _course(facts), *_failure(facts), *_curves(facts), *_warnings(facts))


def _course(facts: RunFacts) -> str:
    story, say, steps = facts.story, facts.say, facts.story.steps
    memory = max(steps.memory_mib, default=0)
    times = f"{_moment(story.started)} to {_moment(story.last)}" if story.started and story.last else ""
    rows = [
        ("State", say(facts.status.sentence)),
        ("Steps taken", say(f"{story.step:,}" + (f" of {story.plan.steps:,}" if story.plan else ""))),
        ("Images seen", say(f"{steps.images[-1]:,}" if steps else "")),
        ("From, to", say(times)),
        ("In steps alone", say(f"{duration(sum(steps.seconds))}, {_pace(facts)}" if steps else "")),
        ("Memory used at most", say(f"{memory / 1024:.1f} GB" if memory else "")),
        ("Checkpoints", say(", ".join(map(str, facts.run.saved_steps())) or "none")),
        ("Processes", say(facts.processes if facts.processes > 1 else "")),
    ]
    return pairs(rows)


def _pace(facts: RunFacts) -> str:
    seconds = facts.story.steps.seconds
    return f"{sum(seconds) / len(seconds):.3g} s a step"


def _moment(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M}"


def _failure(facts: RunFacts) -> Iterator[str]:
    """What ended the run before its time, and what mends it."""
    word = facts.story.last_word
    if isinstance(word, Failed) and facts.status.state == "failed":
        fix = f"<br>{facts.say(word.fix)}" if word.fix else ""
        yield f'<p class="notice bad"><strong>It failed.</strong> {facts.say(word.message)}{fix}</p>'


def _curves(facts: RunFacts) -> Iterator[str]:
    points, say = facts.story.curve(), facts.say
    if len(points) < 2:
        yield missing("There are no curves yet: they begin with the second step.")
        return
    told, rated = say(loss_sentence(points)), say(rates_sentence(points))
    yield chart(losses(points, facts.story.validations), told, "Loss of each step, and smoothed") + paragraph(told)
    if scores := comparable(facts.story.scores):
        scored = say(f"Scores of {scores[-1].pictures} pictures each time: {scores_sentence(scores[-1])}.")
        yield chart(scores_by_step(scores), scored, "Style, prompt and copying of pictures") + paragraph(scored)
    named = [line.named(say(line.name)) for line in rates(points)]
    yield chart(named, rated, "Learning rate of each part") + paragraph(rated)


def _warnings(facts: RunFacts) -> Iterator[str]:
    """Each once: those of the plan, and those that came on the way."""
    told = dict.fromkeys([*facts.plan.get("warnings", []), *facts.story.warnings])
    yield "<h3>Warnings</h3>"
    if not told:
        yield paragraph("None was told.")
    yield "".join(f'<p class="notice care">{facts.say(warning)}</p>' for warning in told)


# ---------------------------------------------------------------------------------------------------------------------


def samples(facts: RunFacts) -> str:
    return section("samples", "Samples over time", *_samples(facts))


def _samples(facts: RunFacts) -> Iterator[str]:
    drawn, say = facts.story.samples, facts.say
    if not drawn:
        how = "They are switched off (sample.every = 0)." if not facts.config.sample.every else ""
        yield missing(say(f"No previews were drawn. {how}".strip()))
        return
    prompts = drawn[-1].prompts
    shown = _spread(drawn, max(_FEWEST_ROWS, min(_MOST_ROWS, MOST_PICTURES // max(1, len(prompts)))))
    some = f" {len(shown)} of {len(drawn)} rounds." if len(shown) < len(drawn) else ""
    yield paragraph(f"Always the same prompts and seeds; the first row is the untouched base.{some}")
    head = ["step", *(f"<bdi>{say(prompt) or '(no prompt)'}</bdi>" for prompt in prompts)]
    yield table(head, ([_step(one.step), *_row(facts, one)] for one in shown), "pictures")


def _spread(drawn: list[Sampled], rows: int) -> list[Sampled]:
    """The first, the last, and some between them."""
    if len(drawn) <= rows:
        return drawn
    return [drawn[round(row * (len(drawn) - 1) / (rows - 1))] for row in range(rows)]


def _step(step: int) -> str:
    return f"{step:,}" if step else "0, the base"


def _row(facts: RunFacts, one: Sampled) -> Iterator[str]:
    for number, prompt in enumerate(one.prompts):
        picture = preview(facts, one.step, number)
        yield f'<img src="{picture}" alt="step {one.step}: {facts.say(prompt)}">' if picture else "removed"


def preview(facts: RunFacts, step: int, number: int) -> str:
    """A preview as a data URI; empty if its file is gone or no picture."""
    file = facts.run.samples(step) / f"{number:02d}.png"
    try:
        with Image.open(file, formats=formats_here()) as picture:
            return data_uri(picture)
    except DECODING_ERRORS:
        return ""
