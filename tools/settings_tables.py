"""`python -m tools.settings_tables`: write the tables of settings in the documents from the fields of `RunConfig`.

A table stands between `<!-- settings: SECTION -->` and `<!-- end -->`; `tests/test_docs.py` fails where one is stale.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from lorasmith.trainer.config import RunConfig, table_of
from lorasmith.trainer.files import write_text

DOCUMENTS = sorted(Path("docs").glob("*.md"))
_TABLE = re.compile(r"(<!-- settings: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(text: str) -> str:
    """A document with its tables as they should be."""
    return _TABLE.sub(lambda found: f"{found[1]}{table(found[2])}{found[3]}", text)


def table(section: str) -> str:
    """The settings of one section as a Markdown table: name, type, default, docstring; `run` is what stands above all
    sections."""
    kind = RunConfig if section == "run" else table_of(RunConfig.model_fields[section].annotation)
    assert kind is not None, f"{section} is no section"
    rows = [
        f"| `{name}` | {type_of(field.annotation)} | {_default(field)} | {_help(field)} |\n"
        for name, field in kind.model_fields.items()
        if table_of(field.annotation) is None
    ]
    return "".join(["| setting | is | default | what it does |\n| --- | --- | --- | --- |\n", *rows])


def type_of(annotation: Any) -> str:
    """What a value is, in words: `text`, `"a" or "b"`, `list of texts`."""
    words = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    origin, parts = get_origin(annotation), get_args(annotation)
    if annotation in words:
        return words[annotation]
    if origin is list:
        return f"list of {type_of(parts[0])}" + ("" if get_origin(parts[0]) is Literal else "s")
    if origin is dict:
        return "table of names and values"
    if origin is Literal:
        return " or ".join(f'"{choice}"' for choice in parts)
    return " or ".join(type_of(part) for part in parts)


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return f"`{value:g}`" if isinstance(value, float) else f"`{json.dumps(value, ensure_ascii=False)}`"


def _help(field: Any) -> str:
    return " ".join((field.description or "").split()).replace("|", "\\|")


def main() -> None:
    for document in DOCUMENTS:
        write_text(document, with_tables(document.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
