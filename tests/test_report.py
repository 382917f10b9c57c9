"""A run's report: one file with all that is known of a run in whichever state, text as text, and no place of this
computer."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from lorasmith.trainer import run
from lorasmith.trainer.choosing.choice import (
    Choice,
    JudgedCell,
    JudgedPicture,
    Recommended,
    Scores,
    choice_file,
    write_choice,
)
from lorasmith.trainer.config import RunConfig
from lorasmith.trainer.configfile import validate
from lorasmith.trainer.events import AttentionChosen, EventLog, Failed, PlanMade, Sampled, Step, Stopped, Warned
from lorasmith.trainer.files import sha256_of
from lorasmith.trainer.jobs import RunFolder, create_run
from lorasmith.trainer.painting.wall import wall_order
from lorasmith.trainer.plan import make_plan
from lorasmith.trainer.report.curves import Line, chart
from lorasmith.trainer.report.page import FILE, report_of, write_report
from lorasmith.trainer.report.words import Words
from lorasmith.trainer.story import CurvePoint

from .command import lorasmith
from .conftest import draw_picture

HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)> emoji of "thing" & \'more\' </p></section>'
PROBED = {
    "shape": f"8 heads {HOSTILE}",
    "kernel": "flash",
    "milliseconds": {"sdpa": 0.5, "flash": 0.25},
    "left_out": {"math": f"it is {HOSTILE}"},
}
EMPTY = {"br", "img", "meta", "line", "path"}
"""Elements without an end."""


class Page(HTMLParser):
    """A page as a browser reads it; fails on an end that does not belong to the last begin."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text = ""
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.ids: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in EMPTY:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.text += data


def page_of(run: RunFolder, shows_paths: bool = False) -> Page:
    page = Page(report_of(run, shows_paths))
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses)
    assert page.handlers == []
    assert "script" not in page.tags
    assert {address[1:] for address in page.addresses if address.startswith("#")} <= set(page.ids)
    return page


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Of four steps, with captions that want to be more than text."""
    home = tmp_path_factory.mktemp("at home")
    images = home / "my pictures"
    images.mkdir()
    for number in range(4):
        draw_picture(number, (96, 96)).save(images / f"picture {number}.png")
        (images / f"picture {number}.txt").write_text(f"{HOSTILE} {number}", encoding="utf-8")
    values = {
        "name": "short",
        "runs": str(home / "runs"),
        "base": {"model": "pocket"},
        "data": [{"path": str(images), "trigger": "<b>trg"}],
        "adapter": {"rank": 2, "alpha": 2.0},
        "budget": {"images": 8, "batch": 2},
        "save": {"every": 2},
        "sample": {"every": 2, "steps": 1, "prompts": [HOSTILE]},
        "export": {"formats": ["kohya"]},
        "runtime": {"cache": str(home / "cache")},
    }
    return validate(values)


@pytest.fixture(scope="module")
def done(config: RunConfig) -> RunFolder:
    return run.train(make_plan(config), lambda event: None).run


@pytest.fixture
def copied(done: RunFolder, tmp_path: Path) -> RunFolder:
    """The same, to be changed."""
    shutil.copytree(done.path, tmp_path / "runs" / "short")
    return RunFolder(tmp_path / "runs" / "short")


@pytest.fixture
def new(config: RunConfig, tmp_path: Path) -> RunFolder:
    return create_run(config.model_copy(update={"runs": str(tmp_path / "runs")}))


# ---------------------------------------------------------------------------------------------------------------------
# a run that is done


def test_all_is_told_of_a_run_that_is_done(done: RunFolder):
    page = page_of(done)
    assert page.text.count(f"<b>trg, {HOSTILE} 0") >= 2  # below its picture, and among all captions
    assert "Done, 4 steps." in page.text
    assert "4 steps of at most 2 images = 8 images seen, each image 2 times" in page.text
    assert "adapter.rank" in page.text
    assert "The loss of" not in page.text
    [file] = done.exports.glob("*.safetensors")
    assert sha256_of(file) in page.text
    assert "ComfyUI" in page.text
    assert json.loads((done.checkpoint(4) / "state.json").read_text(encoding="utf-8"))["base"] in page.text
    assert "lorasmith train runs/short/config.toml --set name=short-2" in page.text
    assert page.tags.count("path") == 2 + 2  # loss and its average, rates of unet and text encoder
    assert "Its pictures" not in page.text
    assert "was not compared yet" in page.text
    pictures = [address for address in page.addresses if address.startswith("data:")]
    assert len(pictures) == 4 + 3 + 2  # images, previews of three steps, first and last of them at the top


def test_no_place_of_this_computer_is_told_unless_asked_for(done: RunFolder):
    html = report_of(done)
    assert str(done.path.parent.parent) not in html
    assert "at home" not in html
    assert str(Path.home()) not in html or str(Path.home()) == "/"
    assert str(done.config) in report_of(done, shows_paths=True)


def test_a_file_that_was_changed_since_it_was_verified_is_told(copied: RunFolder):
    assert "another than the one that was verified" not in page_of(copied).text
    [file] = copied.exports.glob("*.safetensors")
    file.write_bytes(file.read_bytes() + b"x")
    assert "another than the one that was verified" in page_of(copied).text


def test_parts_that_were_removed_are_named(copied: RunFolder):
    shutil.rmtree(copied.exports)
    shutil.rmtree(copied.samples(2))
    shutil.rmtree(copied.checkpoints)
    page = page_of(copied)
    assert "The files are gone" in page.text
    assert "removed" in page.text
    assert "hashed with its first checkpoint" in page.text


def test_images_that_are_gone_are_named(copied: RunFolder):
    text = copied.config.read_text(encoding="utf-8")
    copied.config.write_text(text.replace("my pictures", "elsewhere"), encoding="utf-8")
    page = page_of(copied)
    assert "The images are not shown: " in page.text
    assert "there is no such folder" in page.text
    assert "All captions, as they were read" not in page.text


# ---------------------------------------------------------------------------------------------------------------------
# a wall


def test_the_newest_wall_is_shown_with_its_pictures(copied: RunFolder):
    order = wall_order(copied, [2, 4], [0, 1])
    (copied.path / "compare").mkdir()
    for number, cell in enumerate(order.cells()):
        draw_picture(number, (64, 64)).save(order.file(cell))
    scores = Scores(0.5, 0.75, -0.25)
    cells = tuple(
        JudgedCell(step, 1.0, scores, (JudgedPicture(HOSTILE, order.seeds[0], scores, "<i>nearest"),))
        for step in (2, 4)
    )
    choice = Choice(cells, Recommended(4, 1.0), f"Take this {HOSTILE}.", False, 4, 4, 8)
    write_choice(choice, choice_file(order))
    page = page_of(copied)
    assert f"Take this {HOSTILE}." in page.text
    assert "style 0.50" in page.text
    assert page.text.count("recommended") == 2  # in the table of means and in that of pictures
    assert "Its pictures are not there" not in page.text

    shutil.rmtree(copied.checkpoint(2))  # its pictures are another's now
    page = page_of(copied)
    assert "Its pictures are not there" in page.text
    assert f"Take this {HOSTILE}." in page.text


def test_a_wall_that_cannot_be_read_is_passed_over(copied: RunFolder):
    (copied.path / "compare").mkdir()
    (copied.path / "compare" / "wall-1.json").write_text("{", encoding="utf-8")
    (copied.path / "compare" / "wall-2.json").write_text('{"cells": []}', encoding="utf-8")
    assert "was not compared yet" in page_of(copied).text


# ---------------------------------------------------------------------------------------------------------------------
# other states


def test_a_run_that_was_not_started_says_what_is_missing(new: RunFolder):
    page = page_of(new)
    for told in (
        *("Not started.", "There is no plan yet", "buckets are settled when the run starts", "There are no curves yet"),
        *("No previews were drawn", "was not compared yet", "Nothing was exported yet", "hashed with its first"),
    ):
        assert told in page.text
    assert page.text.count(HOSTILE) >= 4  # the images are there already


@pytest.mark.parametrize(
    ("events", "told"),
    [
        ([Step(1, 2, 0.1, 1.0, {"unet": 1e-4}, 0.1)], "Interrupted at step 1 of 4"),
        ([Stopped(1)], "Stopped and saved at step 0 of 4"),
        ([Failed(f"the disk {HOSTILE} is full", 1, f"Make room {HOSTILE}.")], f"Make room {HOSTILE}."),
        ([Warned(f"look {HOSTILE}"), Warned(f"look {HOSTILE}")], f"look {HOSTILE}"),
        ([Sampled(0, "samples/step-000000", [HOSTILE])], "removed"),
        (
            [AttentionChosen(HOSTILE, [PROBED])],
            f"attention on {HOSTILE}: flash for 1 of 1 shapes, the fastest by a probe",
        ),
        ([AttentionChosen("a card", [PROBED])], f"math: it is {HOSTILE}"),
        ([AttentionChosen("a card", [PROBED])], "sdpa 0.5, flash 0.25"),
    ],
    ids=["interrupted", "stopped", "failed", "warned", "sampled", "attention", "left out", "times"],
)
def test_other_states_are_told(new: RunFolder, events: list, told: str):
    log = EventLog(new.events)
    log.append(PlanMade(4, 8))
    for event in events:
        log.append(event)
    page = page_of(new)
    assert told in page.text
    if isinstance(events[0], Warned):
        assert page.text.count(told) == 1


def test_a_run_that_trains_is_told_as_it_stands(new: RunFolder):
    new.take_ownership()
    log = EventLog(new.events)
    log.append(PlanMade(4, 8))
    for step in (1, 2, 3):
        log.append(Step(step, 2 * step, 0.1 * step if step != 2 else math.nan, 1.0, {"unet": 1e-4}, 0.1, 512))
    try:
        page = page_of(new)
    finally:
        new.give_up_ownership()
    assert "Step 3 of 4." in page.text
    assert "0.5 GB" in page.text
    assert page.tags.count("path") == 3


# ---------------------------------------------------------------------------------------------------------------------
# pieces


def test_curves_have_round_ticks_and_gaps_where_there_is_no_number():
    html = chart([Line("a", ((1, 0.0), (2, math.nan), (3, 0.2), (4, 0.4)), "first")], "told", "loss")
    assert re.findall(r">([\d.,]+)</text>", html) == ["0", "0.1", "0.2", "0.3", "0.4", "0", "1", "2", "3", "4"]
    [path] = re.findall(r' d="([^"]+)"', html)
    assert path.count("M") == 2
    assert "nan" not in path
    assert chart([Line("a", ((1, math.nan),), "first")], "told", "loss") == ""


def test_a_curve_that_stays_where_it_is_has_a_scale():
    html = chart([Line("a", ((5, 0.1), (5, 0.1)), "first")], "told", "loss")
    assert "nan%" not in html
    assert "inf" not in html


def test_the_words_of_the_curves():
    from lorasmith.trainer.report.curves import rates

    points = [CurvePoint(1, 1.0, 1.0, {"unet": 1e-4}), CurvePoint(2, 1.0, 1.0, {"unet": 1e-4, "text_encoder": 1e-5})]
    lines = rates(points)
    assert [line.name for line in lines] == ["text_encoder", "unet"]
    assert math.isnan(lines[0].points[0][1])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("see /home/ann/pictures/a b.png now", "see pictures/a b.png now"),
        ("see /data/secret/x.safetensors.", "see x.safetensors."),
        (r"C:\Users\ann\x.png: gone", "x.png: gone"),
        (r"C:\Users\ann", "…"),
        (r"\\server\share\x.png", "x.png"),
        ("~/pictures/x.png", "x.png"),
        ("/home/ann", "…"),
        ("and/or, 3/4, https://example.com/a/b, a red\\blue thing", None),
        ("emoji of / sign", None),
    ],
)
def test_of_paths_the_last_part_is_told(text: str, told: str | None):
    assert Words(("/home/ann/pictures",)).plain(text) == (text if told is None else told)
    assert Words(("/home/ann/pictures",), shows_paths=True).plain(text) == text


def test_what_cannot_be_printed_is_replaced():
    assert Words()("a\x00b\ud800<") == "a\ufffdb?&lt;"


# ---------------------------------------------------------------------------------------------------------------------
# the command


def test_the_command_writes_the_page_again_and_again_and_no_other_file_over(done: RunFolder, tmp_path: Path):
    for _ in range(2):
        said = lorasmith(tmp_path, "report", done.path)
        assert Path(said.stdout.strip()) == done.path / FILE
    (tmp_path / "there.html").write_text("mine", encoding="utf-8")
    assert "exists already" in lorasmith(tmp_path, "report", done.path, "--out", "there.html", code=2).stderr
    assert "does not end in .html" in lorasmith(tmp_path, "report", done.path, "--out", "x.pdf", code=2).stderr
    lorasmith(tmp_path, "report", done.path, "--out", "new.html", "--paths")
    assert str(done.config) in (tmp_path / "new.html").read_text(encoding="utf-8")


def test_it_comes_without_torch(new: RunFolder):
    work = f"""
import sys
from pathlib import Path
from lorasmith.trainer.jobs import RunFolder
from lorasmith.trainer.report.page import write_report
write_report(RunFolder(Path({str(new.path)!r})))
assert "torch" not in sys.modules and "gradio" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", work], check=True, timeout=300)
    assert (new.path / FILE).is_file()


def test_a_picture_that_is_none_is_left_out(copied: RunFolder):
    (copied.samples(4) / "00.png").write_bytes(b"no picture")
    assert "removed" in page_of(copied).text
    with Image.open(copied.samples(2) / "00.png") as picture:
        assert picture.size == (64, 64)


def test_the_page_is_written_whole(new: RunFolder):
    assert write_report(new) == new.path / FILE
    assert [file.name for file in new.path.iterdir() if ".tmp" in file.name] == []
