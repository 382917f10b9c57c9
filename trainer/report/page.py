"""The page: what there is to know of a run, from its images to the command that makes it again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

from ..files import write_text
from ..jobs import RunFolder
from .dataset import dataset
from .exports import exports
from .facts import RunFacts
from .leaks import leaks
from .settings import plan
from .style import CSS
from .surroundings import environment, repeat
from .training import preview, samples, training
from .wall import newest_choice, wall
from .words import pairs

FILE = "report.html"
_SECTIONS: tuple[Callable[[RunFacts], str], ...] = (
    *(dataset, plan, training, samples, wall, leaks),
    *(exports, environment, repeat),
)
_TITLES = {
    "dataset": "Dataset",
    "plan": "Plan and settings",
    "training": "Training",
    "samples": "Samples",
    "wall": "Which checkpoint",
    "leaks": "What leaks",
    "exports": "Exports",
    "environment": "Environment",
    "repeat": "To repeat it",
}
_SHOWN_FIRST = 6
_SIGNS = {"done": "✓", "failed": "✕", "stopped": "❚❚", "interrupted": "!", "new": "○", "queued": "…"}


def write_report(run: RunFolder, file: Path | None = None, shows_paths: bool = False) -> Path:
    """Write the report of a run as it stands now, into its folder if no other file is named; returns the file.

    Raises:
        ConfigError: if the run's configuration cannot be read.
    """
    target = file or run.path / FILE
    write_text(target, report_of(run, shows_paths))
    return target


def report_of(run: RunFolder, shows_paths: bool = False) -> str:
    """The whole page as HTML, with its pictures in it. What is missing of a run is named in its place."""
    facts = RunFacts.of(run, shows_paths)
    links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title in _TITLES.items())
    body = "".join(part(facts) for part in _SECTIONS)
    title = f"{facts.say(run.name)}: a run's report"
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{title}</title><style>{CSS}</style></head><body>"
        f'{_header(facts)}<nav aria-label="Parts of this page"><ul>{links}</ul></nav>'
        f"<main>{body}</main>{_footer(facts)}</body></html>\n"
    )
    return page.encode("utf-8", "replace").decode()


def _header(facts: RunFacts) -> str:
    say, state = facts.say, facts.status.state
    sign = f'<span aria-hidden="true">{_SIGNS.get(state, "▶")}</span> '
    return (
        f'<header><p class="over">Lorasmith, a run\'s report</p><h1>{say(facts.run.name)} '
        f'<span class="chip {say(state)}">{sign}{say(state)}</span></h1>'
        f'<p class="lead">{say(facts.status.sentence)}</p>{pairs(_at_a_glance(facts))}{_strip(facts)}</header>'
    )


def _at_a_glance(facts: RunFacts) -> Iterator[tuple[str, str]]:
    say, config, plan = facts.say, facts.config, facts.plan
    base = plan.get("base", {})
    yield "Base", say(base.get("model") or config.base.model)
    yield "Images", say(plan.get("images") or len(facts.images.examples) or "")
    yield "Trigger", f"<bdi><code>{say(config.trigger)}</code></bdi>" if config.trigger else ""
    yield "Seed", say(config.seed)
    yield "Loss, smoothed", say(f"{facts.story.loss:.3g}" if facts.story.loss is not None else "")
    newest = newest_choice(facts)
    if newest and (best := newest[1].recommended):
        yield "Recommended", say(f"step {best.step} at {best.strength:g}")
    if chosen := facts.run.chosen:
        yield "Chosen by eye", say(f"step {chosen.step} at {chosen.strength:g}")


def _strip(facts: RunFacts) -> str:
    """The newest previews, above the untouched base's of the same prompts and seeds."""
    drawn = facts.story.samples
    if not drawn or not drawn[-1].step:
        return ""
    figures = []
    for number, prompt in enumerate(drawn[-1].prompts[:_SHOWN_FIRST]):
        after, before = preview(facts, drawn[-1].step, number), preview(facts, 0, number)
        if after and before:
            told = facts.say(prompt)
            figures.append(
                f'<figure><img src="{before}" alt="the base: {told}"><img src="{after}" alt="trained: {told}">'
                f"<figcaption><bdi>{told}</bdi></figcaption></figure>"
            )
    if not figures:
        return ""
    legend = f"In each pair: left the untouched base, right step {drawn[-1].step}; same prompt, same seed."
    return f'<div class="strip">{"".join(figures)}</div><p class="quiet">{legend}</p>'


def _footer(facts: RunFacts) -> str:
    hidden = "" if facts.say.shows_paths else " No path of the computer that wrote it is in it."
    now = f"{datetime.now():%Y-%m-%d %H:%M}"
    return (
        f"<footer><p>Written {now}. It needs no other file and no connection.{hidden} It holds captions and small "
        "copies of training images: share it as you would share these.</p></footer>"
    )
