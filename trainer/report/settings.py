"""What was to be done: the plan, what makes it fast and lean here, and every setting with what it does and why."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from ..config import settings
from ..configfile import REQUIRED, leaves
from ..console import attention_sentence, what_is_trained
from .facts import RunFacts
from .words import Words, folded, missing, pairs, paragraph, section, table


def plan(facts: RunFacts) -> str:
    """The plan as it was made when the run started last, and the settings."""
    return section("plan", "Plan and settings", _plan(facts), _techniques(facts), _attention(facts), *_settings(facts))


def _plan(facts: RunFacts) -> str:
    story, say, told = facts.story, facts.say, facts.plan
    if not story.plan:
        return missing(
            "There is no plan yet: it is made when the run starts. <code>lorasmith plan</code> shows it before."
        )
    base = told.get("base", {})
    rows = [
        ("Base", say(f"{base.get('model')} ({base.get('family')}, predicts {base.get('prediction')})")),
        ("Length", say(_length(facts))),
        ("Kind", say(what_is_trained(facts.config.adapter))),
        *((f"Trains {say(part.get('name'))}", say(_part(part))) for part in told.get("trained", [])),
        ("If the memory is full", say(told.get("if_memory_is_full", ""))),
    ]
    return pairs(rows)


def _length(facts: RunFacts) -> str:
    told, planned = facts.plan, facts.story.plan
    assert planned is not None
    shows = told.get("shows_per_image")
    each = f", each image {shows:g} times" if shows else ""
    return f"{planned.steps:,} steps of at most {told.get('batch')} images = {planned.images:,} images seen{each}"


def _part(part: dict[str, Any]) -> str:
    rates = " to ".join(dict.fromkeys(f"{rate:.3g}" for rate in part.get("effective_lr", [])))
    scaled = f" x alpha / rank = {rates}" if rates else ""
    count, rate = part.get("parameters", 0), part.get("lr", 0)
    return f"{part.get('modules')} modules, {count:,} parameters, learning rate {rate:g}{scaled}"


def _techniques(facts: RunFacts) -> str:
    rows = [
        (facts.say(one.get("name", "").replace("_", " ")), "on" if one.get("on") else "off", facts.say(one.get("why")))
        for one in facts.plan.get("techniques", [])
    ]
    return f"<h3>What makes it fast and lean</h3>{table(('technique', '', 'why'), rows)}" if rows else ""


def _attention(facts: RunFacts) -> str:
    """Which kernel computes which shape, where it was found by a probe."""
    chosen, say = facts.story.attention, facts.say
    if not chosen:
        return ""
    rows = [
        (say(one.get("shape")), say(one.get("kernel")), say(_times(one)), say(_reasons(one))) for one in chosen.shapes
    ]
    head = ("shape", "kernel", "milliseconds, forward and backward", "left out")
    return f"<h3>Attention</h3>{paragraph(say(attention_sentence(chosen)))}{table(head, rows)}"


def _times(one: dict[str, Any]) -> str:
    return ", ".join(f"{kernel} {taken:.3g}" for kernel, taken in one.get("milliseconds", {}).items())


def _reasons(one: dict[str, Any]) -> str:
    return "; ".join(f"{kernel}: {why}" for kernel, why in one.get("left_out", {}).items())


# ---------------------------------------------------------------------------------------------------------------------


def _settings(facts: RunFacts) -> Iterator[str]:
    """Those that are not their defaults first, for they say what is special about the run."""
    rows = list(leaves(facts.config))
    own = [row for row in rows if row[1] != row[2]]
    reasons = {dotted: " ".join((field.description or "").split()) for dotted, field in settings()}
    yield f"<h3>Settings that are not defaults ({len(own)})</h3>"
    yield _table(own, reasons, facts.say) if own else paragraph("All are.")
    yield folded(f"All settings ({len(rows)})", _table(rows, reasons, facts.say))


Leaf = tuple[str, Any, Any]
"""Dotted path, value and default."""


def _table(rows: list[Leaf], reasons: dict[str, str], say: Words) -> str:
    return table(
        ("setting", "value", "default", "what it does, and why"),
        [
            (
                f"<code>{say(dotted)}</code>",
                f"<bdi>{say(_shown(value))}</bdi>",
                say(_shown(default)) if value != default else "the same",
                say.prose(reasons.get(re.sub(r"\.\d+(?=\.)", "", dotted), "")),
            )
            for dotted, value, default in rows
        ],
        "settings",
    )


def _shown(value: Any) -> str:
    """As a configuration has it, about."""
    if value is REQUIRED:
        return "has to be given"
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False, default=str)
