"""`python -m tools.settings_tables`: write the tables of settings in the documents from the fields of `RunConfig`.

A table stands between `<!-- settings: SECTION -->` and `<!-- end -->`; `tests/test_docs.py` fails where one is stale.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

from lorasmith.trainer.config import RunConfig, Section, table_of
from lorasmith.trainer.files import write_text

DOCUMENTS = sorted(Path("docs").glob("*.md"))
_TABLE = re.compile(r"(<!-- settings: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(text: str) -> str:
    """A document with its tables as they should be."""
    return _TABLE.sub(lambda found: f"{found[1]}{table(found[2])}{found[3]}", text)


def table(section: str) -> str:
    """The settings of one section as a Markdown table: name, type, default, docstring."""
    kind = table_of(RunConfig.model_fields[section].annotation)
    assert kind is not None, f"{section} is no section"
    rows = [
        f"| `{name}` | {_type(field)} | {_default(kind, name)} | {_help(field)} |\n" for name, field in _fields(kind)
    ]
    return "".join(["| setting | is | default | what it does |\n| --- | --- | --- | --- |\n", *rows])


def _fields(kind: type[Section]) -> list[tuple[str, Any]]:
    return list(kind.model_fields.items())


def _type(field: Any) -> str:
    words = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    if field.annotation in words:
        return words[field.annotation]
    choices = [f'"{value}"' for value in get_args(field.annotation) if isinstance(value, str)]
    return " or ".join(choices) if choices else "a whole number, or a list of them"


def _default(kind: type[Section], name: str) -> str:
    field = kind.model_fields[name]
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    shown = {True: "true", False: "false"}.get(value) if isinstance(value, bool) else None
    return f"`{shown or (repr(value).replace(chr(39), chr(34)) if isinstance(value, str) else f'{value:g}')}`"


def _help(field: Any) -> str:
    return " ".join((field.description or "").split()).replace("|", "\\|")


def main() -> None:
    for document in DOCUMENTS:
        write_text(document, with_tables(document.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
