"""From answers to a plan, and from a plan to a run in the queue; the page and its API both go this way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...trainer.configfile import set_value
from ...trainer.jobs import RunFolder, find_runs, free_name
from ...trainer.queue import begin
from ..context import Context
from ..paths import require_allowed, require_allowed_path
from .draft import (
    ABSENT,
    Quality,
    Teaching,
    Values,
    choose,
    images_of,
    recipe_by,
    suggested_prompts,
    value_at,
    with_value,
)
from .plancard import Foreseen


@dataclass(frozen=True)
class Answers:
    """What a person has to say of a run, and may say."""

    images: str
    base: str = "pocket"
    name: str = ""
    trigger: str = ""
    teaching: Teaching = "Style"
    quality: Quality = "Balanced"
    settings: Sequence[str] = ()
    """Further settings, each as `section.key=value`."""


def plan_of(context: Context, answers: Answers) -> Foreseen:
    """What would happen; nothing is started.

    Raises:
        UserError: with every problem that stands in the way, each with its place and its fix.
    """
    return plan_document(context, document_of(context, answers))


def start(context: Context, answers: Answers) -> RunFolder:
    """Put a new run in the queue; a name in use gets a number.

    Raises:
        UserError: likewise.
    """
    return start_document(context, document_of(context, answers))


def document_of(context: Context, answers: Answers) -> Values:
    """The configuration that answers mean, with previews as the page suggests them.

    Raises:
        UserError: if the base cannot be found, a setting cannot be read, or the images cannot be planned with.
    """
    for text in (answers.base, answers.images):
        require_allowed_path(context, text)
    base = context.planner.recognise(answers.base)
    values: Values = {"recipe": recipe_by(base, answers.teaching)[0], "base": {"model": answers.base}}
    values["name"] = answers.name.strip()
    values["data"] = [{"path": answers.images}]
    if answers.trigger.strip():
        values["data"][0]["trigger"] = answers.trigger.strip()
    values = choose(values, "budget.images", images_of(values, answers.quality))
    for setting in answers.settings:
        set_value(values, setting)
    if value_at(values, "sample.prompts") is ABSENT:
        planned = plan_document(context, values).planned
        if planned.config.sample.every:
            prompts = suggested_prompts(base, answers.teaching, answers.trigger, planned.captions)
            values = with_value(values, "sample.prompts", prompts)
    return values


def plan_document(context: Context, values: Values) -> Foreseen:
    """Plan a configuration's given values, whatever its name, in this folder of runs.

    Raises:
        UserError: with every problem that stands in the way.
    """
    require_allowed(context, values)
    planned = context.planner.plan(values | {"runs": str(context.runs)})
    return Foreseen.of(planned, context.runs, [context.stories.of(run) for run in find_runs(context.runs)])


def start_document(context: Context, values: Values) -> RunFolder:
    """Plan once more, and put the run in the queue.

    Raises:
        UserError: with every problem that stands in the way.
    """
    name = free_name(context.runs, str(values.get("name", "")))
    foreseen = plan_document(context, values | {"name": name} if name else values)
    return begin(foreseen.planned.config, context.queue)


def before(context: Context) -> str:
    """The run that a new one would have to wait for; empty if there is none."""
    return context.queue.running() or next((entry.name for entry in context.queue.waiting()), "")
