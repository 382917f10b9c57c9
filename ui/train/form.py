"""The controls of a run's settings, generated from `RunConfig`: one for each field, with its docstring as its help.

A control shows what holds, be it given, from the recipe or by default, and says which. What a person changes in it goes
to the document of `draft.py`, and all that is shown comes from there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

import gradio as gr
import tomlkit

from ...trainer.config import RunConfig, table_of
from ...trainer.configfile import NO_TOML
from ...trainer.errors import Problem
from ...trainer.idle import OF_NUMBERS, OF_SWITCHES, ONLY_WITH
from ..html import sentence
from .draft import FIELDS, Standing, Values, choose, place_of, standing

ASKED_ELSEWHERE = ("name", "runs", "recipe", "base.model", "data.0.path", "data.0.trigger", "sample.prompts")
"""What the answers and the Images page give, and what the page keeps for itself."""
SHOWN = {dotted: field for dotted, field in FIELDS.items() if dotted not in ASKED_ELSEWHERE}
_LINES_OF_A_LIST = 3


@dataclass(frozen=True)
class Look:
    """What a control shows."""

    value: Any
    label: str
    info: str
    interactive: bool

    def update(self) -> Any:
        return gr.update(value=self.value, label=self.label, info=self.info, interactive=self.interactive)


# ---------------------------------------------------------------------------------------------------------------------
# controls


def controls() -> dict[str, dict[str, Any]]:
    """By table, in an accordion of its own, a control for each setting by its dotted path; to be called where they are
    to stand."""
    made: dict[str, dict[str, Any]] = {}
    looks = looks_of({}, [])
    for section, title in _sections().items():
        made[section] = {}
        with gr.Accordion(title, open=False):
            for row in _in_twos([dotted for dotted in SHOWN if section_of(dotted) == section]):
                with gr.Row():
                    made[section] |= {dotted: _control(SHOWN[dotted], looks[dotted]) for dotted in row}
    return made


def edits_of(control: Any) -> list[Any]:
    """The events by which a person has changed a control: text and numbers count when they are complete."""
    return [control.blur, control.submit] if isinstance(control, gr.Textbox | gr.Number) else [control.input]


def edited(values: Values, dotted: str, shown: Any) -> Values:
    """The document after a person has changed a control to what it shows now."""
    return choose(values, dotted, read(SHOWN[dotted].annotation, shown))


def _sections() -> dict[str, str]:
    """The tables of a configuration with their headings; plain settings of the run come first."""
    titles = {"": "Run: its seed"}
    for name, field in RunConfig.model_fields.items():
        table = table_of(field.annotation)
        if table and any(section_of(dotted) == name for dotted in SHOWN):
            told = " ".join((table.__doc__ or "").split()).partition(". ")[0].removesuffix(".")
            titles[name] = f"{name.capitalize()}: {told[:1].lower()}{told[1:]}".replace("`", "")
    return titles


def section_of(dotted: str) -> str:
    """The table of a setting; empty for those of the run itself."""
    return dotted.partition(".")[0] if "." in dotted else ""


def _in_twos(names: Sequence[str]) -> list[Sequence[str]]:
    return [names[start : start + 2] for start in range(0, len(names), 2)]


def _control(field: Any, look: Look) -> Any:
    shared: dict[str, Any] = {"label": look.label, "info": look.info, "value": look.value, "interactive": True}
    annotation = field.annotation
    if annotation is bool:
        return gr.Checkbox(**shared, min_width=280)
    if get_origin(annotation) is Literal:
        return gr.Dropdown(list(get_args(annotation)), **shared, min_width=280)
    if annotation in (int, float):
        # no minimum and maximum: Gradio would not hand on what lies outside, and the page would plan with another value
        return gr.Number(**shared, step=1 if annotation is int else 0.1, min_width=280)
    if choices := _choices_of_list(annotation):
        return gr.Dropdown(choices, multiselect=True, **shared, min_width=280)
    lines = _LINES_OF_A_LIST if annotation == list[str] or get_origin(annotation) is dict else 1
    return gr.Textbox(**shared, lines=lines, max_lines=max(lines, 8), min_width=280)


def bounds_of(field: Any) -> str:
    """The numbers that a field takes, in a sentence; empty for what is no number."""
    rules = {key: getattr(rule, key) for rule in field.metadata for key in _BOUNDS if hasattr(rule, key)}
    told = [f"{words} {rules[key]:,.15g}" for key, words in _BOUNDS.items() if rules.get(key, 2**53) < 2**53]
    return f"{' and '.join(told).capitalize()}." if told and field.annotation in (int, float) else ""


_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def _choices_of_list(annotation: Any) -> list[str]:
    inner = get_args(annotation)[0] if get_origin(annotation) is list else None
    return list(get_args(inner)) if get_origin(inner) is Literal else []


# ---------------------------------------------------------------------------------------------------------------------
# between a control and its setting


def show(annotation: Any, value: Any) -> Any:
    """A setting's value as its control shows it."""
    if annotation == list[str] and isinstance(value, list):
        return "\n".join(map(str, value))
    if get_origin(annotation) is dict and isinstance(value, dict):
        return tomlkit.dumps(value).strip()
    if annotation in (bool, int, float, str) or get_origin(annotation) is Literal or _choices_of_list(annotation):
        return value if _fits(annotation, value) else None
    return value if isinstance(value, str) else tomlkit.item(value).as_string()


def _fits(annotation: Any, value: Any) -> bool:
    """Whether a control can show what a document gives: it may give anything."""
    if annotation in (int, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    if _choices_of_list(annotation):
        return isinstance(value, list) and all(one in _choices_of_list(annotation) for one in value)
    return value in get_args(annotation) if get_origin(annotation) is Literal else isinstance(value, annotation)


def read(annotation: Any, shown: Any) -> Any:
    """What a control shows as its setting's value; None for nothing, which takes the value back.

    What is not of the setting's type is left as it is: the configuration says so, in its place.
    """
    if annotation in (int, float) and isinstance(shown, int | float):
        return int(shown) if annotation is int and float(shown).is_integer() else shown
    if annotation in (bool, int, float, str) or get_origin(annotation) is Literal or _choices_of_list(annotation):
        return shown
    text = str(shown or "").strip()
    if annotation == list[str]:
        return [line.strip() for line in text.splitlines() if line.strip()]
    return _toml_table(text) if get_origin(annotation) is dict else _toml_value(text)


def _toml_table(text: str) -> Any:
    try:
        return tomlkit.parse(text).unwrap()
    except NO_TOML:
        return text


def _toml_value(text: str) -> Any:
    """For settings of several types: a number, a list of them, or a word."""
    bare = f"[{text}]" if "," in text and not text.startswith("[") else text
    try:
        return tomlkit.value(bare).unwrap() if bare else None
    except NO_TOML:
        return text


# ---------------------------------------------------------------------------------------------------------------------
# what is shown


def looks_of(values: Values, problems: Sequence[Problem]) -> dict[str, Look]:
    """What each control shows of a document, and which of its problems."""
    stands = standing(values)
    wrong: dict[str, list[Problem]] = {}
    for problem in problems:
        wrong.setdefault(place_of(problem), []).append(problem)
    return {dotted: _look(dotted, stands, wrong.get(dotted, [])) for dotted in SHOWN}


def changed(values: Values) -> list[tuple[str, str]]:
    """The settings that were given, as (what a list of them says, dotted path)."""
    stands = standing(values)
    told = []
    for dotted in SHOWN:
        setting = stands[dotted]
        if setting.origin == "file":
            now, then = _short(setting.value), _short(setting.below)
            told.append((f"{dotted} = {now} (else {then})", dotted))
    return told


def name_of(dotted: str) -> str:
    """The words of a setting's key."""
    words = dotted.rpartition(".")[2].replace("_", " ")
    return words[:1].upper() + words[1:]


def _look(dotted: str, stands: Mapping[str, Standing], problems: Sequence[Problem]) -> Look:
    field, setting = SHOWN[dotted], stands[dotted]
    mark = {
        "file": f" · changed, else {_short(setting.below)}",
        "recipe": " · from the recipe",
        "rule": " · follows from another setting",
    }.get(setting.origin, "")
    idle = "" if setting.origin == "file" else _idle(dotted, stands)
    help_text = " ".join((field.description or "").split())
    bounds = f" {bounds_of(field)}".rstrip()
    told = "".join(_told(problem, help_text) for problem in problems)
    return Look(
        value=show(field.annotation, setting.value),
        label=f"{name_of(dotted)} ({dotted.replace('data.0.', 'data.')}){mark}",
        info=f"{told}{idle}{plain(help_text)}{bounds}",
        interactive=not idle,
    )


def _told(problem: Problem, help_text: str) -> str:
    """A problem before the help of its setting, which is its fix where it has no other."""
    fix = "" if problem.fix == help_text else f"{plain(problem.fix)} "
    return f"**Problem: {plain(sentence(problem.what))}** {fix}"


def _idle(dotted: str, stands: Mapping[str, Standing]) -> str:
    """Why a setting has no effect as things stand; empty if it has one."""
    if dotted in ONLY_WITH:
        switch, with_effect = ONLY_WITH[dotted]
        if (now := stands[switch].value) not in with_effect:
            return f"Has no effect while {plain(switch)} is {plain(_short(now))}. "
    if dotted in OF_NUMBERS and not stands[OF_NUMBERS[dotted]].value:
        return f"Has no effect while {plain(OF_NUMBERS[dotted])} is 0. "
    switches, fix = OF_SWITCHES.get(dotted.removeprefix("data.0."), ((), ""))
    if dotted.startswith("data.") and switches and all(_is_default(f"data.0.{switch}", stands) for switch in switches):
        return f"Has no effect before {plain(fix)}. "
    return ""


def _is_default(dotted: str, stands: Mapping[str, Standing]) -> bool:
    return stands[dotted].value == FIELDS[dotted].get_default(call_default_factory=True)


def _short(value: Any) -> str:
    if isinstance(value, str):
        return value or "nothing"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | dict) and not value:
        return "none"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def plain(text: str) -> str:
    """Text for Gradio's line of help, which escapes HTML, and would take stars for emphasis and brackets for links."""
    return text.replace("*", "\u2217").replace("](", "]\u200b(")
