"""The tab Rate: what is asked is worth asking, what is said is kept, and a run learns from it."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import gradio as gr
import pytest
from playwright.sync_api import Page, expect

from lorasmith.trainer.jobs import RunFolder
from lorasmith.trainer.preferences.ratings import Neither, Pair, Ratings, Thumb
from lorasmith.ui.compare.rating import Candidate, RatePage, Seen, candidates, counted, next_pair, two
from lorasmith.ui.context import Context

from .browser import Site, open_tab, wait_until
from .conftest import draw_picture


@pytest.fixture
def run(seen_run: Path, tmp_path: Path) -> RunFolder:
    """A trained run with previews of two prompts at steps 2 and 4, and of the base."""
    shutil.copytree(seen_run, tmp_path / "runs" / "seen")
    return RunFolder(tmp_path / "runs" / "seen")


def rate_page(run: RunFolder) -> RatePage:
    context = Context.of(run.path.parent)
    context.planner.close()
    with gr.Blocks():
        return RatePage(context)


def test_what_can_be_rated_are_pictures_of_what_was_trained(run: RunFolder):
    (run.path / "compare").mkdir()
    shutil.copy(run.samples(4) / "00.png", run.path / "compare/0123456789abcdef.png")
    draw_picture(1, (64, 64)).save(run.path / "compare/fedcba9876543210.png")  # tells nothing of itself
    (run.path / "compare/0000000000000000.png").write_text("torn")
    shutil.copy(run.samples(4) / "00.png", run.path / "compare/wall-0123456789abcdef.png")
    found = [(one.file.relative_to(run.path).as_posix(), one.prompt, one.seed, one.step) for one in candidates(run)]
    owl, cat = "trg, emoji of a red circle", "emoji of a cat"
    assert found == [
        ("samples/step-000002/00.png", owl, 1234, 2),
        ("samples/step-000002/01.png", cat, 1235, 2),
        ("samples/step-000004/00.png", owl, 1234, 4),
        ("samples/step-000004/01.png", cat, 1235, 4),
        ("compare/0123456789abcdef.png", owl, 1234, 4),
    ]


def test_pairs_are_of_one_prompt_and_size_the_least_rated_first_and_each_once(run: RunFolder):
    ratings = Ratings.of(run)
    one = Candidate(run.path / "samples/a.png", "owl", 1, 100, "64x64")
    found = [
        replace(one, file=run.path / f"samples/{name}.png", prompt=prompt, step=step, size=size)
        for name, prompt, step, size in (
            *(("a", "owl", 400, "64x64"), ("b", "owl", 400, "64x64"), ("c", "owl", 100, "64x64")),
            *(("d", "cat", 300, "64x64"), ("e", "cat", 300, "64x64"), ("f", "owl", 400, "32x32")),
        )
    ]
    asked: list[str] = []
    for _ in range(4):
        pair = next_pair(found, ratings.standing(), ratings)
        assert pair
        names = [ratings.name_of(each.file) for each in pair]
        asked.append("".join(sorted(Path(name).stem for name in names)))
        ratings.add(Neither(neither=names))
    assert asked[:2] == ["ab", "de"]  # of the latest checkpoints; then those of which both were not rated yet
    assert sorted(asked) == ["ab", "ac", "bc", "de"]
    assert next_pair(found, ratings.standing(), ratings) is None
    ratings.undo()
    assert next_pair(found, ratings.standing(), ratings) is not None


def test_the_page_counts_and_says_what_is_enough():
    pairs = [Pair(better=f"{number}.png", worse=f"{number + 1}.png") for number in range(20)]
    assert "1 pair and 1 thumb so far. Below 20 pairs" in counted([pairs[0], Thumb(picture="a.png", up=True)])
    assert (
        counted([*pairs, Neither(neither=["a.png", "b.png"])]) == '<p role="status">20 pairs and 0 thumbs so far.</p>'
    )


def test_a_prompt_is_shown_as_text_and_not_what_a_picture_was_drawn_with(run: RunFolder):
    left, right = (replace(one, prompt="<b>owl</b>") for one in candidates(run)[:2])
    html = two(run, left, right)
    assert "&lt;b&gt;owl" in html
    assert "<b>" not in html
    assert "step 2" not in html


def test_only_the_two_pictures_that_were_shown_can_be_rated(run: RunFolder):
    page = rate_page(run)
    *_, shown, seen = page.follow("seen", Seen())
    assert len(shown) == 2
    assert seen.run == "seen"
    page.rate(lambda left, right: Pair(better=right, worse=left), "seen", shown)
    page.rate(lambda left, right: Thumb(picture=left, up=False), "seen", shown)
    page.rate(lambda left, right: Thumb(picture=left, up=False), "seen", ())  # nothing is shown any more
    assert Ratings.of(run).standing() == [Pair(better=shown[1], worse=shown[0]), Thumb(picture=shown[0], up=False)]
    before = page.look("seen")
    page.take_back("seen")
    assert page.look("seen") != before
    assert Ratings.of(run).standing() == [Pair(better=shown[1], worse=shown[0])]


def test_a_file_of_ratings_that_was_spoiled_is_told_in_the_page(run: RunFolder):
    page = rate_page(run)
    (file := Ratings.of(run).file).parent.mkdir()
    file.write_text("{}\n", encoding="utf-8")
    sent = dict(zip(page.views, page.follow("seen", Seen()), strict=False))
    assert "ratings.jsonl:1" in sent["nothing"]["value"]
    assert sent["body"]["visible"] is False


def test_pictures_are_rated_by_keyboard_and_a_run_learns_from_them(trained_site: Site, page: Page):
    page.goto(trained_site.url)
    open_tab(page, "3 Compare")
    open_tab(page, "Rate")
    expect(page.get_by_text("0 pairs and 0 thumbs so far.")).to_be_visible()
    expect(page.get_by_role("button", name="Refine with these")).to_be_disabled()
    left = page.get_by_role("img", name="Left picture of: ")
    expect(left).to_be_visible()
    wait_until(lambda: left.evaluate("image => image.complete && image.naturalWidth > 0"), "the picture is there")
    first = left.get_attribute("src")

    page.get_by_role("button", name="Right is better").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_text("1 pair and 0 thumbs so far.")).to_be_visible()
    expect(page.get_by_role("button", name="Right is better")).to_be_focused()
    expect(left).not_to_have_attribute("src", str(first))
    page.get_by_role("button", name="Thumb up for left").click()
    expect(page.get_by_text("1 pair and 1 thumb so far.")).to_be_visible()
    page.get_by_role("button", name="Neither").click()
    expect(page.get_by_text(re.compile("All pictures there are have been compared"))).to_be_visible()
    page.get_by_role("button", name="Take back the last").click()
    expect(left).to_be_visible()
    said = Ratings.of(trained_site.run("seen")).standing()
    assert [type(rating) for rating in said] == [Pair, Thumb]

    page.get_by_role("button", name="Refine with these").click()
    expect(page.get_by_text("seen-refined is in the queue")).to_be_visible()
    expect(page.get_by_text(f"lorasmith refine {trained_site.runs / 'seen'}")).to_be_visible()
    new = trained_site.run("seen-refined")
    assert new.read_config().preference.start == str(trained_site.run("seen").checkpoint(4))
    wait_until(lambda: new.status().state in ("training", "sampling", "saving", "exporting", "done"), "it trains")
