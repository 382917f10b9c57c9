"""The Compare page: what is drawn on the wall is what was asked for, stays there, and can be chosen."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import gradio as gr
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from lorasmith.trainer.choosing.choice import (
    Choice,
    JudgedCell,
    JudgedPicture,
    Recommended,
    Scores,
    choice_file,
    most_of_captions,
    read_choice,
    write_choice,
)
from lorasmith.trainer.errors import UserError
from lorasmith.trainer.jobs import RunFolder
from lorasmith.trainer.painting.easel import Drawn
from lorasmith.trainer.painting.orders import WallOrder
from lorasmith.trainer.story import Story
from lorasmith.ui.compare.choices import Choices, order_file, read_strengths, seconds_each
from lorasmith.ui.compare.drawing import changed, progress
from lorasmith.ui.compare.page import Seen, WallPage, pick_of, sides_of
from lorasmith.ui.compare.playground import Playground
from lorasmith.ui.compare.playground import Seen as PlaygroundSeen
from lorasmith.ui.compare.scoring import choice_of, further_files, notes_on, summary_of, verdict_of
from lorasmith.ui.compare.wall import Marks, spots_of, wall
from lorasmith.ui.context import Context, config_of

from .browser import SECONDS, Site, end_painter, open_tab, watched_page


@pytest.fixture
def run(seen_run: Path, tmp_path: Path) -> RunFolder:
    """A trained run with checkpoints at steps 2 and 4."""
    shutil.copytree(seen_run, tmp_path / "runs" / "seen")
    return RunFolder(tmp_path / "runs" / "seen")


def usual(run: RunFolder) -> Choices:
    return Choices.usual(run, config_of(run))


def order_of(run: RunFolder, **over: object) -> WallOrder:
    return replace(usual(run), **over).order(run, config_of(run))


# ---------------------------------------------------------------------------------------------------------------------
# what is asked for


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("0, 0.4,1", (0.0, 0.4, 1.0)), (" 1;0 ", (1.0, 0.0)), ("0 0 -0.5", (0.0, -0.5)), ("1e-1", (0.1,))],
)
def test_strengths_are_read_as_they_are_written(text: str, numbers: tuple[float, ...]):
    assert read_strengths(text) == numbers


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "too few"),
        ("0, x", "no number"),
        ("nan", "nan is no strength"),
        ("1, 5", "5 is no strength"),
        ("1 2 3 .1 .2 .3 .4 .5 .6", "9 strengths are too many"),
    ],
)
def test_what_is_no_strength_is_told_with_its_place(text: str, problem: str):
    with pytest.raises(UserError, match=problem) as caught:
        read_strengths(text)
    assert caught.value.problems[0].where == "Strengths"


def test_a_wall_begins_as_the_previews_were_drawn(run: RunFolder):
    sample, choices = config_of(run).sample, usual(run)
    assert (choices.steps, choices.strengths) == ((2, 4), (0, 0.5, 0.8, 1, 1.1))
    assert (choices.prompt, choices.seed, choices.look.steps) == (sample.prompts[0], sample.seed, sample.steps)


def test_what_was_drawn_last_is_there_again_but_for_checkpoints_that_are_gone(run: RunFolder):
    assert Choices.remembered(run) is None
    asked = replace(usual(run), strengths=(0.0, 1.0), leak=True, second_seed=True, prompt="a 'prompt'", scored=False)
    asked.remember(run)
    assert Choices.remembered(run) == asked
    shutil.rmtree(run.checkpoint(2))
    assert Choices.remembered(run) == replace(asked, steps=(4,))
    shutil.rmtree(run.checkpoint(4))
    assert Choices.remembered(run) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"steps": 3}', "null"])
def test_a_file_that_makes_no_sense_is_as_none(run: RunFolder, text: str):
    usual(run).remember(run)
    order_file(run).write_text(text, encoding="utf-8")
    assert Choices.remembered(run) is None


def test_values_of_another_kind_make_no_sense_either(run: RunFolder):
    usual(run).remember(run)
    kept = json.loads(order_file(run).read_text(encoding="utf-8"))
    for wrong in ({"strengths": ["strong"]}, {"seed": None}, {"look": {"colour": 1}}, {"steps": None}):
        order_file(run).write_text(json.dumps(kept | wrong), encoding="utf-8")
        assert Choices.remembered(run) is None


def test_what_was_drawn_before_there_were_scores_is_read_and_wants_them(run: RunFolder):
    usual(run).remember(run)
    kept = json.loads(order_file(run).read_text(encoding="utf-8"))
    del kept["scored"]
    order_file(run).write_text(json.dumps(kept), encoding="utf-8")
    assert Choices.remembered(run) == usual(run)


def test_scores_are_made_from_the_sample_prompts_too_unless_they_are_not_wanted(run: RunFolder):
    assert order_of(run).scored_with == ("emoji of a cat",)
    assert order_of(run, prompt="a boat").scored_with == ("trg, emoji of a red circle", "emoji of a cat")
    assert order_of(run, scored=False).scored_with is None


def test_the_leak_view_takes_the_trigger_out_of_all_prompts(run: RunFolder):
    assert order_of(run).prompts == ("trg, emoji of a red circle",)
    leaky = order_of(run, leak=True, prompt="trg, a boat")
    assert leaky.prompts == ("a boat",)
    assert leaky.scored_with == ("emoji of a red circle", "emoji of a cat")


def test_a_second_seed_is_the_next(run: RunFolder):
    assert order_of(run, seed=7).seeds == (7,)
    assert order_of(run, seed=7, second_seed=True).seeds == (7, 8)


def test_without_a_checkpoint_there_is_no_wall(run: RunFolder):
    with pytest.raises(UserError, match="no checkpoint is ticked"):
        order_of(run, steps=())


# ---------------------------------------------------------------------------------------------------------------------
# what is shown


def test_the_wall_is_a_table_with_names_of_rows_and_columns(run: RunFolder):
    html = wall(order_of(run, strengths=(0.0, 1.0)), run, Marks("waiting"))
    assert re.findall(r'<th scope="col">([^<]*)', html) == ["Checkpoint", "Strength 0", "Strength 1"]
    assert re.findall(r'<th scope="row">([^<]*)', html) == ["step 2", "step 4"]
    assert "the base alone, as control" in html
    assert html.count("waiting</span>") == 4
    assert re.findall(r'aria-label="Pick ([^"]*)"', html) == ["step 2 at 1", "step 4 at 1"]


def test_the_chosen_cell_says_so_by_word(run: RunFolder):
    html = wall(order_of(run), run, Marks("waiting", (4, 0.8)))
    [cell] = re.findall(r'<td class="chosen">.*?</td>', html)
    assert "Pick step 4 at 0.8" in cell
    assert ">Chosen</button>" in cell


def test_a_prompt_is_shown_as_text(run: RunFolder):
    html = wall(order_of(run, prompt="<script>alert('1')</script>"), run, Marks("waiting"))
    assert "<script>" not in html
    assert "&lt;script&gt;alert(&#x27;1&#x27;)" in html


def scored(order: WallOrder, copying: float = 0.1) -> Choice:
    """Scores as they may be; those of the last step at strength 1 are the best."""
    cells = []
    for step in order.steps:
        for at in filter(None, order.strengths):
            scores = Scores(0.1 * step * at, 0.75, copying)
            own = Scores(0.33, 0.44, 0.55)
            pictures = (JudgedPicture(order.prompts[0], order.seeds[0], own, "<sun>.png"),)
            pictures += (JudgedPicture("emoji of a cat", order.seeds[0], scores, "star.png"),)
            cells.append(JudgedCell(step, at, scores, pictures))
    best = Recommended(order.steps[-1], 1.0)
    return Choice(tuple(cells), best, "Step 4 at strength 1 is <best>.", False, 6, 6, 9)


def test_scores_are_text_the_recommended_cell_says_so_and_a_copy_too(run: RunFolder):
    order = order_of(run, strengths=(0.0, 1.0))
    html = wall(order, run, Marks("waiting", (4, 1.0), scored(order)))
    base, first, _, last = re.findall("<td.*?</td>", html)
    assert "style" not in base
    assert "style 0.20<br>prompt 0.75<br>copying 0.10</span>" in first
    assert "Recommended" not in first
    assert last.startswith('<td class="chosen recommended" title="This picture: style 0.33, prompt 0.44, copying 0.55.')
    assert '<strong class="said">Recommended</strong>' in last
    assert "Nearest training image: &lt;sun&gt;.png." in last
    assert "Each number is the mean of 2 pictures" in html
    assert "Compared with the 6 training images and 9 pictures of the base alone." in html
    assert html.count("too much") == html.count("what leaks") == 0
    assert "what leaks" in wall(order, run, Marks("waiting", None, replace(scored(order), is_leak=True)))
    copies = wall(order, run, Marks("waiting", None, scored(order, copying=0.9)))
    assert copies.count('<span class="too-much">copying 0.90, too much</span>') == 2
    assert "style" not in wall(order, run, Marks("waiting"))


def test_the_verdict_is_text_and_tells_that_it_was_followed(run: RunFolder):
    choice = scored(order_of(run))
    assert verdict_of(choice, None) == "<p>Step 4 at strength 1 is &lt;best&gt;.</p>"
    assert verdict_of(choice, (4, 1.0)).endswith("It is chosen.</p>")


def test_scores_are_shown_and_saved_where_they_are_wanted_and_there(run: RunFolder):
    order = order_of(run)
    assert choice_of(order) is None
    write_choice(scored(order), choice_file(order.judged()))
    assert choice_of(order) == scored(order)
    notes = notes_on(order)
    assert notes
    assert notes.marked == (4, 1.0)
    assert notes.about.startswith("Step 4 at strength 1 is <best>. It goes by the means of 2 pictures a cell")
    assert choice_of(order_of(run, scored=False)) is notes_on(order_of(run, scored=False)) is None


def test_what_scores_take_is_told_before_they_are_drawn(run: RunFolder):
    order = order_of(run)
    files, further = list(order.files().values()), further_files(order)
    assert (len(files), len(further)) == (9, 9)
    most = most_of_captions(order.judged())
    assert summary_of(files, 10, further, most) == (
        "<p>9 pictures to draw; for the scores 9 pictures and up to 120 of training captions: at most about 23 min.</p>"
    )
    for file in (*files, *further):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    there = "All 9 pictures of this wall are there"
    assert summary_of(files, None, further, most) == f"<p>{there}; for the scores up to 120 of training captions.</p>"
    assert summary_of(files, None) == f"<p>{there}.</p>"
    alone = order_of(run, strengths=(1.0,))
    assert len(further_files(alone)) == 2 + 2  # the base is not on that wall, and is needed


def test_how_long_it_takes_is_taken_from_previews_then_from_the_last_wall(run: RunFolder):
    files = [order_of(run).file(cell) for cell in order_of(run).cells()]
    story, none = Story(run.events), Story(run.path / "none.jsonl")
    story.refresh()
    assert seconds_each(run, files, story) is not None
    assert seconds_each(run, files, none) is None

    usual(run).remember(run)
    began = order_file(run).stat().st_mtime
    for number, file in enumerate(files[:3]):
        file.touch()
        moment = began + 10 + 20 * number
        os.utime(file, (moment, moment))
    assert seconds_each(run, files, none) == pytest.approx(20)
    assert summary_of(files, 20) == "<p>6 pictures to draw, about 2 min. 3 pictures of this wall are there already.</p>"


def test_two_sides_are_the_base_and_the_last_until_others_are_picked(run: RunFolder):
    spots = spots_of(order_of(run), "trg, emoji of a red circle", 1234)
    left, right, titles = sides_of(spots, None, None)
    assert (left.title, right.title) == ("the base alone", "step 4 at 1")
    assert len(titles) == 1 + 2 * 4
    left, right, _ = sides_of(spots, "2:0.8", "9:9")
    assert (left.title, right.title) == ("step 2 at 0.8", "step 4 at 1")


def test_what_is_picked_stays_while_it_is_on_the_wall(run: RunFolder):
    order = order_of(run)
    assert pick_of(order, None, None, None) == (4, 1.0)
    assert pick_of(order, None, None, (2, 0.8)) == (2, 0.8)
    assert pick_of(order, 4, 0.5, (2, 0.8)) == (4, 0.5)
    assert pick_of(order, 6, 0.4, (2, 0.8)) == (2, 0.8)
    assert pick_of(order_of(run, strengths=(0.0,)), None, None, None) == (4, None)


def test_a_configuration_that_cannot_be_read_is_told_in_the_page(run: RunFolder):
    context = Context.of(run.path.parent)
    context.planner.close()
    with gr.Blocks():
        context.picked, context.tabs = gr.Dropdown(), gr.Tabs()
        page, play = WallPage(context), Playground(context)
        page.add_pair()
    asked = dict.fromkeys([*page.questions, *page.picks])
    whole = page.look("seen")
    run.config.write_text("adapter = 3", encoding="utf-8")
    assert page.look("seen") != whole
    shown = dict(zip([*page.questions, *page.views], page.follow(name="seen", seen=Seen(), **asked), strict=False))
    assert "adapter" in shown["nothing"]["value"]
    assert shown["body"]["visible"] is False
    assert play.follow(name="seen", seen=PlaygroundSeen(), step=None, prompt="")[0] == ""


def test_where_a_drawing_stands_is_told_in_words():
    html = progress(Drawn("drawing", 7, 25, seconds_left=130))
    assert "7 of 25 pictures drawn, about 2 min left." in html
    assert "25 percent are drawn." in html
    assert '<progress max="25" value="7"' in html
    failed = progress(Drawn("failed", message="a <b>file</b> is gone", fix="Put it back."))
    assert "a &lt;b&gt;file&lt;/b&gt; is gone" in failed
    assert "Put it back." in failed
    scoring = progress(Drawn("scoring", 25, 25, scored=0.4))
    assert "All 25 pictures are drawn. Scoring the wall. 40% are looked at." in scoring
    assert '<progress max="1" value="0.4"' in scoring
    unscored = progress(Drawn("done", 9, 9, unscored="the <images> are gone", unscored_fix="Put them back."))
    assert "Done, 9 pictures drawn." in unscored
    assert "There are no scores: the &lt;images&gt; are gone." in unscored
    assert "Put them back." in unscored


def test_only_what_has_changed_is_sent():
    sent, keys = changed(["a", "b", "c"], {"a": (1, "one"), "b": (2, "two")}, {"a": 1, "b": 1})
    assert sent[1] == "two"
    assert sent[0] == sent[2] != "two"
    assert keys == {"a": 1, "b": 2}


# ---------------------------------------------------------------------------------------------------------------------
# in the browser


def open_compare(page: Page, site: Site) -> None:
    page.goto(site.url)
    open_tab(page, "3 Compare")
    expect(page.get_by_text("Prompt: trg, emoji of a red circle. Seed 1234.")).to_be_visible()


def ask_for(page: Page, strengths: str) -> None:
    page.get_by_role("textbox", name="Strengths").fill(strengths)


def want_no_scores(page: Page) -> None:
    page.get_by_label("Score and recommend").uncheck()


def draw(page: Page) -> None:
    page.get_by_role("button", name="Draw", exact=True).click()
    done = page.get_by_role("status").filter(has_text="Done,")
    expect(done).to_be_attached(timeout=3 * SECONDS * 1000)


def loaded(page: Page, name: str) -> bool:
    """Whether a picture of the wall came from the server."""
    picture = page.get_by_role("img", name=name, exact=True).first
    picture.scroll_into_view_if_needed()
    expect(picture).to_be_visible()
    return picture.evaluate("async image => { await image.decode(); return image.naturalWidth > 0 }")


def test_a_wall_of_two_by_two_is_drawn_chosen_and_there_again(
    trained_site: Site, chromium: Browser, page: Page, tmp_path
):
    open_compare(page, trained_site)
    want_no_scores(page)
    ask_for(page, "0, 1")
    expect(page.get_by_role("columnheader", name="Strength 1 as trained")).to_be_visible()
    expect(page.get_by_text(re.compile("^3 pictures to draw, about"))).to_be_visible()
    draw(page)
    assert loaded(page, "step 2 at 1")
    assert loaded(page, "step 4 at 1")
    assert len(list((trained_site.runs / "seen/compare").glob("*.png"))) == 3

    page.get_by_role("button", name="Pick step 2 at 1").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_label("Checkpoint to use")).to_have_value("step 2")
    expect(page.get_by_role("button", name="Use this one")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_text("Chosen: step 2 at 1.")).to_be_visible()
    assert trained_site.run("seen").chosen == (2, 1.0)
    page.get_by_role("button", name="Go on to Share").click()
    expect(page.get_by_role("tab", name="4 Share")).to_have_attribute("aria-selected", "true")

    page.goto("about:blank")  # it would tell that the connection is lost
    trained_site.kill()
    end_painter(trained_site.runs)
    trained_site.start()
    for other in watched_page(chromium, tmp_path / "other"):
        open_compare(other, trained_site)
        expect(other.get_by_role("textbox", name="Strengths")).to_have_value("0, 1")
        assert loaded(other, "step 4 at 1")
        expect(other.get_by_text("All 3 pictures of this wall are there.")).to_be_visible()
        expect(other.get_by_role("button", name="Pick step 2 at 1")).to_have_text("Chosen")
        expect(other.get_by_label("Score and recommend")).not_to_be_checked()


def test_a_wall_is_scored_and_what_is_recommended_can_be_used(trained_site: Site, page: Page, tmp_path: Path):
    open_compare(page, trained_site)
    ask_for(page, "0, 1")
    cost = "3 pictures to draw; for the scores 3 pictures and up to 48 of training captions"
    expect(page.get_by_text(re.compile(cost))).to_be_visible()
    expect(page.get_by_role("button", name="Use the recommended one")).to_be_hidden()
    draw(page)
    run = trained_site.run("seen")
    choice = read_choice(order_of(run, strengths=(0.0, 1.0)).judged())
    assert choice
    expect(page.get_by_text(choice.reason)).to_be_visible()
    expect(page.get_by_text("Each number is the mean of 2 pictures")).to_be_visible()
    best = choice.recommended
    assert best
    [recommended] = page.get_by_role("cell").filter(has_text="Recommended").all()
    scores = choice.cell(best.step, best.strength).scores
    assert [
        line for line in recommended.inner_text().split("\n") if line.startswith(("style", "prompt", "copying"))
    ] == (scores.lines)
    assert recommended.get_by_role("button").get_attribute("aria-label") == f"Pick step {best.step} at 1"

    page.get_by_role("button", name="Use the recommended one").click()
    expect(page.get_by_text(f"Chosen: step {best.step} at 1.")).to_be_visible()
    expect(page.get_by_text("It is chosen.")).to_be_visible()
    expect(page.get_by_label("Checkpoint to use")).to_have_value(re.compile(f"^step {best.step}"))
    assert run.chosen == (best.step, best.strength)

    want_no_scores(page)
    expect(page.get_by_text(choice.reason)).to_be_hidden()
    expect(page.get_by_text("style 0.")).to_have_count(0)


def test_without_the_training_images_the_page_says_why_there_are_no_scores(trained_site: Site, page: Page):
    run = trained_site.run("seen")
    gone = trained_site.runs / "gone"
    config = run.config.read_text(encoding="utf-8").replace(config_of(run).data[0].path, str(gone))
    run.config.write_text(config, encoding="utf-8")
    open_compare(page, trained_site)
    page.get_by_role("checkbox", name="step 2", exact=True).uncheck()
    ask_for(page, "1")
    draw(page)
    assert loaded(page, "step 4 at 1")
    expect(page.get_by_text(re.compile(f"There are no scores: .*{gone.name}"))).to_be_visible()
    expect(page.get_by_text("Put them back, or draw the wall without scores")).to_be_visible()
    expect(page.get_by_role("button", name="Use the recommended one")).to_be_hidden()


def test_leaks_a_second_seed_a_pair_and_a_sheet(trained_site: Site, page: Page, tmp_path: Path):
    open_compare(page, trained_site)
    want_no_scores(page)
    ask_for(page, "0, 1.2")
    page.get_by_role("checkbox", name="step 2", exact=True).uncheck()
    page.get_by_label("Without the trigger").check()
    page.get_by_label("Second seed").check()
    expect(page.get_by_text("Prompt: emoji of a red circle. Seed 1235.")).to_be_visible()
    draw(page)
    assert loaded(page, "step 4 at 1.2")

    page.get_by_role("button", name="Save the wall as PNG").click()
    with page.expect_download() as download:
        page.get_by_role("link", name="Download the wall").click()
    download.value.save_as(tmp_path / "wall.png")
    with Image.open(tmp_path / "wall.png") as sheet:
        assert sheet.format == "PNG"
        assert sheet.height > 2 * 128  # two walls

    open_tab(page, "Side by side")
    expect(page.get_by_text("Left: the base alone. Right: step 4 at 1.2.")).to_be_visible()
    slider = page.get_by_role("slider", name=re.compile("the base alone"))
    slider.press("ArrowRight")
    expect(page.locator(".pair")).to_have_attribute("style", re.compile("--at: ?51%"))
    page.get_by_label("Left picture").click()
    page.get_by_role("option", name="step 4 at 1.2").click()
    expect(page.get_by_text("Left: step 4 at 1.2. Right: step 4 at 1.2.")).to_be_visible()
    expect(page.locator(".pair")).to_have_attribute("style", re.compile("--at: ?51%"))


def test_a_mistake_is_told_beside_the_button_and_a_long_drawing_can_be_left(trained_site: Site, page: Page):
    open_compare(page, trained_site)
    ask_for(page, "0, much")
    expect(page.get_by_role("alert").filter(has_text="holds what is no number").first).to_be_visible()
    page.get_by_role("button", name="Draw", exact=True).click()
    assert not (trained_site.runs / "seen/compare").exists()

    ask_for(page, "0, 1")
    page.get_by_role("button", name="How the pictures are drawn").click()
    page.get_by_role("spinbutton", name="Sampling steps").fill("500")
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(page.get_by_text("waiting", exact=True).first).to_be_visible()
    page.get_by_role("button", name="Cancel", exact=True).click()
    expect(page.get_by_role("status").filter(has_text="Cancelled,")).to_be_attached()
    expect(page.get_by_text("not drawn", exact=True).last).to_be_visible()
    expect(page.get_by_role("button", name="Draw", exact=True)).to_be_enabled()
    expect(page.get_by_role("button", name="Cancel", exact=True)).to_be_hidden()


def test_without_a_run_the_page_says_what_to_do(site: Site, page: Page):
    page.goto(site.url)
    open_tab(page, "3 Compare")
    expect(page.get_by_text("No run is picked. Pick one at the top of the page, or train one first.")).to_be_visible()
    expect(page.get_by_role("button", name="Use this one")).to_be_hidden()
