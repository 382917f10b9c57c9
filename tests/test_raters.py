"""The simulated raters see what they are named for, and what the style leaves them is as docs/refine.md has it."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

pytestmark = pytest.mark.skipif(not (Path(__file__).parent.parent / "tools").is_dir(), reason="the tools are not here")


@pytest.mark.parametrize(
    ("left", "right", "seen"),
    [
        ("white", "white", {"darkness": 0, "ink": 0, "contrast": 0, "lightness": 1, "warmth": 0}),
        ("black", "white", {"darkness": 0.5, "ink": 0.5, "contrast": 0.5, "lightness": 0.5, "warmth": 0}),
        ("red", "red", {"darkness": 2 / 3, "ink": 1, "contrast": 0, "lightness": 1 / 3, "warmth": 1}),
        ("blue", "white", {"darkness": 1 / 3, "ink": 0.5, "lightness": 2 / 3, "warmth": -0.5}),
    ],
)
def test_each_rater_sees_what_it_is_named_for(left: str, right: str, seen: dict[str, float]):
    from tools.raters import RATERS

    picture = Image.new("RGB", (8, 8), left)
    picture.paste(right, (4, 0, 8, 8))
    assert {name: RATERS[name](picture) for name in seen} == pytest.approx(seen)


def test_the_table_in_the_docs_is_what_the_tool_tells():
    import typer

    from tools.raters import main

    app = typer.Typer()
    app.command()(main)
    told = CliRunner().invoke(app).output.strip()
    assert "| warmth |" in told
    assert told in (Path(__file__).parent.parent / "docs/refine.md").read_text(encoding="utf-8")
