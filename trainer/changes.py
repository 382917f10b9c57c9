"""What may change of a run that has begun: freely, so that it stays the same run, or where a person allows it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from .config import OptimizerSection, RunConfig
from .configfile import read_toml, validate
from .errors import Problem, RunError
from .jobs import RunFolder
from .optim import schedule_factor
from .origin import Change, Origin, differences

if TYPE_CHECKING:
    from .checkpoint import TrainState

_OF_A_RESUME = r"budget\.images|data\.\d+\.path|preference\.start|(save|sample|validation|export|runtime)\."
_WHERE_ALLOWED: dict[Change, str] = {
    "config": r"(seed|adapter|block|budget|optimizer|objective|preference)\b",
    "data": r"(data|buckets)\b",
    "base": r"base\.",
}
_WHAT_MAY = (
    "Only budget.images, data.path, preference.start, save, sample, validation, export and runtime can. For anything "
    "else start a new run, or go on with another one after all: with --allow data for data and buckets, --allow base "
    "for the base, --allow config."
)
_CHANGED: dict[Change, tuple[str, str]] = {
    "config": ("the settings have changed", "Put them back, or go on with those there are now"),
    "data": ("the images or captions have changed", "Put them back, or go on with those there are now, in their order"),
    "base": ("the base model has changed", "Put it back, or go on with the one there is now"),
}
"""What is said of a change, and what to do about it."""


def changed_for_resume(run: RunFolder, overrides: Sequence[str], allow: Collection[Change] = ()) -> RunConfig:
    """A run's configuration as it goes on with; `allow` are changes that would make it another run.

    Raises:
        RunError: if the overrides would make it another run.
        ConfigError: if one is wrong.
    """
    may = "|".join([_OF_A_RESUME, *(_WHERE_ALLOWED[what] for what in allow)])
    return _changed(run, overrides, re.compile(may), _WHAT_MAY)


def changed_for_export(run: RunFolder, overrides: Sequence[str]) -> RunConfig:
    """A run's configuration as its files are written with.

    Raises:
        RunError: if the overrides are not about files.
        ConfigError: if one is wrong.
    """
    return _changed(run, overrides, re.compile(r"export\."), "Only export can, now that it is trained.")


def _changed(run: RunFolder, overrides: Sequence[str], may: re.Pattern[str], fix: str) -> RunConfig:
    before = run.read_config()
    after = validate(read_toml(run.config), run.config.name, overrides)
    refused = [key for key, _, _ in differences(before.model_dump(), after.model_dump()) if not may.match(key)]
    if refused:
        raise RunError(f"{', '.join(refused)} cannot change within a run", str(run.path), fix)
    return after


def refuse_spent(run: RunFolder, config: RunConfig, seen: int, planned: int) -> None:
    """A run that is done goes on with a larger budget only, and no run with one that is smaller than what it has seen.

    Raises:
        RunError: naming a budget that it could go on with.
    """
    if seen > planned or (seen == planned and run.status().state == "done"):
        raise RunError(
            f"has seen {seen} images already, and budget.images is {config.budget.images}",
            str(run.path),
            f"To go on, raise the budget: lorasmith resume {run.path} --set budget.images={2 * seen}",
        )


def allowed_changes(
    run: RunFolder, saved: TrainState, before: Origin, now: Origin, allow: Collection[Change]
) -> Iterator[str]:
    """What has changed of what a run is made from since a checkpoint of it was saved, in sentences to be told.

    Raises:
        RunError: if one of them is not allowed, naming each, and how it can be.
    """
    same: dict[Change, bool] = {
        "config": saved.config == now.config_hash,
        "data": saved.dataset == now.dataset_hash,
        "base": saved.base == now.base_hash,
    }
    told: dict[Change, str] = {
        what: f"{_CHANGED[what][0]} since step {saved.step}: {'; '.join(before.changes(what, now))}"
        for what in same
        if not same[what]
    }
    refused: list[Change] = [what for what in told if what not in allow]
    if refused:
        command = f"lorasmith resume {run.path}{''.join(f' --allow {what}' for what in told)}"
        raise RunError.of(Problem(str(run.path), told[what], f"{_CHANGED[what][1]}: {command}") for what in refused)
    yield from (f"{change}; this was allowed" for change in told.values())


def change_of_schedule(settings: OptimizerSection, saved: TrainState, steps: int) -> Iterator[str]:
    """What becomes of the learning rate of a run that is now of another length, where that shows.

    It follows the schedule of the new length from where it stands, as if that had been its length from the start.
    """
    if 0 < saved.step < steps != saved.steps:
        last = schedule_factor(settings, saved.step - 1, saved.steps)
        following = schedule_factor(settings, saved.step, steps)
        if following != last:
            told = f"the run has {steps} steps now, and had {saved.steps}: the learning rate goes on at"
            yield f"{told} {following:.0%} of its full value, after {last:.0%}"
