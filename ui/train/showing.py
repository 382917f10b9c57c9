"""What the parts of the Train page show of a document and its plan."""

from __future__ import annotations

from typing import Any

from ...configs import recipe_names
from ...trainer.errors import LorasmithError
from ...trainer.jobs import free_name
from ..context import Context
from ..html import esc, notice
from ..planner import Recognised
from .choosing import NO_RECIPE
from .desk import Answer
from .draft import (
    ABSENT,
    Teaching,
    Values,
    commands,
    further_tables,
    quality_of,
    recipe_by,
    standing,
    to_text,
    value_at,
)
from .form import changed, plain
from .plancard import PLANNING, in_the_way

QUALITY = "How long it trains: half of what the recipe says, as it says, or twice that. Nothing else changes."
SHOWN_PARTS = (
    *("images", "base", "name", "family", "quality", "prompts", "card", "start", "queue", "why not"),
    *("recipe", "changed", "put back", "further", "toml", "bash", "powershell"),
)
"""What is made of the document, besides the settings."""


def parts_shown(
    context: Context, values: Values, found: Recognised | None, teaching: Teaching, fresh: Answer | None
) -> dict[str, dict[str, Any]]:
    stands = standing(values)
    prompts, recipe = stands["sample.prompts"].value, values.get("recipe", NO_RECIPE)
    foreseen, error = (fresh.foreseen, fresh.error) if fresh else (None, None)
    card = foreseen.card() if foreseen else in_the_way(error) if error else PLANNING
    given = changed(values)
    tables = further_tables(values)
    qualities = foreseen.choices(values) if foreseen else None
    return {
        "images": {"value": _images_sentence(values)},
        "base": {"value": stands["base.model"].value},
        "name": {"value": values.get("name", ""), "info": _name_info(context, values)},
        "family": {"value": f"<p>{esc(_family(found, teaching, values))}</p>"},
        "quality": {"value": quality_of(values), "info": _quality_info(values, stands["budget.images"].value)}
        | ({"choices": qualities} if qualities else {}),
        "prompts": {
            "value": "\n".join(map(str, prompts)) if isinstance(prompts, list) else "",
            "interactive": bool(stands["sample.every"].value),
        },
        "card": {"value": card},
        "start": {"interactive": foreseen is not None},
        "queue": {"interactive": foreseen is not None},
        "why not": {"value": "" if foreseen else f'<p class="quiet">{esc(_why_not(error))}</p>'},
        "recipe": {"value": recipe if recipe in recipe_names() else NO_RECIPE, "info": _recipe_info(found, teaching)},
        "changed": {"choices": given, "value": given[0][1] if given else None},
        "put back": {"interactive": bool(given)},
        "further": {"value": _further(tables), "visible": bool(tables)},
        "toml": {"value": to_text(values)},
        "bash": {"value": commands(values, context.runs, "bash")},
        "powershell": {"value": commands(values, context.runs, "powershell")},
    }


def _quality_info(values: Values, images: Any) -> str:
    if quality_of(values) is None:
        return f"{images} images seen, a number of your own (budget.images)."
    return QUALITY


def _images_sentence(values: Values) -> str:
    folder, trigger = value_at(values, "data.0.path"), value_at(values, "data.0.trigger")
    if folder in (ABSENT, ""):
        return "<p>Images: none yet. Choose a folder on the page <strong>1 Images</strong>.</p>"
    called = f"called by the word <strong>{esc(trigger)}</strong>" if trigger not in (ABSENT, "") else "no trigger word"
    chosen = "Both are chosen on the page <strong>1 Images</strong>."
    return f"<p>Images: <strong>{esc(folder)}</strong>, {called}. {chosen}</p>"


def _name_info(context: Context, values: Values) -> str:
    name = values.get("name", "")
    free = free_name(context.runs, name) if isinstance(name, str) and "/" not in name and "\\" not in name else name
    if free != name:
        return f"This name is in use: the run will be called {plain(free)}."
    return "The run's folder and the file to share are called so."


def _family(found: Recognised | None, teaching: Teaching, values: Values) -> str:
    if found is None or found.model != value_at(values, "base.model"):
        return "Looking at the base model."
    recipe, why = recipe_by(found, teaching)
    chosen = values.get("recipe")
    return f"{found.sentence} Recipe {recipe}: {why}." if recipe == chosen else found.sentence


def _recipe_info(found: Recognised | None, teaching: Teaching) -> str:
    usual = f"For this base and a {teaching.lower()}: {recipe_by(found, teaching)[0]}. " if found else ""
    return f"{usual}What it sets is marked at each setting; none: the defaults."


def _further(tables: list[str]) -> str:
    note = f"this run has {' and '.join(tables)}, which no control here shows"
    return notice(note, "Change them in the TOML below.", kind="note") if tables else ""


def _why_not(error: LorasmithError | None) -> str:
    if error is None:
        return "A start is possible when the plan is made."
    count = len(error.problems)
    return f"A start is not possible yet: {'see the problem' if count == 1 else f'see the {count} problems'} above."
