"""How the document changes when a person answers, and what the page fills in by itself."""

from __future__ import annotations

from ..planner import Recognised
from .desk import Answer
from .draft import (
    ABSENT,
    Quality,
    Teaching,
    Values,
    choose,
    images_of,
    name_from,
    quality_of,
    recipe_by,
    standing,
    suggested_prompts,
    value_at,
    with_value,
    without,
)

NO_RECIPE = "none"


def with_images(values: Values, folder: str | None, trigger: str | None) -> Values:
    """The document with what the Images page says; a name that was taken from the folder follows it."""
    folder, trigger = (folder or "").strip(), (trigger or "").strip()
    earlier = value_at(values, "data.0.path")
    if folder and folder != earlier:
        name = values.get("name", "")
        if not name or (isinstance(earlier, str) and name == name_from(earlier)):
            values = with_value(values, "name", name_from(folder))
        values = with_value(values, "data.0.path", folder)
    return with_value(values, "data.0.trigger", trigger) if trigger else without(values, "data.0.trigger")


def with_base(values: Values, base: str | None) -> Values:
    typed = (base or "").strip().strip('"')
    return with_value(values, "base.model", typed) if typed else values


def with_name(values: Values, name: str) -> Values:
    return with_value(values, "name", name.strip())


def with_prompts(values: Values, text: str) -> Values:
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    return choose(values, "sample.prompts", prompts or None)


def with_quality(values: Values, quality: Quality) -> Values:
    return choose(values, "budget.images", images_of(values, quality))


def with_recipe(values: Values, recipe: str) -> tuple[Values, str]:
    """A recipe that a person picks; the page may pick another when base or teaching change."""
    changed_to = without(values, "recipe") if recipe == NO_RECIPE else with_value(values, "recipe", recipe)
    return changed_to, "" if recipe == NO_RECIPE else recipe


def fitted(values: Values, found: Recognised | None, teaching: Teaching, chosen: str) -> tuple[Values, str]:
    """The document with the recipe for its base and teaching, if this page chose its recipe; the quality stays."""
    if found is None or found.model != value_at(values, "base.model") or values.get("recipe") != chosen:
        return values, chosen
    recipe, quality = recipe_by(found, teaching)[0], quality_of(values)
    values = with_value(values, "recipe", recipe)
    return (with_quality(values, quality) if quality else values), recipe


def prompted(
    values: Values, found: Recognised | None, teaching: Teaching, answer: Answer | None, filled: list[str]
) -> tuple[Values, list[str]]:
    """The document with suggested previews, as long as nobody has written others."""
    prompts = value_at(values, "sample.prompts")
    ours = prompts is ABSENT or prompts == filled
    if found is None or answer is None or answer.foreseen is None or not ours:
        return values, filled
    if not standing(values)["sample.every"].value:
        return values, filled
    trigger = value_at(values, "data.0.trigger")
    captions = answer.foreseen.planned.captions
    suggested = suggested_prompts(found, teaching, trigger if isinstance(trigger, str) else "", captions)
    return with_value(values, "sample.prompts", suggested), suggested
