"""The playground: any prompt, with a checkpoint or a base alone; every picture keeps its settings."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from lorasmith.trainer.errors import UserError
from lorasmith.trainer.jobs import RunFolder
from lorasmith.trainer.painting.orders import Look, PictureOrder, drawn_folder, settings_of, write_order
from lorasmith.ui.compare.playground import (
    add_file,
    exported_files,
    file_and_strength,
    how_drawn,
    shots,
    step_to_draw_with,
)

from .browser import Site, open_tab
from .conftest import draw_picture


def keep(runs: Path, name: str, order: PictureOrder) -> Path:
    """A picture with its settings, as the painter leaves them."""
    folder = drawn_folder(runs)
    folder.mkdir(parents=True, exist_ok=True)
    draw_picture(1, (64, 64)).save(folder / f"{name}.png")
    (folder / f"{name}.json").write_text(write_order(order), encoding="utf-8")
    return folder / f"{name}.png"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("detail.safetensors:0.6", ("detail.safetensors", 0.6)),
        ("/a b/detail.safetensors", ("/a b/detail.safetensors", 1.0)),
        ("C:\\loras\\detail.safetensors", ("C:\\loras\\detail.safetensors", 1.0)),
        ("C:\\loras\\detail.safetensors:-1", ("C:\\loras\\detail.safetensors", -1.0)),
        ("C:/loras/detail.safetensors", ("C:/loras/detail.safetensors", 1.0)),
    ],
)
def test_a_line_is_a_file_and_its_strength(line: str, told: tuple[str, float]):
    assert file_and_strength(line) == told


@pytest.mark.parametrize("line", ["detail.safetensors:much", "detail.safetensors:nan", ":0.5", "detail.safetensors:"])
def test_a_line_that_makes_no_sense_is_told(line: str):
    with pytest.raises(UserError, match="is no strength"):
        file_and_strength(line)


def test_a_picked_file_becomes_another_line():
    assert add_file("a.safetensors:0.5\n\n", "/b.safetensors") == ["a.safetensors:0.5\n/b.safetensors:1", None]
    assert add_file("a.safetensors:0.5", None) == ["a.safetensors:0.5", None]


def test_exported_files_of_all_runs_are_offered_but_for_unverified_ones(tmp_path: Path):
    for run, names in {"one": ["one.safetensors", "one.unverified.safetensors"], "two": ["two.safetensors"]}.items():
        (tmp_path / run / "exports").mkdir(parents=True)
        (tmp_path / run / "config.toml").touch()
        for name in [*names, "card.md"]:
            (tmp_path / run / "exports" / name).touch()
    offered = dict(exported_files(tmp_path))
    assert sorted(offered) == ["one: one.safetensors", "two: two.safetensors"]
    assert offered["two: two.safetensors"] == str(tmp_path / "two/exports/two.safetensors")


def test_the_chosen_checkpoint_is_drawn_with_first(seen_run: Path, tmp_path: Path):
    shutil.copytree(seen_run, tmp_path / "seen")
    run = RunFolder(tmp_path / "seen")
    assert step_to_draw_with(run, (2, 4)) == 4
    run.choose(2, 0.7)
    assert step_to_draw_with(run, (2, 4)) == 2
    assert step_to_draw_with(run, (4,)) == 4
    assert step_to_draw_with(None, ()) is None


def test_pictures_come_newest_first_with_their_settings_as_text(tmp_path: Path):
    look = Look("<i>fog</i>", 20, 5.5, "euler", 64)
    order = PictureOrder(("<b>a cat</b>",), (7,), base="pocket", loras=(("/x/detail.safetensors", 0.5),), look=look)
    old, new = keep(tmp_path, "old", order), keep(tmp_path, "new", PictureOrder(("a dog",), (8,), base="pocket"))
    assert how_drawn(order) == (
        "pocket, with detail.safetensors at 0.5, seed 7, 20 steps of Euler, guidance 5.5, 64 pixels, not: <i>fog</i>."
    )
    html = shots(tmp_path, [new, tmp_path / "yet to come.png"])
    assert re.findall(r'data-file="([^"]*)"', html) == ["new.png", "old.png"]
    assert html.count("waiting</span>") == 1
    assert "&lt;b&gt;a cat&lt;/b&gt;" in html
    assert "<i>" not in html
    old.with_suffix(".json").write_text("{}", encoding="utf-8")
    assert shots(tmp_path / "nowhere", []) == "<p>Nothing was drawn yet.</p>"


def test_a_picture_without_settings_is_shown_and_says_so(tmp_path: Path):
    file = keep(tmp_path, "torn", PictureOrder(("a cat",), (7,), base="pocket"))
    file.with_suffix(".json").write_text("{", encoding="utf-8")
    html = shots(tmp_path, [])
    assert "Its settings cannot be read." in html
    assert "data-file" not in html


def test_only_so_many_pictures_are_shown(tmp_path: Path):
    for number in range(30):
        keep(tmp_path, f"n{number}", PictureOrder(("a cat",), (number,), base="pocket"))
    assert shots(tmp_path, []).count("<li>") == 24


# ---------------------------------------------------------------------------------------------------------------------
# in the browser


def open_playground(page: Page, site: Site) -> None:
    page.goto(site.url)
    open_tab(page, "3 Compare")
    open_tab(page, "Playground")
    expect(page.get_by_label("What to draw")).to_be_visible()


def few_steps(page: Page) -> None:
    page.get_by_role("button", name="Sampler, steps, guidance, size").click()
    page.get_by_role("spinbutton", name="Steps of sampling").fill("2")


def test_pictures_are_drawn_kept_and_loaded_again(trained_site: Site, page: Page):
    open_playground(page, trained_site)
    prompt = page.get_by_label("What to draw")
    expect(prompt).to_have_value("trg, emoji of a red circle")
    expect(page.get_by_label("Checkpoint to draw with")).to_have_value("step 4")
    few_steps(page)
    page.get_by_role("button", name="Further LoRA files").click()
    page.get_by_label("Add an exported file").click()
    page.get_by_role("option", name="seen: seen.safetensors").click()
    files = page.get_by_role("textbox", name="Files")
    expect(files).to_have_value(re.compile(r"seen\.safetensors:1$"))
    page.get_by_role("spinbutton", name="number input for Number of pictures").fill("2")
    page.get_by_role("spinbutton", name="First seed").fill("77")
    page.get_by_role("button", name="Draw pictures").click()
    first = page.get_by_role("button", name="Load the settings of trg, emoji of a red circle, seed 77")
    expect(first).to_be_visible()
    expect(page.get_by_role("button", name=re.compile("red circle, seed 78"))).to_be_visible()

    page.get_by_label("A base model alone").check()
    expect(page.get_by_label("Checkpoint to draw with")).to_be_hidden()
    expect(page.get_by_role("textbox", name="Base model to draw with")).to_have_value("pocket")
    prompt.fill("emoji of a dog")
    files.fill("")
    page.get_by_label("New seed each time").check()
    page.get_by_role("button", name="Draw pictures").click()
    expect(page.get_by_role("button", name=re.compile("Load the settings of emoji of a dog"))).to_have_count(2)

    first.press("Enter")
    expect(prompt).to_have_value("trg, emoji of a red circle")
    expect(page.get_by_role("spinbutton", name="First seed")).to_have_value("77")
    expect(page.get_by_label("New seed each time")).not_to_be_checked()
    expect(page.get_by_label("Checkpoint to draw with")).to_be_visible()
    expect(files).to_have_value(re.compile(r"seen\.safetensors:1$"))

    settings = [settings_of(file) for file in drawn_folder(trained_site.runs).glob("*.png")]
    by_base = [order for order in settings if order and order.base == "pocket"]
    assert len(settings) == 4
    assert [(order.run, order.loras, order.look.steps) for order in by_base] == [("", (), 2)] * 2
    page.reload()
    open_tab(page, "3 Compare")
    open_tab(page, "Playground")
    expect(first).to_be_visible()


def test_what_cannot_be_drawn_is_told_with_its_fix(trained_site: Site, page: Page):
    open_playground(page, trained_site)
    page.get_by_role("button", name="Further LoRA files").click()
    page.get_by_role("textbox", name="Files").fill("/no/such/file.safetensors:0.5")
    page.get_by_role("button", name="Draw pictures").click()
    expect(page.get_by_text(re.compile("/no/such/file.safetensors: cannot be read"))).to_be_visible()
    page.get_by_role("textbox", name="Files").fill("")
    few_steps(page)
    page.get_by_role("spinbutton", name="Size in pixels").fill("100")
    page.get_by_role("button", name="Draw pictures").click()
    problem = page.get_by_role("alert").filter(has_text="100 pixels do not divide by")
    expect(problem).to_be_visible()
    expect(problem).to_contain_text("Take")
    expect(page.get_by_role("button", name="Draw pictures")).to_be_enabled()


def test_without_a_run_a_base_is_drawn_with(site: Site, page: Page):
    open_playground(page, site)
    expect(page.get_by_role("textbox", name="Base model to draw with")).to_be_visible()
    expect(page.get_by_label("A base model alone")).to_be_checked()
