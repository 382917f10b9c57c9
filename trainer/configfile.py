"""A `RunConfig` from TOML and to TOML: files, recipes, `--set`, and every problem in them told at once.

The order of precedence is: default, then recipe, then file, then `--set section.key=value`.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import tomlkit
import tomlkit.exceptions
from pydantic import ValidationError

from ..datasets.unpack import anchored
from .config import NEEDS, NESTED_PROBLEMS, OF_FULL, OF_LORA, RATES, RunConfig, Section, settings, table_of
from .errors import ConfigError, Problem
from .files import write_text


def read_config(path: Path, overrides: Sequence[str] = (), recipe: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a TOML file, lay it over a recipe and under `--set` overrides, and validate the whole.

    Raises:
        ConfigError: with every problem of the file at once, each with its dotted path.
    """
    config = validate(merge(recipe or {}, read_toml(path)), path.name, overrides)
    for data in config.data:
        data.path = anchored(data.path, path.parent)
    return config


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file as plain dictionaries."""
    if path.is_dir():
        raise ConfigError("is a folder, not a configuration file", str(path), "Name a .toml file.")
    try:
        return tomlkit.parse(path.read_text(encoding="utf-8-sig")).unwrap()
    except FileNotFoundError:
        raise ConfigError("no such file", str(path), "Write one with: lorasmith init FILE --images DIR") from None
    except OSError as error:
        raise ConfigError(f"cannot be read ({error.strerror})", str(path), "Check its path and permissions.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not UTF-8 text ({error.reason})", str(path), "Save it as UTF-8.") from None
    except tomlkit.exceptions.TOMLKitError as error:
        raise ConfigError(f"is not valid TOML: {error}", str(path), "Mend that line.") from None


def validate(values: Mapping[str, Any], source: str = "configuration", overrides: Sequence[str] = ()) -> RunConfig:
    """Values under `--set` overrides to a `RunConfig`; all problems in one `ConfigError`."""
    values = copy.deepcopy(dict(values))
    for override in overrides:
        set_value(values, override)
    given = {".".join(_parts_of(override)[0]) for override in overrides}
    _forget_what_was_switched_off(values, given)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        details = [*error.errors(), *_hidden_errors(values, error)]
    problems = [problem for detail in details for problem in _explain(detail)]
    raise ConfigError.of(_placed(problem, source, given) for problem in problems)


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
# --set


def set_value(values: dict[str, Any], override: str) -> None:
    """Apply one `section.key=value` in place; the value is read as TOML, or else as plain text.

    `data.path=...` sets the first data table, `data.1.path=...` the second.
    """
    keys, text = _parts_of(override)
    table: Any = values
    for key, following in pairwise(keys):
        table = _below(table, key, following, override)
    if not isinstance(table, dict):
        raise ConfigError("does not name a setting", f"--set {override}", "Name it by its dotted path.")
    table[keys[-1]] = _value_of(keys, text)


def _parts_of(override: str) -> tuple[list[str], str]:
    """The keys and the text of `section.key=value`."""
    dotted, equals, text = override.partition("=")
    keys = [key.strip() for key in dotted.split(".")]
    if not equals or not all(keys):
        raise ConfigError("is not of the form section.key=value", f"--set {override}", "Example: --set adapter.rank=8")
    if keys[0] == "data" and len(keys) == 2:
        keys.insert(1, "0")
    return keys, text.strip()


def _below(table: Any, key: str, following: str, override: str) -> Any:
    """What stands under a key, made if it is not there yet."""
    if isinstance(table, list):
        return _list_entry(table, key, override)
    if isinstance(table, dict):
        return table.setdefault(key, [] if following.isdecimal() else {})
    raise ConfigError("does not name a setting", f"--set {override}", "Name it by its dotted path.")


def _list_entry(tables: list[Any], key: str, override: str) -> Any:
    if not key.isdecimal() or int(key) > len(tables):
        raise ConfigError(f"there is no table number {key}", f"--set {override}", "The first one is number 0.")
    if int(key) == len(tables):
        tables.append({})
    return tables[int(key)]


def _value_of(keys: Sequence[str], text: str) -> Any:
    """The text as TOML. Where the setting is a text, only quotes are TOML: `name=2024` is no number."""
    value = _toml_value(text)
    dotted = _dotted(key for key in keys if not key.isdecimal())
    is_text = any(field.annotation is str for name, field in settings() if name == dotted)
    return text if is_text and not isinstance(value, str) else value


def _toml_value(text: str) -> Any:
    try:
        return tomlkit.value(text).unwrap()
    except (tomlkit.exceptions.TOMLKitError, ValueError):
        return text


def _forget_what_was_switched_off(values: dict[str, Any], given: Collection[str]) -> None:
    """`--set adapter.unet=false` means its rate as well, `--set sample.every=0` the prompts: a file spells out both."""
    for switch, dependents in NEEDS.items():
        table, key = _table_at(values, switch)
        if switch not in given or table.get(key):
            continue
        for dependent in dependents:
            table, key = _table_at(values, dependent)
            if dependent not in given:
                table.pop(key, None)


def _table_at(values: dict[str, Any], dotted: str) -> tuple[dict[str, Any], str]:
    """The table that holds `section.key`, and the key; an empty one if there is none."""
    section, _, key = dotted.partition(".")
    table = values.get(section)
    return (table if isinstance(table, dict) else {}), key


# ---------------------------------------------------------------------------------------------------------------------
# problems


def _hidden_errors(values: Mapping[str, Any], error: ValidationError) -> list[Any]:
    """Settings without effect, which pydantic looks for only when each single value is right.

    So it looks again, at the tables that are compared, without the values that are wrong.
    """
    wrong = {detail["loc"][:2] for detail in error.errors()}
    if () in wrong:  # then it has looked
        return []
    wrong |= {("optimizer", rate) for part, rate in RATES.items() if ("adapter", part) in wrong}
    if ("adapter", "kind") in wrong:
        wrong |= {("adapter", key) for key in (*OF_LORA, *OF_FULL)}
    sound: dict[str, Any] = {"name": "x", "data": [{"path": "x"}]}
    for name in ("adapter", "optimizer", "sample"):
        if isinstance(table := values.get(name, {}), Mapping):
            sound[name] = {key: value for key, value in table.items() if (name, key) not in wrong}
    try:
        RunConfig.model_validate(sound)
    except ValidationError as hidden:
        return hidden.errors()
    return []


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
        by_name = {dotted.rpartition(".")[2]: dotted for dotted in candidates}
        if close := difflib.get_close_matches(wanted, by_name, n=1, cutoff=likeness):
            return f"Did you mean {by_name[close[0]]}?"
    return f"Known here: {', '.join(siblings)}."


def _help_of(path: Sequence[Any]) -> str:
    return next((field.description or "" for dotted, field in settings() if dotted == _setting_at(path)), "")


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
        table.add(name, getattr(section, name))
    table.add(tomlkit.nl())
    return table
