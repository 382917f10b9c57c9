"""A `RunConfig` from TOML and to TOML: files, recipes, `--set`, and every problem in them told at once.

The order of precedence is: default, then recipe, then file, then `--set section.key=value`.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import tomlkit
import tomlkit.exceptions
from pydantic import ValidationError

from ..configs import read_recipe, recipe_names
from ..datasets.unpack import anchored
from .config import RunConfig, Section, settings, table_of
from .errors import ConfigError, Problem, first_line
from .files import write_text
from .idle import NESTED_PROBLEMS, dropped_by

LARGEST = 256 * 2**10
"""Bytes of a TOML file; a complete configuration with every comment has 15 KiB, and tomlkit reads slowly."""
NO_TOML = (tomlkit.exceptions.TOMLKitError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What tomlkit raises of a text that is none: its own, of numbers and dates Python's, of deep nesting the last."""
_DEEPEST = 5
"""Keys of a dotted path; `block.0.kind` has 3."""
Origin = Literal["default", "recipe", "file", "--set", "rule"]
"""Where a value comes from; a rule gives a learning rate that nobody gave, where its default would be wrong."""


def read_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a TOML file, lay it over the recipe it names and under `--set` overrides, and validate the whole.

    Raises:
        ConfigError: with every problem of the file at once, each with its dotted path.
    """
    return read_with_provenance(path, overrides)[0]


def read_with_provenance(path: Path, overrides: Sequence[str] = ()) -> tuple[RunConfig, dict[str, Origin]]:
    """Likewise, with where each value comes from, as `provenance` tells it."""
    values = read_toml(path)
    config = validate(values, path.name, overrides)
    origins = provenance(recipe_of(values, overrides), values, overrides, config)
    for data in config.data:
        data.path = anchored(data.path, path.parent)
    return config, origins


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file as plain dictionaries."""
    if path.is_dir():
        raise ConfigError("is a folder, not a configuration file", str(path), "Name a .toml file.")
    try:
        if path.stat().st_size > LARGEST:
            raise ConfigError(f"has more than {LARGEST >> 10} KiB", str(path), "Name a run's configuration.")
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError("no such file", str(path), "Write one with: lorasmith init FILE --images DIR") from None
    except OSError as error:
        raise ConfigError(f"cannot be read ({error.strerror})", str(path), "Check its path and permissions.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not UTF-8 text ({error.reason})", str(path), "Save it as UTF-8.") from None
    return parse_toml(text, str(path))


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """The tables of a TOML text as plain dictionaries.

    Raises:
        ConfigError: if it is not TOML, or longer than any configuration.
    """
    if len(text) > LARGEST:
        raise ConfigError(f"has more than {LARGEST >> 10} KiB", where, "Give a run's configuration.")
    try:
        return tomlkit.parse(text).unwrap()
    except NO_TOML as error:
        raise ConfigError(f"is not valid TOML: {first_line(error)}", where, "Mend that line.") from None


def validate(values: Mapping[str, Any], source: str = "configuration", overrides: Sequence[str] = ()) -> RunConfig:
    """Values over the recipe they name and under `--set` overrides to a `RunConfig`.

    Raises:
        ConfigError: with every problem at once, each with its dotted path.
    """
    recipe = recipe_of(values, overrides)
    layered = overridden(laid_over(recipe, values), overrides)
    problems = list(_recipe_without_effect(recipe, values, overrides))
    try:
        config = RunConfig.model_validate(layered)
    except ValidationError as error:
        told = [problem for detail in error.errors() for problem in _explain(detail)]
        problems += [*told, *_hidden_problems(layered, error)]
    if problems:
        raise ConfigError.of(_placed(problem, source, _given_by(overrides)) for problem in problems)
    return config


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Tables are laid over each other key by key; any other value of `over` replaces the one of `under`.

    Nothing is shared with what was given, so that a change of the result leaves a recipe as it was.
    """
    merged = {key: copy.deepcopy(value) for key, value in under.items()}
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            merged[key] = merge(below, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


# ---------------------------------------------------------------------------------------------------------------------
# layers: default, recipe, file, --set


def recipe_of(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The tables of the recipe that a file or `--set` names; none for an unknown name, which `RunConfig` refuses."""
    name = _all_set(values, overrides).get("recipe")
    return read_recipe(name) if name in recipe_names() else {}


def laid_over(recipe: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A file over its recipe; what the recipe sets and the file leaves no effect is dropped."""
    return _without_idle(merge(recipe, values), set(_names_in(values)))


def overridden(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Values under `--set` overrides; what they leave no effect is dropped: a complete file spells it out."""
    return _without_idle(_all_set(values, overrides), _given_by(overrides))


def provenance(
    recipe: Mapping[str, Any], file_values: Mapping[str, Any], overrides: Sequence[str], config: RunConfig
) -> dict[str, Origin]:
    """Where each value of a configuration comes from, by dotted path (`data.0.path` in a list of tables).

    What a file only repeats, as one that `lorasmith init` wrote does, comes from the recipe or default that it repeats.
    """
    in_file = laid_over(recipe, file_values)
    in_all = overridden(in_file, overrides)
    given = _given_by(overrides)

    def origin(dotted: str, value: Any, default: Any) -> Origin:
        if any(f"{name}.".startswith(f"{dotted}.") for name in given):
            return "--set"
        if _value_at(in_all, dotted) is _ABSENT:
            return "default" if value == default else "rule"
        by_recipe = _value_at(recipe, dotted)
        if _value_at(in_file, dotted) != (default if by_recipe is _ABSENT else by_recipe):
            return "file"
        return "default" if by_recipe is _ABSENT else "recipe"

    return {dotted: origin(dotted, value, default) for dotted, value, default in leaves(config)}


def _all_set(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    changed = copy.deepcopy(dict(values))
    for override in overrides:
        set_value(changed, override)
    return changed


def _given_by(overrides: Sequence[str]) -> set[str]:
    return {_dotted(_parts_of(override)[0]) for override in overrides}


def _names_in(values: Mapping[str, Any]) -> Iterator[str]:
    """Of a file, the dotted paths of its settings; of a list of tables, its own name."""
    for name, value in values.items():
        yield from [f"{name}.{key}" for key in value] if isinstance(value, Mapping) else [name]


def _without_idle(values: dict[str, Any], given: Collection[str]) -> dict[str, Any]:
    """`--set adapter.unet=false` means its learning rate as well, `--set sample.every=0` the prompts: what is chosen
    in one layer drops what it leaves no effect in the layers below."""
    for switch in given:
        table, key = _table_at(values, switch)
        for dependent in dropped_by(switch, table[key]) if key in table else ():
            if dependent not in given:
                table_below, key_below = _table_at(values, dependent)
                table_below.pop(key_below, None)
    return values


def _table_at(values: dict[str, Any], dotted: str) -> tuple[dict[str, Any], str]:
    """The table that holds `section.key`, and the key; an empty one if there is none."""
    section, _, key = dotted.partition(".")
    table = values.get(section)
    return (table if isinstance(table, dict) else {}), key


REQUIRED = object()
_ABSENT = object()


def _value_at(values: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        if isinstance(values, list):
            values = values[int(key)] if int(key) < len(values) else _ABSENT
        else:
            values = values.get(key, _ABSENT) if isinstance(values, Mapping) else _ABSENT
    return values


def leaves(section: Section, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Each setting as (dotted path, value, default), with the number of its table in a list; the default of one that
    has to be given is `REQUIRED`."""
    for name, field in type(section).model_fields.items():
        value, dotted = getattr(section, name), f"{prefix}{name}"
        if isinstance(value, Section):
            yield from leaves(value, f"{dotted}.")
        elif table_of(field.annotation):
            for number, table in enumerate(value):
                yield from leaves(table, f"{dotted}.{number}.")
        else:
            yield dotted, value, REQUIRED if field.is_required() else field.get_default(call_default_factory=True)


# ---------------------------------------------------------------------------------------------------------------------
# --set


def set_value(values: dict[str, Any], override: str) -> None:
    """Apply one `section.key=value` in place; the value is read as TOML, or else as plain text.

    `data.path=...` sets the first data table, `data.1.path=...` the second; likewise of blocks.
    """
    keys, text = _parts_of(override)
    table: Any = values
    for key, following in pairwise(keys):
        table = _below(table, key, following, override)
    if not isinstance(table, dict):
        raise ConfigError("does not name a setting", f"--set {override}", "Name it by its dotted path.")
    table[keys[-1]] = _value_of(keys, text)


def _parts_of(override: str) -> tuple[list[str], str]:
    """The keys and the text, as it is, of `section.key=value`."""
    dotted, equals, text = override.partition("=")
    keys = [key.strip() for key in dotted.split(".")]
    if not equals or not all(keys) or len(keys) > _DEEPEST:
        raise ConfigError("is not of the form section.key=value", f"--set {override}", "Example: --set adapter.rank=8")
    if keys[0] in ("data", "block") and len(keys) == 2:
        keys.insert(1, "0")
    return keys, text


def _below(table: Any, key: str, following: str, override: str) -> Any:
    """What stands under a key, made if it is not there yet."""
    if isinstance(table, list):
        return _list_entry(table, key, override)
    if isinstance(table, dict):
        return table.setdefault(key, [] if following.isdecimal() else {})
    raise ConfigError("does not name a setting", f"--set {override}", "Name it by its dotted path.")


def _list_entry(tables: list[Any], key: str, override: str) -> Any:
    if not re.fullmatch(r"[0-9]{1,3}", key) or int(key) > len(tables):
        raise ConfigError(f"there is no table number {key}", f"--set {override}", "The first one is number 0.")
    if int(key) == len(tables):
        tables.append({})
    return tables[int(key)]


def _value_of(keys: Sequence[str], text: str) -> Any:
    """The text as TOML, or else as plain text. Where the setting is a text, only quotes are TOML: `name=2024` is no
    number, and a blank at the end of `data.caption_prefix=a ` belongs to it."""
    value = _toml_value(text.strip())
    dotted = _dotted(key for key in keys if not key.isdecimal())
    if any(field.annotation is str for name, field in settings() if name == dotted):
        return value if isinstance(value, str) else text
    return text.strip() if value is None else value


def _toml_value(text: str) -> Any:
    """None, which TOML has not, for what is no TOML."""
    try:
        return tomlkit.value(text).unwrap()
    except NO_TOML:
        return None


# ---------------------------------------------------------------------------------------------------------------------
# problems


def _recipe_without_effect(
    recipe: Mapping[str, Any], values: Mapping[str, Any], overrides: Sequence[str]
) -> Iterator[Problem]:
    if recipe and "recipe" in _given_by(overrides) and set(_names_in(recipe)) <= set(_names_in(values)):
        what = "has no effect, because the file spells out everything that this recipe sets"
        yield Problem("recipe", what, "Write another file with: lorasmith init FILE --images DIR --recipe NAME")


def _hidden_problems(values: Mapping[str, Any], error: ValidationError) -> Iterator[Problem]:
    """Settings without effect, which pydantic looks for only when each single value is right.

    So it looks again, without the values that are wrong; what is said of one of these is not said again.
    """
    wrong = {detail["loc"][:2] for detail in error.errors()}
    if () in wrong:  # then it has looked
        return
    sound: dict[str, Any] = {"name": "x", "data": [{"path": "x", "trigger": "x"}]}
    for name, field in RunConfig.model_fields.items():
        value = values.get(name)
        if isinstance(value, Mapping):
            sound[name] = {key: inner for key, inner in value.items() if (name, key) not in wrong}
        elif isinstance(value, list) and table_of(field.annotation) and not any(place[0] == name for place in wrong):
            sound[name] = value
    try:
        RunConfig.model_validate(sound)
    except ValidationError as hidden:
        told = [problem for detail in hidden.errors() for problem in _explain(detail)]
        names = [re.escape(_dotted(place)) for place in wrong if len(place) > 1]
        yield from (problem for problem in told if not any(re.search(rf"\b{name}\b", str(problem)) for name in names))


def _explain(detail: Any) -> Iterator[Problem]:
    """One pydantic error in the words of this project, at its dotted path."""
    path = detail["loc"]
    dotted = _dotted(path)
    nested = detail.get("ctx", {}).get("error")
    if isinstance(nested, ValueError) and nested.args and nested.args[0] == NESTED_PROBLEMS:
        yield from nested.args[1]
    elif detail["type"] == "extra_forbidden":
        yield Problem(dotted, "unknown key", _did_you_mean(path))
    elif detail["type"] == "missing":
        yield Problem(dotted, "is missing", _HOW_TO_GIVE.get(dotted, "Give it a value."))
    else:
        message = detail["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
        shown = "" if isinstance(detail["input"], dict | list) else f" (it is {detail['input']!r})"
        yield Problem(dotted, f"{message}{shown}", _help_of(path))


def _placed(problem: Problem, source: str, given: Collection[str]) -> Problem:
    """The problem with the place a person has to go to: the file, or the `--set` that gave the value."""
    by_set = any(f"{dotted}.".startswith(f"{problem.where}.") for dotted in given)
    return replace(problem, where=f"--set {problem.where}" if by_set else f"{source}: {problem.where}")


_HOW_TO_GIVE = {
    "name": 'Add a line such as: name = "my-style"',
    "data": 'Add a table: [[data]] and under it path = "photos/"',
}


def _did_you_mean(path: Sequence[Any]) -> str:
    """A setting of a similar name: of the same table, or else of another one."""
    section, _, wanted = _setting_at(path).rpartition(".")
    known = [dotted for dotted, _ in settings()]
    siblings = [dotted for dotted in known if dotted.rpartition(".")[0] == section]
    if not section:
        siblings += [name for name, field in RunConfig.model_fields.items() if table_of(field.annotation)]
    for candidates, likeness in ((siblings, 0.6), (known, 0.75)):
        ranked = sorted(candidates, key=lambda dotted: not dotted.startswith("block."))  # what holds everywhere wins
        by_name = {dotted.rpartition(".")[2]: dotted for dotted in ranked}
        if close := difflib.get_close_matches(wanted, by_name, n=1, cutoff=likeness):
            return f"Did you mean {by_name[close[0]]}?"
    return f"Known here: {', '.join(siblings)}."


def _help_of(path: Sequence[Any]) -> str:
    found = (field.description or "" for dotted, field in settings() if dotted == _setting_at(path))
    return " ".join(next(found, "").split())


def _setting_at(path: Sequence[Any]) -> str:
    """The dotted path of a setting, of whichever table in a list."""
    return _dotted(part for part in path if not isinstance(part, int))


def _dotted(path: Iterable[Any]) -> str:
    return ".".join(str(part) for part in path)


# ---------------------------------------------------------------------------------------------------------------------
# writing


def write_config(config: RunConfig, path: Path) -> None:
    """Write the complete configuration, every value spelled out, whole or not at all."""
    write_text(path, to_toml(config, comments=False))


def to_toml(config: RunConfig, comments: bool = True) -> str:
    """The complete configuration as TOML; with `comments`, each value has its docstring above it."""
    document = tomlkit.document()
    tables = [name for name, field in RunConfig.model_fields.items() if table_of(field.annotation)]
    _fill(document, config, comments, skip=tables)
    for name in tables:
        value = getattr(config, name)
        if isinstance(value, list):
            array = tomlkit.aot()
            for entry in value:
                array.append(_fill(tomlkit.table(), entry, comments))
            document.append(name, array)
        else:
            document.append(name, _fill(tomlkit.table(), value, comments))
    return tomlkit.dumps(document)


def _fill(table: Any, section: Section, comments: bool, skip: Sequence[str] = ()) -> Any:
    for name, field in type(section).model_fields.items():
        if name in skip:
            continue
        if comments and field.description:
            for line in field.description.splitlines():
                table.add(tomlkit.comment(line.strip()))
        value = getattr(section, name)
        table.add(name, _inline(value) if isinstance(value, dict) else value)
    table.add(tomlkit.nl())
    return table


def _inline(values: Mapping[str, Any]) -> Any:
    table = tomlkit.inline_table()
    table.update(values)
    return table
