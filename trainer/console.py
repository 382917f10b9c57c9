"""Plans and events in the terminal: results on stdout, progress on stderr, a bar only on a terminal."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .choosing.choice import Scores
from .config import AdapterSection, RunConfig
from .configfile import Origin
from .events import (
    AttentionChosen,
    Checkpointed,
    Done,
    Event,
    Phase,
    PlanMade,
    Sampled,
    Scored,
    Step,
    Stopped,
    Validated,
    Warned,
)
from .plan import Plan

if TYPE_CHECKING:
    from .rerun import Verdict

out = Console(soft_wrap=True, highlight=False, emoji=False, width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)

_ALL_IMAGES_LISTED_UP_TO = 40
_CAPTIONS_SHOWN = 5
_LONGEST_SHOWN = 60  # characters of a setting's value
_SECONDS_BETWEEN_LINES = 10.0


class Reporter:
    """Shows the events of one run as they come; use it as a context manager."""

    def __init__(self) -> None:
        self.is_terminal = err.is_terminal
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=err,
            disable=not self.is_terminal,
            transient=True,
        )
        self.task: TaskID | None = None
        self.phase = ""
        self.steps = 0
        self.last_line = 0.0
        self.loss: float | None = None

    def __enter__(self) -> Reporter:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def __call__(self, event: Event) -> None:
        match event:
            case Phase(name, done, total):
                self._bar(name, done, total)
            case PlanMade():
                self.steps = event.steps
                self._line(trained_sentence(event.parts))
            case AttentionChosen():
                self._line(escape(attention_sentence(event)))
            case Step():
                self.loss = event.loss if self.loss is None else 0.95 * self.loss + 0.05 * event.loss
                rates = " ".join(f"{name} {rate:.1e}" for name, rate in event.lr.items())
                self._bar("training", event.step, self.steps, f"loss {self.loss:.4f}  lr {rates}")
            case Sampled(step, folder):
                self._line(f"step {step}: previews in {folder}")
            case Validated():
                self._line(f"step {event.step}: {validation_sentence(event)}")
            case Scored():
                self._line(f"step {event.step}: {scores_sentence(event)}")
            case Checkpointed(step, folder):
                self._line(f"step {step}: saved {folder}")
            case Warned(message):
                self._line(f"[yellow]warning:[/] {escape(message)}")
            case Stopped(step):
                self._line(f"stopped and saved at step {step}")
            case Done(step, _, why):
                self._line(f"done, {step} steps{f': {why}' if why else ''}")

    def _bar(self, name: str, done: int, total: int, note: str = "") -> None:
        if self.is_terminal:
            if self.task is None or name != self.phase:
                if self.task is not None:
                    self.progress.remove_task(self.task)
                self.task = self.progress.add_task(name, total=total or None, note=note, completed=done)
            self.progress.update(self.task, completed=done, total=total or None, note=note)
        elif name != self.phase or done == total or time.monotonic() - self.last_line > _SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            count = f" {done}/{total}" if total else ""
            err.print(f"{name}{count}  {note}".rstrip(), markup=False)
        self.phase = name

    def _line(self, text: str) -> None:
        self.progress.console.print(text)


def trained_sentence(parts: list[dict[str, Any]]) -> str:
    """What is trained, one line a part."""
    return "\n".join(
        f"training {part['name']}: {part['modules']} modules, {part['parameters']:,} parameters, {_rate(part)}"
        for part in parts
    )


def attention_sentence(chosen: AttentionChosen) -> str:
    """Which kernels are taken for how many shapes."""
    shapes = Counter(str(one.get("kernel")) for one in chosen.shapes)
    told = ", ".join(f"{kernel} for {count}" for kernel, count in shapes.most_common())
    how = "the fastest by a probe" if any(one.get("milliseconds") for one in chosen.shapes) else "as before"
    return f"attention on {chosen.device}: {told} of {len(chosen.shapes)} shapes, {how}"


def validation_sentence(measured: Validated) -> str:
    """What a measure of the validation loss has come to."""
    told = f"validation loss {measured.loss:.4f}{_against_the_best(measured, 'lowest')}"
    if not measured.gaps:
        return told
    gaps = ", ".join(f"{gap:+.4f} at {band}" for gap, band in zip(measured.gaps, measured.bands, strict=False))
    return f"{told}; gap to the training images by time-step: {gaps}"


def scores_sentence(scored: Scored) -> str:
    """What the scores of a step's pictures are."""
    return f"{Scores(scored.style, scored.prompt, scored.copying)}{_against_the_best(scored, 'best')}"


def _against_the_best(measured: Validated | Scored, name: str) -> str:
    if not measured.best:
        return ""
    return f", the {name} so far" if measured.best == measured.step else f" (the {name} was at step {measured.best})"


def _rate(part: dict[str, Any]) -> str:
    """`learning rate 0.0001 x alpha/rank = 5e-05`: adapters of other scales learn at other speeds."""
    rate, effective = f"learning rate {part['lr']:g}", [f"{rate:.3g}" for rate in dict.fromkeys(part["effective_lr"])]
    return f"{rate} x alpha/rank = {' to '.join(effective)}" if effective else rate


def length_sentence(plan: Plan) -> str:
    """How long the run is. Images of different shapes share no batch, so that steps may be smaller than was asked."""
    batch, shows = plan.config.budget.batch * plan.batches_per_step, plan.facts()["shows_per_image"]
    return (
        f"{plan.steps} steps of at most {batch} images (on average {plan.images / plan.steps:.3g}) = "
        f"{plan.images} images seen, each image {shows:g} times"
    )


def what_is_trained(adapter: AdapterSection) -> str:
    """The kind of training in a line."""
    parts = " and ".join(name for name in ("unet", "text_encoder") if getattr(adapter, name))
    only = f", only {', '.join(adapter.train_only)}" if adapter.train_only else ""
    if adapter.kind == "full":
        return f"full: weights of {parts}{only}"
    size = f"rank {adapter.rank}, alpha {adapter.alpha:g}"
    if adapter.kind in ("oft", "boft"):
        size = f"blocks of {adapter.block_size}"
    return f"adapter: {adapter.kind}, {size}, {adapter.targets}, on {parts}{only}"


def preference_sentence(facts: dict[str, Any]) -> str:
    """What a run that refines another learns from; a pair counts as one image."""
    said = f"{facts['pairs']} pairs, {facts['thumbs_up']} thumbs up, {facts['thumbs_down']} down"
    return f"preferences: {said}, each counted as one image; it refines {facts['start']}, beta {facts['beta']:g}"


def print_plan(plan: Plan) -> None:
    """The plan in words and numbers."""
    facts, config = plan.facts(), plan.config
    out.print(f"[bold]{escape(config.name)}[/] on {escape(plan.base.title)}")
    _print_images(plan)
    sources = ", ".join(f"{count} from {source}" for source, count in plan.caption_sources().items())
    by_machine = f"; {facts['machine_captions']} written by a machine" if facts["machine_captions"] else ""
    out.print(f"captions: {facts['captions']} of {facts['images']} used ({sources}){by_machine}", markup=False)
    for example in plan.examples[:_CAPTIONS_SHOWN]:
        out.print(f"  {example.name}: {example.caption!r}{_and_more(example.captions)}", markup=False)
    if facts["masks"]:
        out.print(f"masks: of {facts['masks']} of {facts['images']} images")
    for line in _data_lines(facts["data"]):
        out.print(line, markup=False)
    if facts["preference"]:
        out.print(preference_sentence(facts["preference"]), markup=False)
    buckets = ", ".join(f"{count} x {size}" for size, count in facts["buckets"].items())
    out.print(f"buckets: {buckets}")
    out.print(f"length: {length_sentence(plan)}")
    if validation := facts["validation"]:
        if by_scores := validation["by"] == "scores":
            often = f"each {validation['every']} steps, {validation['pictures']} pictures"
            out.print(f"scores ({often}): {validation['told']}", markup=False)
        else:
            often = f"each {validation['every']} steps, {validation['predictions']} predictions"
            out.print(f"validation loss ({often}): {validation['told']}", markup=False)
        if validation["patience"]:
            what = "they were not better" if by_scores else "it was not lower"
            out.print(f"ends early, if {what} {validation['patience']} times in a row")
    out.print(f"if the memory is full: {plan.if_memory_is_full}")
    out.print(what_is_trained(config.adapter), markup=False)
    _print_parts(facts["trained"])
    for warning in plan.warnings():
        out.print(f"[yellow]warning:[/] {escape(warning)}")


def _print_parts(parts: list[dict[str, Any]]) -> None:
    """What is trained, with the parameters of each block."""
    for part in parts:
        out.print(f"  {trained_sentence([part])}", markup=False)
        sizes = ", ".join(f"{block.partition('.')[2]} {size:,}" for block, size in part["blocks"].items())
        if sizes:
            out.print(f"    {sizes}", markup=False)


def print_origins(config: RunConfig, origins: Mapping[str, Origin]) -> None:
    """Where the settings come from that are not defaults."""
    for origin in ("recipe", "file", "--set", "rule"):
        mine = [dotted for dotted, own in origins.items() if own == origin and dotted != "recipe"]
        named = [f"{dotted} = {_shown(_value_of(config, dotted))}" for dotted in mine]
        if named:
            out.print(f"from {_ORIGINS[origin]}: {', '.join(named)}", markup=False)
    out.print("all other settings are defaults")


_ORIGINS = {"recipe": "the recipe", "file": "the file", "--set": "--set", "rule": "what else is set"}


def _value_of(config: RunConfig, dotted: str) -> Any:
    value: Any = config
    for key in dotted.split("."):
        value = value[int(key)] if isinstance(value, list) else getattr(value, key)
    return value


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def _and_more(captions: tuple[str, ...]) -> str:
    others = len(set(captions)) - 1
    return f" and {others} more variants" if others else ""


def _data_lines(data: list[dict[str, Any]]) -> Iterator[str]:
    """How much of the training each set of images is, where there are several or one is shown in several ways."""
    for one in data:
        kind = f", regularization, loss weight {one['loss_weight']:g}" if one["regularization"] else ""
        ways = f", each in {one['views_per_image']} views" if one["views_per_image"] > 1 else ""
        if len(data) > 1 or ways or kind:
            share = f", {one['share']:.0%} of what is shown" if len(data) > 1 else ""
            yield f"data {one['name']}: {one['images']} images{share}{kind}{ways}"


def print_verdict(verdict: Verdict) -> None:
    """What was compared of a run that was resumed with one that was not."""
    table = Table("compared", "numbers", "", "largest difference", "relative", box=None, padding=(0, 2, 0, 0))
    for one in verdict.compared:
        holds = "equal" if not one.largest else "close enough" if verdict.holds(one) else "differs"
        apart = (f"{one.largest:.3g}", f"{one.relative:.3g}") if one.largest else ("", "")
        table.add_row(one.what, f"{one.numbers:,}", holds, *apart)
    out.print(table)
    near = "bit for bit" if not verdict.tolerance else f"within {verdict.tolerance:g} of each other, for a GPU"
    both = f"{verdict.steps} + {verdict.steps} steps and {2 * verdict.steps} steps"
    out.print(f"{both} come to the same, {near}" if verdict.is_equal else f"{both} do not come to the same ({near})")


def _print_images(plan: Plan) -> None:
    """Each image with what is done to it; of a large set, those to which something is done."""
    listed = plan.examples
    if len(listed) > _ALL_IMAGES_LISTED_UP_TO:
        listed = [example for example in listed if example.item.notes]
    table = Table("image", "size", "bucket", "caption from", "what is done", box=None, padding=(0, 2, 0, 0))
    for example in listed:
        item, fit = example.item, example.fit
        done = [*item.notes, f"{fit.cropped_share:.0%} cropped" if fit.cropped_share >= 0.005 else "not cropped"]
        if example.entry.shows != 1:
            done.append(f"shown {example.entry.shows:g} times an epoch")
        if example.is_masked:
            done.append("masked")
        size = f"{fit.original[0]} x {fit.original[1]}"
        bucket = ", ".join(f"{w} x {h}" for w, h in dict.fromkeys(example.entry.buckets))
        table.add_row(escape(example.name), size, bucket, escape(item.source), escape(", ".join(done)))
    out.print(f"images: {len(plan.examples)}")
    if listed:
        out.print(table)
    if rest := len(plan.examples) - len(listed):
        out.print(f"  and {rest} more, with nothing special about them")
