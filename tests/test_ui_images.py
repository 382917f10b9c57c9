"""The Images page: what its handlers do to real folders, and what a person sees in a real browser."""

from __future__ import annotations

import json
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from lorasmith.datasets.journal import REMOVED
from lorasmith.datasets.listing import Memory, list_images
from lorasmith.datasets.uploads import UPLOADS
from lorasmith.trainer.errors import UserError
from lorasmith.ui.context import Context
from lorasmith.ui.images import captions
from lorasmith.ui.images.captioning import Captioning, is_here, whereabouts
from lorasmith.ui.images.cards import PER_PAGE, Place, View, chosen, page_of
from lorasmith.ui.images.checkups import Checkup, Checkups, Question
from lorasmith.ui.images.facts import bucket_table, suggested_trigger, summary, trigger_check
from lorasmith.ui.images.findings import groups_of, html_of, mended_copy, remove, show_only, troubled, verdict
from lorasmith.ui.images.page import Images
from lorasmith.ui.images.saving import Answer, Left, save
from lorasmith.ui.images.visit import FILE, Visit

from .browser import SECONDS, Site, wait_until
from .conftest import draw_picture


def textured(number: int, size: tuple[int, int]) -> Image.Image:
    """A picture without plain bars, sharp, and another one for each number."""
    pixels = np.random.default_rng(number).integers(0, 255, (size[1] // 8, size[0] // 8, 3), np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six images, of which one has no caption."""
    made = tmp_path / "Ink Drawings"
    made.mkdir()
    for number in range(6):
        textured(number, [(640, 512), (512, 512), (480, 700)][number % 3]).save(made / f"{number}.png")
        if number:
            (made / f"{number}.txt").write_text(f"thing {number}, ink\n")
    return made


@pytest.fixture
def images(tmp_path: Path) -> Images:
    return Images(Context.of(tmp_path / "runs"))


def examined(folder: Path, trigger: str = "", resolution: int = 512) -> Checkup:
    checkups = Checkups()

    def answer() -> Checkup:
        return checkups.of(Question(folder, trigger, resolution))

    wait_until(lambda: not answer().doing, "the folder is examined")
    return answer()


# ---------------------------------------------------------------------------------------------------------------------
# which images


def test_a_typed_folder_is_used_where_it_is(images: Images, folder: Path):
    shown, used, view, trigger, told = images.use(f' "{folder}" ', "", "")
    assert (shown, used, view.folder) == (str(folder), str(folder), str(folder))
    assert (trigger, told) == ("inkdrawings", "")
    assert images.use(str(folder), str(folder), "mine") == [gr.skip()] * 5


@pytest.mark.parametrize("typed", ["nowhere", "/nowhere/at all"])
def test_a_folder_that_is_not_there_is_told_and_changes_nothing(images: Images, typed: str):
    with pytest.raises(gr.Error, match="no such folder"):
        images.use(typed, "", "")


def test_a_path_outside_of_the_roots_is_refused_and_not_remembered(tmp_path: Path, folder: Path):
    images = Images(Context.of(tmp_path / "runs", roots=(tmp_path / "allowed",)))
    with pytest.raises(gr.Error, match="outside of the folders"):
        images.use(str(folder), "", "")
    Visit(str(folder)).keep(images.context.runs)
    assert images.remembered() == {}


def test_the_example_is_a_copy_with_its_trigger(images: Images):
    _, used, view, trigger, told, side = images.use_example("")
    assert side == 64  # what the pocket base draws: the example's images are large enough for it
    assert Path(used).parent == images.context.runs / UPLOADS
    assert len(list_images(Path(used)).images) == 32
    assert (view.folder, trigger) == (used, "blueprint")
    assert used in told


def test_uploads_go_to_a_folder_that_is_told(images: Images, folder: Path, tmp_path: Path):
    sent = [str(shutil.copy(file, tmp_path)) for file in sorted(folder.glob("[12].*"))]
    (tmp_path / "notes.pdf").write_text("no image")
    _, used, _, _, told, emptied = images.take([*sent, str(tmp_path / "notes.pdf")], "", "")
    assert [image.name for image in list_images(Path(used)).images] == ["1.png", "2.png"]
    assert used in told
    assert "notes.pdf" in told
    assert emptied is None
    more = str(shutil.copy(folder / "3.png", tmp_path))
    assert images.take([more], used, "")[1] == used
    more = str(shutil.copy(folder / "3.png", tmp_path))
    assert images.take([more], str(folder), "")[1] != str(folder)  # a folder of one's own is not added to


def test_a_zip_is_unpacked(images: Images, folder: Path, tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "drawings.zip", "w") as archive:
        archive.write(folder / "1.png", "1.png")
    assert Path(images.take([str(tmp_path / "drawings.zip")], "", "")[1]).name == "drawings"


def test_what_was_looked_at_comes_again(images: Images, folder: Path):
    images.news(str(folder), str(folder), "trg ", "Object", 512, View(str(folder)), {"is empty": False})
    assert Visit.last(images.context.runs) == Visit(str(folder), "trg", "Object")
    opened = images.news("", "", "", "Style", 512, View(), {})
    assert (opened["folder"], opened["in_use"], opened["view"]) == (str(folder), str(folder), View(str(folder)))
    assert (opened["trigger"], opened["teaching"]) == ("trg", "Object")
    assert "folder" not in images.news("/being typed", "", "", "Style", 512, View(), {})
    (images.context.runs / FILE).write_text('{"folder": 3')
    assert Visit.last(images.context.runs) == Visit()


# ---------------------------------------------------------------------------------------------------------------------
# what is told of them


def test_the_summary_counts_images_captions_and_problems(folder: Path):
    checkup = examined(folder)
    assert "6 images, 5 captions" in summary(list_images(folder), checkup)
    assert "Largest 480 x 700, smallest 512 x 512." in summary(list_images(folder), checkup)
    early = summary(list_images(folder), Checkup("", None, "measuring image 3 of 6"))
    assert "Looking for problems: measuring image 3 of 6." in early
    (folder / "empty").mkdir()
    assert "holds no images" in summary(list_images(folder / "empty"), Checkup("", None))


@pytest.mark.parametrize(
    ("trigger", "says"),
    [("", "Without a trigger"), ("ink", "common word"), ("zxqv", "0 of 5 captions have it"), ("inkx", "A rare word")],
)
def test_the_trigger_word_is_judged(folder: Path, trigger: str, says: str):
    assert says in trigger_check(list_images(folder), trigger)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("Ink Drawings", "inkdrawings"),
        ("cats", "catsx"),
        ("10_dog", "dogx"),
        ("2024", "mystyle"),
        ("images", "mystyle"),
        ("日本", "mystyle"),
    ],
)
def test_a_word_is_suggested_that_means_nothing_yet(name: str, word: str):
    assert suggested_trigger(Path(name)) == word


def test_buckets_are_counted_and_crops_told(folder: Path):
    draw_picture(7, (1000, 180)).save(folder / "wide.png")
    examination = examined(folder).examination
    assert examination
    told = bucket_table(examination.items, 512)
    assert "<td>2</td>" in told
    assert "512 x 512 px" in told
    assert "More than 10 % of these is cut off: wide.png (" in told


def test_what_has_not_changed_is_not_sent_again(images: Images, folder: Path):
    seen: dict[str, Any] = {"is empty": True}

    def news() -> dict[str, Any]:
        nonlocal seen
        told = images.news(str(folder), str(folder), "trg", "Style", 512, View(str(folder)), seen)
        seen = told.get("seen", seen)
        return told

    assert "6 images" in news()["summary"]
    wait_until(lambda: not news(), "all is told")
    (folder / "0.txt").write_text("thing 0")
    assert "6 captions" in news()["summary"]


def test_a_changed_caption_decodes_no_image_again(folder: Path):
    read: list[Path] = []

    def look(file: Path) -> str:
        read.append(file)
        return file.name

    memory, files = Memory(), sorted(folder.glob("*.png"))
    assert list(memory.map(look, files)) == [file.name for file in files]
    draw_picture(9, (600, 600)).save(folder / "3.png")
    assert list(memory.map(look, files)) == [file.name for file in files]
    assert read == [*files, folder / "3.png"]


def test_an_examination_follows_the_folder(folder: Path):
    checkups, question = Checkups(), Question(folder, "trg", 512)

    def captioned() -> int:
        wait_until(lambda: not checkups.of(question).doing, "the folder is examined")
        examination = checkups.of(question).examination
        assert examination
        return sum(any(item.captions) for item in examination.items)

    assert captioned() == 5
    (folder / "0.txt").write_text("thing 0")
    assert captioned() == 6
    shutil.rmtree(folder)
    wait_until(lambda: not checkups.of(question).doing, "the folder is examined")
    error = checkups.of(question).error
    assert error
    assert "no such folder" in str(error)


# ---------------------------------------------------------------------------------------------------------------------
# problems and their fixes


def spoil(folder: Path) -> None:
    """One of each kind that has a button of its own."""
    shutil.copy(folder / "2.png", folder / "copy.png")
    (folder / "copy.txt").write_text("a copy")
    (folder / "broken.png").write_bytes(b"")
    (folder / "lost.txt").write_text("of no image")
    draw_picture(3, (60, 60)).save(folder / "tiny.png")


def test_findings_are_grouped_the_most_severe_first_with_their_images(folder: Path):
    spoil(folder)
    examination = examined(folder).examination
    assert examination
    groups = {group.check: group for group in groups_of(examination.findings)}
    assert list(groups)[:2] == ["unusable", "same file"]
    assert "2 problems stop training" in verdict(examination)
    assert (groups["same file"].images, groups["same file"].doubles) == (("2.png", "copy.png"), ("copy.png",))
    assert groups["no caption"].images == ("0.png", "tiny.png")
    assert {"2.png", "copy.png", "tiny.png", "broken.png"} <= troubled(examination)
    said = html_of(groups["unusable"], folder)
    assert "Stops training: files that cannot be used (2)" in said
    assert "lost.txt" in said
    assert "or remove it" in said


def test_names_of_files_are_shown_as_text(folder: Path):
    draw_picture(3, (60, 60)).save(folder / "<b>&.png")
    examination = examined(folder).examination
    assert examination
    said = "".join(html_of(group, folder) for group in groups_of(examination.findings))
    assert "&lt;b&gt;&amp;.png" in said
    assert "<b>&.png" not in said


def test_buttons_mend_what_is_found(folder: Path):
    spoil(folder)
    view = View(str(folder))
    for names in (["lost.txt"], ["broken.png"], ("copy.png", "tiny.png")):
        after, told = remove(str(folder), names, view)
        assert (after.version, after.folder) == (1, str(folder))
        assert "Undo brings it all back" in told
    examination = examined(folder).examination
    assert examination
    assert not {"unusable", "same file", "too small"} & {finding.check for finding in examination.findings}
    assert sorted(file.name for file in (folder / REMOVED).iterdir()) == [
        *("broken.png", "copy.png", "copy.txt", "lost.txt", "tiny.png")
    ]


def test_a_mended_copy_is_whole_and_told(folder: Path, tmp_path: Path):
    spoil(folder)
    before = sorted(folder.iterdir())
    examination = examined(folder).examination
    assert examination
    *_, (told, out) = mended_copy(examination, tmp_path / "uploads")
    assert out is not None
    assert out == tmp_path / "uploads" / "ink-drawings-mended"
    assert str(out) in told
    mended = examined(out).examination
    assert mended
    assert not mended.is_blocked
    assert sorted(folder.iterdir()) == before


def test_a_copy_that_cannot_be_made_says_why(folder: Path, tmp_path: Path):
    for file in folder.glob("*.png"):
        file.write_bytes(b"")
    examination = examined(folder).examination
    assert examination
    *_, (told, out) = mended_copy(examination, tmp_path / "uploads")
    assert out is None
    assert "no image here can be used" in told


# ---------------------------------------------------------------------------------------------------------------------
# cards


def test_cards_are_chosen_by_what_is_asked(folder: Path):
    listing, view = list_images(folder), View(str(folder))

    def names(view: View) -> list[str]:
        return [image.name for image in chosen(listing, view)]

    assert len(names(view)) == 6
    assert names(view.of(show="No caption")) == ["0.png"]
    assert names(view.of(contains="THING 3")) == ["3.png"]
    assert names(view.of(show="With problems", troubled=frozenset({"4.png"}))) == ["4.png"]
    assert names(show_only(("1.png", "2.png"), view)) == ["1.png", "2.png"]
    assert names(show_only(("1.png",), view).of()) == names(view)


@pytest.mark.parametrize(
    ("count", "page", "expected"), [(0, 0, (0, 0, 1)), (24, 5, (24, 0, 1)), (25, 1, (1, 1, 2)), (500, 20, (20, 20, 21))]
)
def test_pages_hold_24(count: int, page: int, expected: tuple[int, int, int]):
    on_page, number, pages = page_of(list(range(count)), page)  # pyright: ignore[reportArgumentType]
    assert (len(on_page), number, pages) == expected
    assert PER_PAGE == 24


@pytest.fixture
def leave(folder: Path, tmp_path: Path):
    """A function that leaves the box of an image, and gives what its card makes of the answer."""
    context = Context.of(tmp_path / "runs")

    def left(name: str, text: str, shown: str) -> Answer:
        return save(context, Left(folder=str(folder), name=name, text=text, shown=shown))

    yield left
    context.planner.close()


def test_the_page_stays_open_while_files_change_and_another_choice_begins_anew(folder: Path):
    view = View(str(folder))
    place = Place(view, 3)
    assert place.in_view(view.anew) == 3
    assert place.in_view(view.of(show="No caption")) == 0
    assert place.in_view(View("elsewhere")) == 0


def test_a_caption_is_saved_and_said_so(folder: Path, leave: Callable[..., Answer]):
    answer = leave("1.png", " a new  one", "thing 1, ink")
    assert "Saved" in answer.said
    assert (answer.text, answer.shown) == (None, "a new one")
    assert (folder / "1.txt").read_text() == "a new one\n"
    assert leave("1.png", "a new one", "a new one") == Answer(shown="a new one")


def test_a_caption_that_was_changed_elsewhere_is_shown_and_nothing_is_lost(folder: Path, leave: Callable[..., Answer]):
    (folder / "1.txt").write_text("theirs")
    answer = leave("1.png", "<i>mine</i>", "thing 1, ink")
    assert "&lt;i&gt;mine&lt;/i&gt;" in answer.said
    assert (answer.text, answer.shown) == ("theirs", "theirs")
    assert (folder / "1.txt").read_text() == "theirs"


def test_an_image_that_is_gone_is_told_on_its_card(folder: Path, leave: Callable[..., Answer]):
    (folder / "1.png").unlink()
    before = set(folder.iterdir())
    assert "no longer" in leave("1.png", "new", "thing 1, ink").said
    assert set(folder.iterdir()) == before


def test_a_folder_that_the_page_may_not_read_takes_no_caption(folder: Path, tmp_path: Path):
    context = Context.of(tmp_path / "runs", (tmp_path / "allowed",))
    answer = save(context, Left(folder=str(folder), name="1.png", text="new", shown="thing 1, ink"))
    context.planner.close()
    assert "lies outside" in answer.said
    assert (folder / "1.txt").read_text() == "thing 1, ink\n"


# ---------------------------------------------------------------------------------------------------------------------
# many captions at once


@pytest.mark.parametrize("number", range(4))
def test_a_bulk_change_is_previewed_made_and_taken_back(folder: Path, number: int):
    before = {file.name: file.read_bytes() for file in folder.glob("*.txt")}
    asked = (captions.OPERATIONS[number], "trg", "thing", "ding", "ink")
    told, seen, button = captions.preview(str(folder), *asked)
    count = len(seen.edits)
    assert count == (6 if number == 0 else 5)
    assert f"Will change {count} captions" in told
    assert told.count("<tr>") == 1 + 5  # no more than five examples
    assert button["visible"]
    done, none, button, view = captions.apply(str(folder), seen, View(str(folder)))
    assert f"Changed {count} captions" in done
    assert (none, button["visible"], view.version) == (None, False, 1)
    assert captions.undo_label(str(folder)) == f"Undo: {seen.what}"
    assert "Undone" in captions.take_back(str(folder), view)[0]
    assert {file.name: file.read_bytes() for file in folder.glob("*.txt")} == before
    assert captions.undo_label(str(folder)) == ""


def test_a_bulk_change_without_effect_says_so(folder: Path):
    told, _, button = captions.preview(str(folder), captions.OPERATIONS[1], "", "unicorn", "x", "")
    assert "No caption would change" in told
    assert not button["visible"]
    for values in (("", "", "", ""), ("", "", "x", "")):
        with pytest.raises(gr.Error):
            captions.preview(str(folder), captions.OPERATIONS[1], *values)
    with pytest.raises(gr.Error, match="no preview"):
        captions.apply(str(folder), None, View())
    with pytest.raises(gr.Error, match="no images yet"):
        captions.preview("", captions.OPERATIONS[3], "", "", "", "")


# ---------------------------------------------------------------------------------------------------------------------
# captioning


def test_where_a_model_is_said_without_asking_anybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert not is_here("Salesforce/blip-image-captioning-large")
    assert "not on this computer" in whereabouts("blip")
    assert "folder on this computer" in whereabouts(str(tmp_path))
    assert "no such folder" in whereabouts("no model at all")


def test_a_model_that_cannot_be_used_is_told_with_its_log(folder: Path, tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "bert"}')
    work = Captioning(tmp_path / "runs", folder)
    assert work.sentence() == ""
    work.start(str(tmp_path / "model"))
    with pytest.raises(UserError, match="already"):
        work.start("blip")
    assert "A model writes captions" in work.sentence()
    wait_until(lambda: not work.is_alive(), "the model has ended")
    assert "Problem." in work.sentence()
    assert "none of the kinds that are known" in work.sentence()
    assert Captioning(tmp_path / "runs", folder).sentence() == work.sentence()  # of another page
    assert Captioning(tmp_path / "runs", tmp_path).sentence() == ""


def test_cards_are_read_anew_when_a_model_has_ended(images: Images, folder: Path):
    asked = (str(folder), str(folder), "trg", "Style", 512, View(str(folder)))
    assert images.news(*asked, {"is captioning": True})["view"] == View(str(folder), version=1)
    assert "view" not in images.news(*asked, {"is captioning": False})


# ---------------------------------------------------------------------------------------------------------------------
# in the browser


def open_images(page: Page, site: Site, folder: Path) -> None:
    page.goto(site.url)
    box = page.get_by_label("Folder of images")
    box.fill(str(folder))
    box.press("Enter")


def caption_of(page: Page, name: str) -> Any:
    return page.get_by_label(f"Caption of {name}", exact=True)


def test_first_visit_to_the_example(site: Site, page: Page):
    page.goto(site.url)
    page.get_by_role("button", name="Use the example images").click()
    expect(page.get_by_text("32 images, 32 captions")).to_be_visible()
    expect(page.get_by_label("Trigger word")).to_have_value("blueprint")
    expect(page.get_by_label("Caption of ")).to_have_count(24)
    page.get_by_role("button", name="Next page").first.click()
    expect(page.get_by_label("Caption of ")).to_have_count(8)
    expect(page.get_by_role("button", name="Use the example images")).to_be_hidden()
    page.get_by_role("button", name="Go on to Train").click()
    expect(page.get_by_role("tab", name="2 Train")).to_have_attribute("aria-selected", "true")


def test_a_caption_saves_itself_and_bulk_changes_are_undone(site: Site, page: Page, chromium: Browser):
    open_images(page, site, site.images)
    box = caption_of(page, "star.png")
    box.fill("<script>alert(1)</script>, star")
    box.blur()
    expect(page.get_by_text("✓ Saved")).to_be_visible()
    assert (site.images / "star.txt").read_text() == "<script>alert(1)</script>, star\n"
    before = {file.name: file.read_bytes() for file in site.images.glob("*.txt")}

    page.get_by_label("Trigger word").fill("zxqv")
    page.get_by_role("button", name="Change many captions at once").click()
    page.get_by_role("button", name="Preview", exact=True).click()
    expect(page.get_by_text("Will change 6 captions")).to_be_visible()
    assert {file.name: file.read_bytes() for file in site.images.glob("*.txt")} == before
    page.get_by_role("button", name="Apply", exact=True).click()
    expect(page.get_by_text("Changed 6 captions")).to_be_visible()
    expect(caption_of(page, "sun.png")).to_have_value("zxqv, emoji of a sun")
    expect(caption_of(page, "star.png")).to_have_value("zxqv, <script>alert(1)</script>, star")

    with chromium.new_context() as elsewhere:  # another browser remembers the folder, and can undo
        other = elsewhere.new_page()
        other.goto(site.url)
        expect(other.get_by_label("Folder of images")).to_have_value(str(site.images))
        other.get_by_role("button", name="Undo: add the trigger 'zxqv'").click()
        expect(caption_of(other, "sun.png")).to_have_value("emoji of a sun")
    assert {file.name: file.read_bytes() for file in site.images.glob("*.txt")} == before


def test_what_is_being_written_outlives_a_reload(site: Site, page: Page):
    open_images(page, site, site.images)
    caption_of(page, "star.png").fill("half a thou")
    page.reload()
    wait_until(lambda: (site.images / "star.txt").read_text() == "half a thou\n", "the caption is written")


def test_problems_are_named_and_mended(site: Site, page: Page):
    (site.images / "broken.png").write_bytes(b"")
    (site.images / "lost.txt").write_text("of no image")
    shutil.copy(site.images / "sun.png", site.images / "sun copy.png")
    open_images(page, site, site.images)
    expect(page.get_by_text("2 problems stop training.")).to_be_visible()
    page.get_by_role("button", name="Remove lost.txt").click()
    expect(page.get_by_text("1 problem stops training.")).to_be_visible()
    page.get_by_role("button", name="Remove broken.png").first.click()
    expect(page.get_by_text("1 problem stops training.")).to_be_hidden()
    page.get_by_role("button", name="Remove sun copy.png").first.click()  # the one without a caption
    expect(page.get_by_text("the same file twice")).to_be_hidden()
    expect(caption_of(page, "sun copy.png")).to_have_count(0)
    for name in ("removed sun copy.png", "removed broken.png", "removed lost.txt"):
        page.get_by_role("button", name=f"Undo: {name}").click()
    expect(page.get_by_text("2 problems stop training.")).to_be_visible()
    expect(caption_of(page, "sun copy.png")).to_have_value("")
    page.get_by_role("button", name="Write a mended copy").click()
    expect(page.get_by_text("The mended copy is in use now")).to_be_visible()
    expect(page.get_by_label("Folder of images")).to_have_value(str(site.runs / ".uploads" / "images-mended"))
    expect(page.get_by_text("6 images, 6 captions")).to_be_visible()


def test_files_are_dropped_on_the_page(site: Site, page: Page):
    page.goto(site.url)
    page.get_by_text("Or drop images and captions here").wait_for()
    page.locator("input[type=file]").first.set_input_files(sorted(site.images.glob("s*.*")))
    expect(page.get_by_text("6 files came in.")).to_be_visible()
    expect(page.get_by_text("3 images, 3 captions")).to_be_visible()
    expect(caption_of(page, "sun.png")).to_have_value("emoji of a sun")
    assert (site.runs / ".uploads" / "images" / "sun.txt").is_file()


def test_two_tabs_do_not_overwrite_each_other(site: Site, page: Page):
    open_images(page, site, site.images)
    caption_of(page, "sun.png").wait_for()
    (site.images / "sun.txt").write_text("theirs")
    caption_of(page, "sun.png").fill("mine")
    caption_of(page, "sun.png").blur()
    expect(page.get_by_text("You wrote: mine")).to_be_visible()
    expect(caption_of(page, "sun.png")).to_have_value("theirs")


def test_five_hundred_images(site: Site, page: Page):
    for number in range(500):
        draw_picture(number, (64, 48 + number % 7)).save(site.images / f"x{number:03d}.png")
    open_images(page, site, site.images)
    expect(page.get_by_text("506 images, 6 captions")).to_be_visible()
    expect(page.get_by_label("Caption of ")).to_have_count(24)
    page.get_by_role("button", name="Next page").first.click()
    expect(caption_of(page, "x018.png")).to_be_visible()
    expect(page.get_by_text("Page 2 of 22").first).to_be_visible()
    assert json.loads((site.runs / FILE).read_text())["folder"] == str(site.images)


def test_a_phone_shows_all_of_it(site: Site, page: Page):
    page.set_viewport_size({"width": 360, "height": 780})
    open_images(page, site, site.images)
    caption_of(page, "sun.png").wait_for()
    deadline = time.monotonic() + SECONDS
    while page.evaluate("document.documentElement.scrollWidth") > 360 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
