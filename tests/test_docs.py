"""The documents tell the truth: tables are those of the code, links lead somewhere, commands and options exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="the source tree is not here")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_of_settings_are_those_of_the_code(page: Path):
    from tools.settings_tables import with_tables

    text = page.read_text(encoding="utf-8")
    assert with_tables(text) == text, "make them anew with: python -m tools.settings_tables"


def test_every_setting_is_in_one_table_on_one_page():
    from lorasmith.trainer.config import RunConfig, table_of

    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    sections = [name for name, field in RunConfig.model_fields.items() if table_of(field.annotation)]
    assert sorted(re.findall(r"<!-- settings: (\w+) -->", text)) == sorted(["run", *sections])


@pytest.mark.parametrize(
    ("section", "row"),
    [
        ("run", '| `recipe` | text | `""` | The shipped recipe'),
        ("data", "| `resolution` | whole number or list of whole numbers | `0` | "),
        ("adapter", "| `train_only` | list of texts | `[]` | "),
        ("adapter", "| `text_encoder` | true or false | `true` | "),
        ("block", "| `path` | text | required | "),
        ("optimizer", "| `options` | table of names and values | `{}` | "),
        ("optimizer", "| `lr` | number | `0.0001` | "),
        ("save", '| `keep` | "all" or whole number | `"all"` | '),
    ],
)
def test_a_setting_of_each_type_is_told_in_words(section: str, row: str):
    from tools.settings_tables import table

    assert row in table(section)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_to_files(page: Path):
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_page_about_data_names_every_kind_of_finding():
    source = (ROOT / "datasets" / "checks.py").read_text(encoding="utf-8")
    kinds = set(re.findall(r'Finding\(\s*"([^"]+)"', source)) | {"rotated", "transparent", "converted"}
    rows = [
        line for line in (ROOT / "docs" / "data.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")
    ]
    named = {name for row in rows for name in row.split("|")[1].strip().split(", ")}
    assert kinds - named == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_their_options_exist(page: Path):
    import typer.main

    from lorasmith.trainer.cli import app

    commands = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    for line in re.findall(r"^(?:\S*[/\\])?lorasmith (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        name, *words = line.partition("#")[0].split()
        assert name in commands, line
        known = {option for parameter in commands[name].params for option in parameter.opts + parameter.secondary_opts}
        assert {word for word in words if word.startswith("--")} <= known, line
