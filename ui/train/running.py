"""The run that is shown, as it goes on: its sentence, previews, curves and words, and what can be asked of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
import pandas as pd

from ...trainer.events import Scored, Validated
from ...trainer.jobs import RunFolder
from ...trainer.queue import go_on
from ...trainer.report.curves import loss_sentence, rates_sentence
from ...trainer.status import Status
from ...trainer.story import CurvePoint, Story, comparable
from ..context import QUIETLY, Context, told
from ..html import cell, chip, esc, notice, table
from ..urls import picture_url
from .reporting import report_html, report_news, save_report

SECONDS_BETWEEN_ANNOUNCEMENTS = 30
"""A sentence that changes each second would never let who listens to it do anything else."""
_SECONDS_BETWEEN_PLOTS = 10
"""While a run goes on; a plot that is drawn anew takes the browser longer than all else."""
MOST_ROWS = 32
"""Of previews that are shown: a run of days has thousands, and the browser holds a picture for each."""
_MOST_WARNINGS = 20
_LINES_OF_LOG = 200
_TAIL = 64_000  # bytes; more than so many lines usually are
_EXTEND_BY = 500


@dataclass(frozen=True)
class Asked:
    """What can be asked of a run by a button."""

    label: str
    when: Callable[[Status], bool]
    variant: str = "secondary"


BUTTONS = {
    "stop": Asked("Stop and save", lambda now: now.is_active and now.state != "exporting", "stop"),
    "save": Asked("Save now", lambda now: now.state in ("training", "sampling")),
    "sample": Asked("Sample now", lambda now: now.state in ("training", "saving")),
    "resume": Asked("Resume", lambda now: now.can_resume and now.state != "failed", "primary"),
    "again": Asked("Resume anyway", lambda now: now.state == "failed" and not now.overrides and now.saved_step > 0),
    "extend": Asked("Extend", lambda now: now.state in ("done", "stopped") and now.step > 0),
    "anew": Asked("Start over as a new run", lambda now: not now.is_active and now.state != "queued"),
    "leave": Asked("Take out of the queue", lambda now: now.state == "queued", "stop"),
    "report": Asked("Save a report", lambda _: True),
}


@dataclass
class Panel:
    """The components of the live panel, by what they show."""

    shown: dict[str, Any]
    buttons: dict[str, gr.Button]
    extend_by: gr.Number
    mend: gr.Button
    """Resumes a run that failed, with what mends it."""
    mend_anew: gr.Button
    """Takes its settings, with what mends it, for a new run."""
    answer: gr.HTML
    """What a click did."""


def running_panel(context: Context) -> Panel:
    """The panel of the run that is picked; `view` says what it shows."""
    with gr.Column(visible=False) as column:
        shown: dict[str, Any] = {"panel": column}
        shown["heading"] = gr.HTML(padding=False)
        shown["sentence"] = gr.HTML(padding=False)
        shown["announced"] = gr.HTML('<p role="status" aria-live="polite"></p>', padding=False, elem_classes="sr-only")
        shown["failure"] = gr.HTML(padding=False, visible=False)
        with gr.Row():
            mend = gr.Button(variant="primary", visible=False)
            mend_anew = gr.Button(visible=False)
        with gr.Row():
            buttons = {
                name: gr.Button(asked.label, variant=asked.variant, visible=False, min_width=120)  # pyright: ignore[reportArgumentType]
                for name, asked in BUTTONS.items()
                if name != "extend"
            }
        with gr.Row(visible=False, equal_height=True) as extension:
            extend_by = gr.Number(_EXTEND_BY, label="Further steps", precision=0, minimum=1, min_width=120)
            buttons["extend"] = gr.Button(BUTTONS["extend"].label, min_width=120)
        shown |= {"mend": mend, "mend_anew": mend_anew, "extension": extension}
        shown |= {f"button {name}": button for name, button in buttons.items() if name != "extend"}
        answer = gr.HTML(padding=False)
        shown["report"] = gr.HTML(padding=False, visible=False)
        shown["warnings"] = gr.HTML(padding=False, visible=False)
        shown["samples"] = gr.HTML(padding=False, visible=False)
        with gr.Column(visible=False) as shown["curves"]:
            shown["loss"] = _plot("Loss of each step, and smoothed", "loss", "line", 240)
            shown["loss text"] = gr.HTML(padding=False)
            shown["validation"] = gr.HTML(padding=False, visible=False)
            with gr.Accordion("Learning rate", open=False):
                shown["rates"] = _plot("Learning rate of each part", "rate", "part", 180)
                shown["rates text"] = gr.HTML(padding=False)
        with gr.Accordion("Log", open=False, visible=False) as shown["log fold"]:
            shown["log"] = gr.HTML(padding=False)
    panel = Panel(shown, buttons, extend_by, mend, mend_anew, answer)
    _listen(context, panel)
    return panel


_COLOURS = {"each step": "#94a3b8", "smoothed": "#6366f1", "validation": "#d97706"}
_MOST_VALIDATIONS = 250
"""Points of the validation's curve, of which a run of days has thousands."""
_MOST_SCORES = 12
"""Rows of the table of scores."""


def _plot(title: str, y: str, color: str, height: int) -> gr.LinePlot:
    colours = _COLOURS if color == "line" else None
    return gr.LinePlot(x="step", y=y, color=color, color_map=colours, title=title, height=height, tooltip="axis")


def _listen(context: Context, panel: Panel) -> None:
    for name, act in _ACTS.items():
        inputs = [context.picked, panel.extend_by] if name == "extend" else [context.picked]
        panel.buttons[name].click(told(_answering(context, act)), inputs, panel.answer, **QUIETLY)
    panel.mend.click(told(_answering(context, _mend)), [context.picked], panel.answer, **QUIETLY)


def _answering(context: Context, act: Callable[..., str]) -> Callable[..., str]:
    """A click's handler: does it to the run that is picked, and says so."""

    def clicked(name: str | None, *given: Any) -> str:
        run = context.run(name)
        if run is None:
            return notice("there is no such run any more", "Pick another one above.", kind="warning")
        return f"<p>{esc(act(context, run, *given))}</p>"

    return clicked


# ---------------------------------------------------------------------------------------------------------------------
# what can be asked


def stop(context: Context, run: RunFolder) -> str:
    """Ask to stop, and say what is kept."""
    status = run.status(context.stories.of(run))
    said = run.ask_to_stop()
    if status.state == "queued" or not status.step:
        return said
    return f"{said} It keeps step {status.step} or the one after it, and can be resumed from there."


def _save(context: Context, run: RunFolder) -> str:
    del context
    return run.ask_to_save()


def _sample(context: Context, run: RunFolder) -> str:
    del context
    return run.ask_to_sample()


def _report(context: Context, run: RunFolder) -> str:
    del context
    return save_report(run)


def resume(context: Context, run: RunFolder) -> str:
    """Let a run go on from where it was saved."""
    status = run.status(context.stories.of(run))
    go_on(run, context.queue, from_step=status.resume_from)
    return _goes_on(context, run)


def _mend(context: Context, run: RunFolder) -> str:
    """Resume with what the failure says would mend it."""
    status = run.status(context.stories.of(run))
    go_on(run, context.queue, status.overrides, status.resume_from)
    return _goes_on(context, run)


def extend(context: Context, run: RunFolder, steps: float | None) -> str:
    """Let a run go on beyond its plan, by so many steps."""
    more = int(steps or 0)
    if more < 1:
        return "Type how many steps it is to go on for; at least 1."
    story = context.stories.of(run)
    budget = budget_with(story, run.read_config().budget.images, more)
    go_on(run, context.queue, [f"budget.images={budget}"])
    return f"{_goes_on(context, run)} It will see {budget:,} images in all, about {more:,} steps more."


def budget_with(story: Story, planned: int, more: int) -> int:
    """Images of a budget that holds so many steps more: batches are not all full, so their mean size counts."""
    last = story.steps[-1] if story.steps else None
    per_step = last.images / last.step if last else 1.0
    seen = story.plan.images if story.plan else planned
    return round(max(seen, planned) + more * per_step)


def _goes_on(context: Context, run: RunFolder) -> str:
    other = context.queue.running()
    if other and other != run.name:
        return f"{run.name} waits in the queue; {other} trains now."
    return f"{run.name} goes on."


_ACTS: dict[str, Callable[..., str]] = {
    "stop": stop,
    "leave": stop,
    "save": _save,
    "sample": _sample,
    "resume": resume,
    "again": resume,
    "extend": extend,
    "report": _report,
}


# ---------------------------------------------------------------------------------------------------------------------
# what is shown


View = dict[str, tuple[Any, Any]]
"""By what is shown: what tells whether it is as it was sent, and the update."""


OFTEN = ("sentence", "announced")
"""What is looked at each second; the rest only when `pulse` is another one."""


def pulse(context: Context, name: str | None) -> tuple[Any, ...]:
    """Changes whenever there is something new to see, and every few seconds while the curves grow."""
    run = context.run(name)
    if run is None:
        return ()
    story = context.stories.of(run)
    status = run.status(story)
    moment = int(time.time() / _SECONDS_BETWEEN_PLOTS) if status.is_active else 0
    return (
        name,
        status.state,
        status.saved_step,
        len(story.samples),
        len(story.validations),
        len(story.scores),
        len(story.warnings),
        report_news(run),
        moment,
    )


def spoken(context: Context, name: str | None, sent: dict[str, Any]) -> View:
    """What is told each second of the run: its sentence, and now and then for who listens."""
    run = context.run(name)
    if run is None:
        return {}
    status = run.status(context.stories.of(run))
    bar = ""
    if status.steps and (status.is_active or status.state in ("stopped", "interrupted", "failed")):
        text = f"Step {status.step} of {status.steps}"
        bar = f'<progress max="{status.steps}" value="{status.step}" aria-label="{text}">{text}</progress>'
    sentence = _html(f'<p class="sentence">{esc(status.sentence)}</p>{bar}')
    return {"sentence": sentence} | _announcement(run, status, sent)


def view(context: Context, name: str | None) -> View:
    """All else that the panel shows."""
    run = context.run(name)
    if run is None:
        return {"panel": ("", gr.update(visible=False))}
    story = context.stories.of(run)
    status = run.status(story)
    log = log_tail(run)
    return {
        "panel": (run.name, gr.update(visible=True)),
        "heading": _html(f"<h2>{esc(run.name)} {chip(status.state)}</h2>"),
        "failure": _html(failure_card(run, status) if status.state == "failed" else ""),
        "report": _html(report_html(run)),
        "warnings": _html(warnings_of(story)),
        "samples": _html(samples_table(run, story)),
        "log fold": (bool(log), gr.update(visible=bool(log))),
        "log": (log, f'<pre class="log" tabindex="0">{log}</pre>'),
        **_asked(status),
        **_curves(run, story),
    }


def _html(html: str) -> tuple[Any, Any]:
    return html, gr.update(value=html, visible=bool(html))


def failure_card(run: RunFolder, status: Status) -> str:
    """What went wrong, what is kept, and what to do about it."""
    kept = f"Step {status.saved_step} is saved." if status.saved_step else "Nothing was saved yet."
    return notice(status.message, f"{status.fix} {kept}".strip(), where=run.name)


def _announcement(run: RunFolder, status: Status, sent: dict[str, Any]) -> View:
    """The sentence for who listens: when a phase begins, and seldom in between."""
    phase, moment = sent.get("announced", (None, 0.0))
    begins = phase != (run.name, status.state)
    if not begins and (not status.is_active or time.monotonic() - moment < SECONDS_BETWEEN_ANNOUNCEMENTS):
        return {}
    text = f'<p role="status" aria-live="polite">{esc(run.name)}: {esc(status.sentence)}</p>'
    return {"announced": (((run.name, status.state), time.monotonic()), text)}


def _asked(status: Status) -> View:
    """Buttons stand only where they work."""
    shown = {}
    for name, asked in BUTTONS.items():
        visible = asked.when(status)
        shown["extension" if name == "extend" else f"button {name}"] = (visible, gr.update(visible=visible))
    for key, label, settings in (
        ("mend", "Set {} and resume", status.overrides),
        ("mend_anew", "Start again with {}", status.anew),
    ):
        told_settings = settings if status.state == "failed" else ()
        words = label.format(" and ".join(setting.replace("=", " = ") for setting in told_settings))
        shown[key] = (words if told_settings else "", gr.update(value=words, visible=bool(told_settings)))
    return shown


def warnings_of(story: Story) -> str:
    """Each warning once, the newest of very many."""
    different = list(dict.fromkeys(story.warnings))
    more = len(different) - _MOST_WARNINGS
    told = f"{more} earlier warnings are in events.jsonl, in the run's folder"
    shown = [told] * (more > 0) + different[-_MOST_WARNINGS:]
    return "".join(notice(warning, kind="warning") for warning in shown)


def samples_table(run: RunFolder, story: Story) -> str:
    """Previews: a row for each step, the untouched base first and then the newest, a column for each prompt."""
    if not story.samples:
        return ""
    shown = [story.samples[place] for place in shown_rows(len(story.samples))]
    base = int(shown[0].step == 0)
    rows = [
        [_step(sample.step), *_cells(run, sample.step, sample.prompts)]
        for sample in [*shown[:base], *reversed(shown[base:])]
    ]
    caption = "Always the same prompts and seeds."
    if len(shown) < len(story.samples):
        caption += f" {len(shown)} rounds of {len(story.samples):,}; all are in samples, in the run's folder."
    return "<h3>Previews</h3>" + table(["Step", *shown[-1].prompts], rows, caption=caption, kind="grid")


def shown_rows(count: int) -> list[int]:
    """Places of rounds of previews that are shown: all, or each second, fourth, eighth... so that those that are shown
    stay while others come, and the newest."""
    apart = 1
    while -(-count // apart) >= MOST_ROWS:
        apart *= 2
    return sorted({*range(0, count, apart), count - 1})


def _step(step: int) -> str:
    return f"step {step:,}" if step else "step 0, the untouched base"


def _cells(run: RunFolder, step: int, prompts: list[str]) -> Iterator[str]:
    for number, prompt in enumerate(prompts):
        file = run.samples(step) / f"{number:02d}.png"
        yield cell(picture_url(run, file), f"step {step}: {prompt}") if file.is_file() else "removed"


def _curves(run: RunFolder, story: Story) -> View:
    """The plots, with what they show in words."""
    points = story.curve()
    shown: View = {"curves": (len(points) > 1, gr.update(visible=len(points) > 1))}
    if len(points) > 1:
        now = (run.name, len(story.steps), story.step)
        shown |= {"loss": (now, losses(points, story.validations)), "rates": (now, rates(points))}
        shown |= {"loss text": _html(f"<p>{esc(loss_sentence(points))}</p>")}
        shown |= {"validation": _html(validation_told(story.validations) + scores_told(story.scores))}
        shown |= {"rates text": _html(f"<p>{esc(rates_sentence(points))}</p>")}
    return shown


def losses(points: list[CurvePoint], validations: Sequence[Validated] = ()) -> pd.DataFrame:
    """Raw and smoothed loss by step, and the validation loss where it was measured."""
    rows = [(p.step, loss, line) for p in points for loss, line in ((p.loss, "each step"), (p.smoothed, "smoothed"))]
    apart = -(-len(validations) // _MOST_VALIDATIONS) or 1
    shown = comparable(validations)[::-apart]  # from the newest back
    rows += [(measured.step, measured.loss, "validation") for measured in reversed(shown)]
    return pd.DataFrame(rows, columns=["step", "loss", "line"])


def validation_told(validations: Sequence[Validated]) -> str:
    """What the validation loss says: how it went, and in each band of time-steps the gap between images that are held
    out and images that are trained."""
    if not validations:
        return ""
    same = comparable(validations)
    first, last = same[0], same[-1]
    went = f"is {last.loss:.3g}" if first is last else f"went from {first.loss:.3g} to {last.loss:.3g}"
    went += f", lowest at step {last.best:,}" if last.best else ""
    if not last.gaps:
        why = "no image is held out, so it tells what is learned, and not what is learned by heart"
        return f"<p>{esc(f'The validation loss {went}: {why}.')}</p>"
    images = "1 image" if last.held_out == 1 else f"{last.held_out} images"
    rows = [
        [esc(band), f"{train:.4f}", f"{loss:.4f}", f"{gap:+.4f}", f"{before:+.4f}"]
        for band, train, loss, gap, before in zip(
            last.bands, last.train, last.validation, last.gaps, first.gaps, strict=False
        )
    ]
    told = f"The validation loss, of {images} held out, {went}. Where the gap grows, images are learned by heart."
    head = ["Time-steps", "Trained", "Held out", "Gap", f"Gap at step {first.step:,}"]
    return f"<p>{esc(told)}</p>" + table(head, rows, caption=f"Gap at step {last.step:,}, by band of time-steps")


def scores_told(scores: Sequence[Scored]) -> str:
    """The scores of pictures that were drawn on the way, and which step has the best."""
    if not scores:
        return ""
    same = comparable(scores)
    best = f" The best so far are those of step {same[-1].best:,}." if same[-1].best else ""
    apart = -(-len(same) // _MOST_SCORES)
    rows = [
        [f"{one.step:,}", f"{one.style:z.2f}", f"{one.prompt:z.2f}", f"{one.copying:z.2f}"]
        for one in reversed(same[::-apart])
    ]
    told = f"Scores of {same[-1].pictures:,} pictures of the same prompts and noise each time.{best}"
    caption = "Style gained, prompt kept and copying, by step"
    return f"<p>{esc(told)}</p>" + table(["Step", "Style", "Prompt", "Copying"], rows, caption=caption)


def rates(points: list[CurvePoint]) -> pd.DataFrame:
    """Learning rate of each part by step."""
    rows = [(point.step, rate, part) for point in points for part, rate in point.lr.items()]
    return pd.DataFrame(rows, columns=["step", "rate", "part"])


def log_tail(run: RunFolder) -> str:
    """The last lines that the run's processes said, as text for a page."""
    try:
        with run.log.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL))
            said = file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    return esc("\n".join(said.splitlines()[-_LINES_OF_LOG:]))
