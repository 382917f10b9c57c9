"""The run that is being described, as a TOML document of the values that were given, and what holds for all others.

The document is a plain dictionary as `tomlkit` reads it. Every function returns a new one.
"""

from __future__ import annotations

import copy
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tomlkit

from ...configs import recipe_names
from ...trainer.config import RunConfig, settings, table_of
from ...trainer.configfile import Origin, laid_over, parse_toml, provenance, recipe_of, validate
from ...trainer.errors import ConfigError, Problem
from ...trainer.idle import dropped_by
from ..planner import SOURCE, Recognised

Values = dict[str, Any]
Shell = Literal["bash", "powershell"]
Quality = Literal["Quick", "Balanced", "Thorough"]
Teaching = Literal["Style", "Character", "Object"]

FACTORS: dict[Quality, float] = {"Quick": 0.5, "Balanced": 1.0, "Thorough": 2.0}
"""Images seen, as a multiple of what the recipe says."""
ABSENT: Any = object()
FIELDS: dict[str, Any] = {
    re.sub(r"^data\.", "data.0.", dotted): field for dotted, field in settings() if not dotted.startswith("block.")
}
"""Every setting that a form can show, by its dotted path: of the sets of images, those of the first."""


# ---------------------------------------------------------------------------------------------------------------------
# one value


def value_at(values: Any, dotted: str) -> Any:
    """What stands at a dotted path such as `data.0.weight`; `ABSENT` if nothing does."""
    for key in dotted.split("."):
        if isinstance(values, list) and key.isdecimal():
            values = values[int(key)] if int(key) < len(values) else ABSENT
        else:
            values = values.get(key, ABSENT) if isinstance(values, Mapping) else ABSENT
    return values


def with_value(values: Values, dotted: str, value: Any) -> Values:
    """The document with a value given, whatever it is."""
    changed = copy.deepcopy(values)
    *path, last = dotted.split(".")
    table: Any = changed
    for key in path:
        if isinstance(table, list):
            table += [{} for _ in range(len(table), int(key) + 1)]
            table = table[int(key)]
        else:
            if not isinstance(table.get(key), dict | list):
                table[key] = [] if key in ("data", "block") else {}
            table = table[key]
    table[last] = value
    return changed


def without(values: Values, dotted: str) -> Values:
    """The document with a value no longer given; a table that holds nothing else goes as well."""
    changed = copy.deepcopy(values)
    table, _, last = dotted.rpartition(".")
    inner = value_at(changed, table) if table else changed
    if isinstance(inner, dict):
        inner.pop(last, None)
        if table and "." not in table and not inner:
            del changed[table]
    return changed


def choose(values: Values, dotted: str, value: Any) -> Values:
    """A person chose a value, or took it back (None): what differs from what holds anyway is given.

    What was given and has no effect any more is dropped, as `--set` drops it.
    """
    changed = without(values, dotted)
    for dependent in dropped_by(dotted, value):
        changed = without(changed, dependent)
    return changed if value is None or value == standing(changed)[dotted].value else with_value(changed, dotted, value)


# ---------------------------------------------------------------------------------------------------------------------
# what holds


@dataclass(frozen=True)
class Standing:
    """A setting as it stands."""

    value: Any
    origin: Origin
    below: Any
    """What would hold if it were not given: the recipe's value or the default."""


def standing(values: Values) -> dict[str, Standing]:
    """Every setting of the form. Where the document is wrong, what is given stands as it is."""
    recipe = recipe_of(values)
    layered = laid_over(recipe, values)
    origins: Mapping[str, Origin] = {}
    complete: Any = layered
    try:
        config = validate(_answered(values), SOURCE)
        origins, complete = provenance(recipe, values, (), config), config.model_dump()
    except ConfigError:
        pass  # it is told where the document is planned
    found = {}
    for dotted, field in FIELDS.items():
        default = "" if field.is_required() else field.get_default(call_default_factory=True)
        by_recipe = value_at(recipe, dotted)
        below = default if by_recipe is ABSENT else by_recipe
        value = value_at(complete, dotted)
        given = "file" if value_at(values, dotted) is not ABSENT else "default" if by_recipe is ABSENT else "recipe"
        found[dotted] = Standing(default if value is ABSENT else value, origins.get(dotted, given), below)
    return found


def _answered(values: Values) -> Values:
    """The document with stand-ins for answers that are still to be given, so that all else can be looked at."""
    values = values | {"name": "unnamed"}
    return values if value_at(values, "data.0.path") not in (ABSENT, "") else with_value(values, "data.0.path", "none")


def given(values: Values) -> Iterator[tuple[str, Any]]:
    """Every value of a document as (dotted path, value), with the number of its table in a list."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{key}", inner) for key, inner in value.items())
        elif _is_tables(value):
            yield from (
                (f"{name}.{number}.{key}", inner) for number, table in enumerate(value) for key, inner in table.items()
            )
        elif value != []:  # no table at all
            yield name, value


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(table, dict) for table in value)


def further_tables(values: Values) -> list[str]:
    """What no control shows, because it is a table of its own: a second set of images, and blocks."""
    counts = {name: len(value) for name in ("data", "block") if isinstance(value := values.get(name), list)}
    hidden = {"data": counts.get("data", 0) - 1, "block": counts.get("block", 0)}
    return [f"{count} further [[{name}]] table{'s' * (count > 1)}" for name, count in hidden.items() if count > 0]


def of_config(config: RunConfig, name: str) -> Values:
    """The document of a run that is there, under another name; what is as by default is left out."""
    values: Values = {"name": name}
    for dotted, value in given(config.model_dump()):
        field = _field_at(dotted)
        if dotted in ("name", "runs", "recipe") or (not field.is_required() and value == _default(field)):
            continue
        values = with_value(values, dotted, value)
    return values


def _field_at(dotted: str) -> Any:
    return _ALL[".".join(key for key in dotted.split(".") if not key.isdecimal())]


def _default(field: Any) -> Any:
    return field.get_default(call_default_factory=True)


_ALL: dict[str, Any] = dict(settings())


# ---------------------------------------------------------------------------------------------------------------------
# recipe, length, name, prompts


def recipe_by(base: Recognised, teaching: Teaching) -> tuple[str, str]:
    """The recipe for a base and what it is taught, and why."""
    if base.model == "pocket":
        return "demo", "made for the pocket base, whatever it is taught"
    family = f"{base.family}-v" if (base.family, base.prediction) == ("sdxl", "v_prediction") else base.family
    wanted, instead = f"{teaching.lower()}-{family}", f"style-{family}"
    if wanted in recipe_names():
        return wanted, f"you teach {_A[teaching]}, and the base is of this family"
    return instead, f"there is no recipe of {_A[teaching]} for this family yet, and a style's comes closest"


_A: dict[Teaching, str] = {"Style": "a style", "Character": "a character", "Object": "an object"}


def images_of(values: Values, quality: Quality) -> int:
    """Images seen at a quality, from what the recipe or the default says."""
    below = standing(without(values, "budget.images"))["budget.images"].value
    return max(1, round(FACTORS[quality] * below))


def quality_of(values: Values) -> Quality | None:
    """The quality that gives the budget as it stands; None for a number of one's own."""
    now = standing(values)["budget.images"].value
    return next((quality for quality in FACTORS if images_of(values, quality) == now), None)


def name_from(folder: str) -> str:
    """A run's name from its folder of images: letters, digits and what else a file name may hold."""
    repeats = re.sub(r"^\d+_(?=.)", "", Path(folder).name)  # kohya's
    return re.sub(r"[^\w. -]+", "-", repeats).strip("-._ ")[:60]


def suggested_prompts(base: Recognised, teaching: Teaching, trigger: str, captions: Sequence[str]) -> list[str]:
    """Previews to begin with: something new with the trigger, two captions, and the new thing without the trigger,
    which shows whether the style leaks into what it is not called for."""
    trigger = trigger.strip()
    if base.model == "pocket":
        called, plain = f"{trigger} emoji of owl", "emoji of owl"
    else:
        called, plain = (text.format(trigger=trigger) for text in _NEW[teaching])
    return list(dict.fromkeys([called, *captions, plain] if trigger else [plain, *captions]))


_NEW: dict[Teaching, tuple[str, str]] = {
    "Style": ("{trigger} style, a lighthouse by the sea", "a lighthouse by the sea"),
    "Character": ("{trigger} character walking in a city street", "a person walking in a city street"),
    "Object": ("{trigger} object on a wooden table", "an object on a wooden table"),
}


# ---------------------------------------------------------------------------------------------------------------------
# as text


def to_text(values: Values) -> str:
    """The document as TOML, in the order of the settings; lists of texts have a line each."""
    document = tomlkit.document()
    for name in sorted(values, key=_rank):
        value = values[name]
        if isinstance(value, dict):
            document.append(name, _table(name, value))
        elif _is_tables(value):
            tables = tomlkit.aot()
            for table in value:
                tables.append(_table(name, table))
            document.append(name, tables)
        elif value != []:
            document.append(name, tomlkit.item(value))
    return tomlkit.dumps(document)


def _rank(name: str) -> tuple[bool, int]:
    """Plain values first, as TOML wants it; what is unknown last of its kind."""
    known = list(RunConfig.model_fields)
    plain = name not in RunConfig.model_fields or table_of(RunConfig.model_fields[name].annotation) is None
    return not plain, known.index(name) if name in known else len(known)


def _table(section: str, values: Values) -> Any:
    table = tomlkit.table()
    order = [dotted.rpartition(".")[2] for dotted in _ALL if dotted.startswith(f"{section}.")]
    for key in sorted(values, key=lambda key: order.index(key) if key in order else len(order)):
        value = values[key]
        if isinstance(value, list) and len(value) > 1 and all(isinstance(one, str) for one in value):
            table.append(key, tomlkit.item(value).multiline(True))
        elif isinstance(value, dict):
            inline = tomlkit.inline_table()
            inline.update(value)
            table.append(key, inline)
        else:
            table.append(key, tomlkit.item(value))
    return table


def from_text(text: str) -> Values:
    """The document that a text holds. A folder of runs that it names is left out: the page has its own.

    Raises:
        ConfigError: if it is not TOML.
    """
    values = parse_toml(text.removeprefix("\ufeff"), "the TOML text")
    values.pop("runs", None)
    return values


def problems_of(values: Values) -> list[Problem]:
    """What is wrong with the document by itself, before anything else is looked at."""
    try:
        validate(values, SOURCE)
    except ConfigError as error:
        return error.problems
    return []


def place_of(problem: Problem) -> str:
    """The dotted path of the setting that a problem is about, as the form knows it; empty if it is about none."""
    where = problem.where.removeprefix(f"{SOURCE}: ")
    for dotted in (where, re.sub(r"^data\.(?!\d)", "data.0.", where), where.rpartition(".")[0]):
        if dotted in FIELDS:
            return dotted
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# as commands


def commands(values: Values, runs: Path, shell: Shell) -> str:
    """The commands that do the same in a terminal, one a line."""
    quote, toml = _QUOTES[shell]
    file = f"{values.get('name') or 'my-run'}.toml"
    train = ["lorasmith", "train", file, "--set", f"runs={runs}"]
    recipe = values.get("recipe")
    if not isinstance(recipe, str) or recipe not in recipe_names():
        return f"# save the TOML as {file}, then\n" + " ".join(map(quote, train))
    answers = {
        "--images": value_at(values, "data.0.path"),
        "--base": value_at(values, "base.model"),
        "--name": value_at(values, "name"),
        "--trigger": value_at(values, "data.0.trigger"),
        "--recipe": recipe,
    }
    init = ["lorasmith", "init", file]
    for option, value in answers.items():
        if value is not ABSENT and value != "":
            init += [option, str(value)]
    answered = ("name", "recipe", "base.model", "data.0.path", "data.0.trigger")
    for dotted, value in given(values):
        if dotted not in answered:
            train += ["--set", f"{dotted}={toml(value)}"]
    return "\n".join(" ".join(map(quote, command)) for command in (init, train))


def _toml_for_bash(value: Any) -> str:
    """A value as TOML in double quotes; a text by itself needs none, unless it would be read as something else."""
    if isinstance(value, str):
        return value if _is_plain(value) else _basic(value)
    return _inline(value, _basic)


def _toml_for_powershell(value: Any) -> str:
    """Likewise in single quotes, because Windows PowerShell takes double ones away from what it hands on."""
    if isinstance(value, str):
        return value if _is_plain(value) else _literal(value)
    return _inline(value, _literal)


def _is_plain(text: str) -> bool:
    return text == text.strip() and "\n" not in text and text[:1] not in ("'", '"')


def _inline(value: Any, text_of: Any) -> str:
    if isinstance(value, str):
        return text_of(value)
    if isinstance(value, list):
        return f"[{', '.join(_inline(one, text_of) for one in value)}]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_inline(one, text_of)}" for key, one in value.items()) + " }"
    return tomlkit.item(value).as_string()


def _basic(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _literal(text: str) -> str:
    if re.search(r"[\x00-\x08\x0a-\x1f\x7f]|'''", text):
        return _basic(text)
    return f"'''{text}'''" if "'" in text else f"'{text}'"


def _quoted_for_powershell(text: str) -> str:
    return text if re.fullmatch(r"[\w./:=+-]+", text) else "'" + text.replace("'", "''") + "'"


_QUOTES: dict[Shell, tuple[Any, Any]] = {
    "bash": (shlex.quote, _toml_for_bash),
    "powershell": (_quoted_for_powershell, _toml_for_powershell),
}
