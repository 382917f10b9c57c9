"""The wall: which checkpoints and strengths it shows by default, and its picture, on which nothing is cut off."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont
from typer.testing import CliRunner

from lorasmith.trainer.cli import app
from lorasmith.trainer.errors import RunError, UserError
from lorasmith.trainer.jobs import RunFolder, create_run
from lorasmith.trainer.painting.lettering import drawable, font_for, wrapped
from lorasmith.trainer.painting.orders import Cell, Look, WallOrder
from lorasmith.trainer.painting.sheet import order_sheet, save_sheet
from lorasmith.trainer.painting.wall import STRENGTHS, default_steps, wall_order, without_trigger

from .command import lorasmith
from .conftest import trained_run


@pytest.fixture
def run(short_run) -> RunFolder:
    """A run with checkpoints that hold nothing."""
    run = create_run(short_run(sample={"every": 1, "prompts": ["a cat", "a dog"], "seed": 7, "steps": 3}))
    save(run, 2, 4)
    return run


def save(run: RunFolder, *steps: int) -> None:
    shutil.rmtree(run.checkpoints, ignore_errors=True)
    for step in steps:
        run.checkpoint(step).mkdir(parents=True)
        (run.checkpoint(step) / "state.json").write_text('{"base": "b"}', encoding="utf-8")
        (run.checkpoint(step) / "adapter.safetensors").touch()


@pytest.mark.parametrize(
    ("saved", "shown"),
    [
        ([], ()),
        ([7], (7,)),
        ([1, 2, 3, 4, 5], (1, 2, 3, 4, 5)),
        (list(range(100, 1001, 100)), (200, 400, 600, 800, 1000)),
        ([*range(10, 80, 10), 1000], (20, 30, 50, 60, 1000)),
        (list(range(1, 13)), (2, 5, 7, 10, 12)),
    ],
)
def test_by_default_a_wall_shows_five_checkpoints_over_the_run(run: RunFolder, saved: list[int], shown: tuple):
    save(run, *saved)
    assert default_steps(run) == shown


def test_a_wall_is_drawn_as_the_previews_are(run: RunFolder):
    order = wall_order(run)
    assert order == WallOrder(str(run.path), (2, 4), STRENGTHS, ("a cat",), (7,), Look(steps=3))
    assert STRENGTHS == (0, 0.5, 0.8, 1.0, 1.1)
    given = wall_order(run, [4, 4], [1, 0.5], ["a", "b", "a"], [1, 2])
    assert (given.steps, given.strengths, given.prompts, given.seeds) == ((4,), (1.0, 0.5), ("a", "b"), (1, 2))


def test_a_wall_needs_a_checkpoint_and_a_prompt(run: RunFolder, short_run):
    save(run)
    with pytest.raises(RunError, match="has no checkpoint yet"):
        wall_order(run)
    without = create_run(short_run(name="without previews"))
    save(without, 2)
    with pytest.raises(UserError, match="has no previews whose prompt could be taken"):
        wall_order(without)


@pytest.mark.parametrize(
    ("prompt", "left"),
    [
        ("trg, a cat", "a cat"),
        ("a cat, TRG", "a cat"),
        ("a cat, trg, red", "a cat, red"),
        ("a trg cat , red", "a cat, red"),
        ("trg", ""),
        ("trgx, a trg-like cat", "trgx, a -like cat"),
        ("a  cat,without it", "a  cat,without it"),
        ("trg,trg, trg style of a  cat", "style of a cat"),
    ],
)
def test_the_trigger_is_taken_out_as_a_whole_word(prompt: str, left: str):
    assert without_trigger(prompt, " trg ") == left
    assert without_trigger(prompt, "") == prompt


def test_a_trigger_is_no_pattern():
    assert without_trigger("a (x), cat", "(x)") == "a, cat"
    assert without_trigger("axb", "a.b") == "axb"


# ---------------------------------------------------------------------------------------------------------------------
# its picture


LONG = "a very long prompt of many words, " * 12 + "x" * 400


def colour(order: WallOrder, cell: Cell, shade: tuple[int, int, int]) -> None:
    order.file(cell).parent.mkdir(exist_ok=True)
    Image.new("RGB", (64, 64), shade).save(order.file(cell))


def colours(picture: Image.Image) -> set[tuple[int, ...]]:
    return set(map(tuple, np.asarray(picture.convert("RGB")).reshape(-1, 3).tolist()))


def test_each_picture_stands_in_its_row_and_column(run: RunFolder):
    order = WallOrder(str(run.path), (2, 4), (0.0, 1.0), ("a",), (1,))
    shades = {Cell(0, 0.0, "a", 1): (255, 0, 0), Cell(2, 1.0, "a", 1): (0, 255, 0)}
    for cell, shade in shades.items():
        colour(order, cell, shade)
    sheet = np.asarray(order_sheet(order, "short")).astype(int)
    red, green = (np.argwhere((sheet == shade).all(-1)) for shade in shades.values())
    grey = np.argwhere((sheet == (227, 227, 230)).all(-1))
    assert len(red) == 2 * 128 * 128  # the base stands in both rows
    assert len(green) == 128 * 128
    assert len(grey) >= 128 * 128  # what is not drawn yet
    assert red[:, 1].max() < green[:, 1].min()
    assert green[:, 0].max() < red[:, 0].max()


def test_walls_of_several_prompts_and_seeds_stand_below_each_other(run: RunFolder):
    order = WallOrder(str(run.path), (2, 4), (0.0, 1.0), ("a", "b"), (1, 2))
    one, all_of_them = order_sheet(replace(order, prompts=("a",), seeds=(1,)), "short"), order_sheet(order, "short")
    assert all_of_them.width == one.width
    assert 3.5 * one.height < all_of_them.height < 4 * one.height


def test_the_picture_grows_with_its_text(run: RunFolder):
    short = WallOrder(str(run.path), (2,), (1.0,), ("a",), (1,))
    long = WallOrder(str(run.path), (2,), (1.0,), (LONG,), (1,))
    assert order_sheet(long, "t").height > order_sheet(short, "t").height + 100
    assert order_sheet(short, "t" * 500).height > order_sheet(short, "t").height + 100


def test_text_is_wrapped_and_nothing_of_it_is_lost():
    font = font_for(LONG, 16)
    lines = wrapped(LONG, font, 300)
    assert "".join(lines).replace(" ", "") == LONG.replace(" ", "")
    assert max(map(font.getlength, lines)) <= 300
    assert wrapped("", font, 300) == [""]
    assert wrapped("abc", font, 1) == ["a", "b", "c"]


def test_a_letter_that_no_font_has_is_shown_by_its_code():
    plain = ImageFont.load_default(16)  # has no accents
    assert drawable("Łódź 中", plain) == "\\u0141\\xf3d\\u017a \\u4e2d"
    assert drawable("a \\ b", plain) == "a \\ b"
    text = "é" + "\U0010fffe"
    assert drawable(text, font_for(text, 16)).endswith("\\U0010fffe")


def test_a_sheet_is_written_as_a_png(run: RunFolder, tmp_path: Path):
    order = WallOrder(str(run.path), (2,), (1.0,), ("é",), (1,))
    save_sheet(order_sheet(order, "t"), tmp_path / "new" / "wall.png")
    with Image.open(tmp_path / "new" / "wall.png") as sheet:
        assert sheet.format == "PNG"
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["wall.png"]


# ---------------------------------------------------------------------------------------------------------------------
# the command


def test_compare_draws_a_wall_and_tells_its_cells(short_run, tmp_path: Path):
    settings = {"save": {"every": 2}, "sample": {"every": 9, "prompts": ["emoji of owl"], "steps": 1}}
    run = trained_run(short_run(**settings)).run
    cells = ["--steps", "2,4", "--strengths", "0,1", "--seed", 3, "--no-scores"]
    first = lorasmith(tmp_path, "compare", run.path, *cells)
    wall = Path(first.stdout.strip())
    assert wall.parent == run.path / "compare"
    assert "drawing 3/3" in first.stderr
    drawn = {file: file.stat().st_mtime_ns for file in wall.parent.iterdir() if file != wall}
    assert len(drawn) == 3

    again = lorasmith(tmp_path, "compare", run.path, *cells, "--out", "own.png", "--json")
    told = json.loads(again.stdout)
    assert again.stderr == ""
    assert told["wall"] == "own.png"
    assert [(cell["step"], cell["strength"], cell["prompt"], cell["seed"]) for cell in told["cells"]] == [
        (0, 0.0, "emoji of owl", 3),
        (2, 1.0, "emoji of owl", 3),
        (4, 1.0, "emoji of owl", 3),
    ]
    assert {Path(cell["file"]): Path(cell["file"]).stat().st_mtime_ns for cell in told["cells"]} == drawn
    assert (tmp_path / "own.png").read_bytes() == wall.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--out", "wall.jpg"], "does not end in .png"),
        (["--out", "taken.png"], "exists already"),
        (["--steps", "3"], "has no checkpoint of step 3"),
        (["--steps", "x"], "'x' is no list of numbers"),
        (["--strengths", "nan"], "strengths.0: should be a finite number"),
        (["--strengths", "50"], "strengths.0: should be less than or equal to 10"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_loaded(
    run: RunFolder, tmp_path: Path, arguments: list[str], told: str
):
    (tmp_path / "taken.png").touch()
    done = lorasmith(tmp_path, "compare", run.path, *arguments, code=2)
    assert told in done.stderr
    assert not (run.path / "compare").exists()


def test_the_command_that_draws_for_the_app_is_not_listed():
    listed = CliRunner().invoke(app, ["--help"]).stdout
    assert "compare" in listed
    assert "paint" not in listed
