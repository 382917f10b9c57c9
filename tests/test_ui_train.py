"""The Train page: the form and its plan, a run from its start to its extension, the queue, and what failures say."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from lorasmith.trainer.config import RunConfig
from lorasmith.trainer.events import Checkpointed, EventLog, Failed, PlanMade, Sampled, Step
from lorasmith.trainer.jobs import RunFolder, create_run
from lorasmith.trainer.status import Status
from lorasmith.trainer.story import CurvePoint, Story
from lorasmith.ui.train.running import BUTTONS, budget_with, log_tail, loss_sentence, rates_sentence, samples_table
from lorasmith.ui.train.running import _announcement as announcement

from .browser import SECONDS, Site, open_tab, wait_until

_LONG = SECONDS * 2000  # milliseconds for what trains
SHORT = """
[budget]
images = 16
batch = 2
[save]
every = 4
[adapter]
rank = 2
alpha = 2.0
"""


def open_train(page: Page, site: Site) -> None:
    """The page with the site's images chosen and planned."""
    page.goto(site.url)
    page.get_by_label("Folder of images").fill(str(site.images))
    page.get_by_label("Folder of images").press("Enter")
    open_tab(page, "2 Train")
    expect(plan(page)).to_contain_text("6 images, all with a caption")
    expect(page.get_by_role("textbox", name="Sample prompts")).to_have_value(re.compile("emoji of a "))  # filled in


def plan(page: Page) -> Locator:
    return page.locator("#plan")


def button(page: Page, name: str) -> Locator:
    return page.get_by_role("button", name=name, exact=True)


def toml(page: Page) -> Locator:
    return page.get_by_label("Configuration (TOML)")


def unfold(page: Page, name: str) -> None:
    page.get_by_role("button", name=re.compile(name)).click()


# ---------------------------------------------------------------------------------------------------------------------
# the form


def test_form_text_and_plan_stay_in_step(site: Site, page: Page):
    open_train(page, site)
    expect(page.get_by_role("textbox", name=re.compile(r"^Name\b"))).to_have_value("images")
    unfold(page, "The same as a file")
    unfold(page, "Advanced: every setting")
    unfold(page, "^Adapter:")
    unfold(page, "^Budget:")

    rank = page.get_by_label("Rank (adapter.rank)")
    rank.fill("8")
    rank.blur()
    expect(toml(page)).to_have_value(re.compile(r"\[adapter\]\nrank = 8\n"))
    expect(page.get_by_text("Rank (adapter.rank) · changed, else 16")).to_be_visible()
    expect(page.get_by_label("Command line (Linux, macOS)")).to_have_value(re.compile(r"--set adapter\.rank=8"))

    page.get_by_text(re.compile("^Quick")).click()
    expect(page.get_by_label("Images (budget.images)")).to_have_value("1800")
    expect(plan(page)).to_contain_text("each seen about 300 times")

    text = toml(page).input_value().replace("rank = 8", "rank = 4")
    toml(page).fill(text + '\n[[block]]\npath = "unet.mid_block"\nrank = 2\n')
    toml(page).blur()
    expect(rank).to_have_value("4")
    expect(page.get_by_text("1 further [[block]] table")).to_be_visible()
    expect(plan(page)).to_contain_text("each seen about 300 times")

    toml(page).fill("x = = 3")
    toml(page).blur()
    expect(page.get_by_text("is not valid TOML")).to_be_visible()
    expect(rank).to_have_value("4")


def test_a_problem_is_told_at_its_field_and_above_and_keeps_from_starting(site: Site, page: Page):
    open_train(page, site)
    unfold(page, "Advanced: every setting")
    unfold(page, "^Adapter:")
    expect(button(page, "Start training")).to_be_enabled()

    rank = page.get_by_label("Rank (adapter.rank)")
    rank.fill("5000")
    rank.blur()
    expect(plan(page)).to_contain_text("One thing stands in the way of a start.")
    expect(plan(page)).to_contain_text("adapter.rank: should be less than or equal to 1024 (it is 5000).")
    expect(page.get_by_text("Problem: should be less than or equal to 1024 (it is 5000).")).to_be_visible()
    expect(button(page, "Start training")).to_be_disabled()
    expect(page.get_by_text("A start is not possible yet: see the problem above.")).to_be_visible()
    assert not list(site.runs.glob("*/config.toml"))

    button(page, "Back to the recipe's value").click()
    expect(rank).to_have_value("16")
    expect(button(page, "Start training")).to_be_enabled()


def test_the_recipe_follows_base_and_teaching(site: Site, page: Page):
    open_train(page, site)
    base = page.get_by_label("Base model")
    base.fill("random:sdxl")
    base.press("Enter")
    expect(page.get_by_text(re.compile("SDXL, 1024 pixels.*Recipe style-sdxl"))).to_be_visible()
    expect(plan(page)).to_contain_text("for random:sdxl (SDXL), on its UNet")
    open_tab(page, "1 Images")
    page.get_by_text("Character", exact=True).click()
    open_tab(page, "2 Train")
    expect(page.get_by_text(re.compile("Recipe character-sdxl"))).to_be_visible()


# ---------------------------------------------------------------------------------------------------------------------
# runs


def test_a_run_is_started_stopped_resumed_extended_and_begun_anew(site: Site, page: Page):
    open_train(page, site)
    unfold(page, "The same as a file")
    text = toml(page).input_value().replace("\n[sample]\n", "\n[sample]\nevery = 4\nsteps = 2\n")
    toml(page).fill(text + SHORT.replace("images = 16", "images = 4000"))
    toml(page).blur()
    expect(plan(page)).to_contain_text(re.compile(r"2,\d\d\d steps"))
    button(page, "Start training").click()
    expect(page.get_by_text("images is being started.")).to_be_visible()
    expect(page.get_by_role("progressbar")).to_be_visible(timeout=_LONG)
    expect(page.get_by_text(re.compile("^Step [4-9]")).first).to_be_visible(timeout=_LONG)

    button(page, "Stop and save").click()
    expect(page.get_by_text(re.compile(r"images will save and stop.*It keeps step \d+"))).to_be_visible()
    expect(button(page, "Resume")).to_be_visible(timeout=_LONG)
    expect(button(page, "Stop and save")).to_be_hidden()
    saved = site.run("images").status().saved_step
    assert saved >= 4
    rows = page.get_by_role("rowheader")
    expect(rows.first).to_have_text("step 0, the untouched base")
    expect(page.get_by_role("columnheader", name="emoji of owl", exact=True)).to_be_visible()
    expect(page.get_by_text(re.compile(r"Loss \w+ .* \(smoothed\)"))).to_be_visible()

    page.get_by_role("rowheader").first.locator("xpath=..").get_by_role("link").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog").get_by_role("img")).to_have_attribute("alt", re.compile("^step 0: "))
    page.keyboard.press("Escape")

    button(page, "Resume").click()
    wait_until(lambda: site.run("images").status().step > saved, "it goes on", 2 * SECONDS)
    button(page, "Stop and save").click()
    expect(button(page, "Extend")).to_be_visible(timeout=_LONG)
    page.get_by_label("Further steps").fill("30")
    planned = site.run("images").read_config().budget.images
    button(page, "Extend").click()
    expect(page.get_by_text("about 30 steps more")).to_be_visible()
    wait_until(lambda: site.run("images").read_config().budget.images > planned, "it was extended", 2 * SECONDS)
    site.run("images").ask_to_stop()

    expect(button(page, "Start over as a new run")).to_be_visible(timeout=_LONG)
    button(page, "Start over as a new run").click()
    expect(page.get_by_text("are in the form under New run, as images-2")).to_be_visible()
    expect(toml(page)).to_have_value(re.compile('^name = "images-2"\n'))


def test_a_second_run_waits_in_the_queue_and_can_be_taken_out(site: Site, page: Page):
    client = site.client()
    settings = ["budget.images=4000", "budget.batch=2", "sample.every=0"]
    open_train(page, site)  # before there is a run, with which the form is folded
    client.predict(str(site.images), "pocket", "first", "", settings=settings, api_name="/train")
    expect(button(page, "Start training")).to_be_hidden()  # the form folds itself where a run trains
    unfold(page, "^New run")
    button(page, "Start training").click()
    expect(page.get_by_text("first comes first, one run at a time.")).to_be_visible()
    assert not site.run("images").path.exists()

    button(page, "Add to queue").click()
    expect(page.get_by_text("images waits in the queue, after first.")).to_be_visible()
    expect(page.get_by_role("heading", name="Queue")).to_be_visible()
    expect(page.get_by_text("images is next.")).to_be_visible()
    button(page, "Remove images from the queue").click()
    expect(page.get_by_role("heading", name="Queue")).to_be_hidden()
    assert site.run("images").status().state == "new"


def test_a_failure_is_mended_by_one_click_into_a_new_run(site: Site, page: Page, pictures: Path):
    config = RunConfig.model_validate(
        {"name": "fell", "runs": str(site.runs), "data": [{"path": str(pictures), "trigger": "<b>trg</b>"}]}
    )
    run = create_run(config)
    log = EventLog(run.events)
    log.append(PlanMade(10, 40))
    log.append(Step(3, 12, 0.1, 0.1, {"unet": 1e-4}, 0.1))
    log.append(Failed("the GPU's memory is full", 3, "Lower budget.batch.", anew=["budget.batch=1"]))
    run.log.write_text("a line of <script>alert(1)</script> the log\n", encoding="utf-8")

    page.goto(f"{site.url}/?run=fell")
    open_tab(page, "2 Train")
    card = (
        page.get_by_role("alert")
        .filter(has_text="The GPU's memory is full")
        .or_(page.get_by_role("alert").filter(has_text="the GPU's memory is full"))
    )
    expect(card).to_contain_text("Lower budget.batch.")
    expect(card).to_contain_text("Nothing was saved yet.")
    unfold(page, "^Log")
    expect(page.get_by_text("a line of <script>alert(1)</script> the log")).to_be_visible()
    button(page, "Start again with budget.batch = 1").click()
    unfold(page, "The same as a file")
    expect(toml(page)).to_have_value(re.compile(r'^name = "fell-2"(.|\n)*\nbatch = 1\n'))
    expect(page.get_by_role("tabpanel").get_by_text("<b>trg</b>").first).to_be_visible()


def test_without_a_run_the_example_is_one_click_away(site: Site, page: Page):
    page.goto(site.url)
    open_tab(page, "2 Train")
    button(page, "Train the example").click()
    expect(page.get_by_role("heading", name="blueprint")).to_be_visible()
    expect(button(page, "Train the example")).to_be_hidden()
    wait_until(lambda: site.run("blueprint").status().step > 0, "the example trains", 2 * SECONDS)


# ---------------------------------------------------------------------------------------------------------------------
# pieces


@pytest.fixture
def run(short_run: Callable[..., RunConfig]) -> RunFolder:
    return create_run(short_run())


def story_of(run: RunFolder, *events: Any) -> Story:
    log = EventLog(run.events)
    for event in events:
        log.append(event)
    story = Story(run.events)
    story.refresh()
    return story


def test_previews_stand_newest_first_below_the_untouched_base(run: RunFolder):
    steps = [0, 10, 20]
    for step in steps:
        run.samples(step).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(run.samples(step) / "00.png")
    story = story_of(run, *(Sampled(step, f"samples/step-{step:06d}", ["<b>", "gone"]) for step in steps))
    table = samples_table(run, story)
    assert re.findall(r'scope="row">([^<]+)<', table) == ["step 0, the untouched base", "step 20", "step 10"]
    assert re.findall(r'scope="col">([^<]+)<', table) == ["Step", "&lt;b&gt;", "gone"]
    assert table.count('alt="step 20: &lt;b&gt;"') == 1
    assert table.count("removed") == 3


def test_a_run_without_previews_shows_no_table(run: RunFolder):
    assert samples_table(run, story_of(run)) == ""


@pytest.mark.parametrize(
    ("losses", "sentence"),
    [
        ((0.14, 0.08), "Loss fell from 0.14 to 0.08 (smoothed)."),
        ((0.08, 0.14), "Loss rose from 0.08 to 0.14 (smoothed)."),
        ((0.1, 0.1005), "Loss stayed near 0.101 (smoothed)."),
    ],
)
def test_the_plot_of_the_loss_is_told_in_words(losses: tuple[float, float], sentence: str):
    points = [CurvePoint(step, 1.0, loss, {"unet": 1e-4}) for step, loss in enumerate(losses)]
    assert loss_sentence(points).startswith(sentence)
    assert rates_sentence(points) == "Learning rates. unet: 0.0001 now, 0.0001 at most."


def test_an_extension_counts_full_steps(run: RunFolder):
    story = story_of(run, PlanMade(10, 38), Step(10, 38, 0.1, 0.1, {}, 0.1), Checkpointed(10, "checkpoints/step-10"))
    assert budget_with(story, 40, 100) == 40 + 380
    assert budget_with(story_of(run, PlanMade(10, 48)), 40, 100) == 48 + 380


def test_of_a_long_log_the_end_is_shown(run: RunFolder):
    assert log_tail(run) == ""
    run.log.write_text("\n".join(f"line {number} <" for number in range(20_000)), encoding="utf-8")
    lines = log_tail(run).splitlines()
    assert (len(lines), lines[-1]) == (200, "line 19999 &lt;")


@pytest.mark.parametrize(
    ("state", "names"),
    [
        ("new", {"resume", "anew", "report"}),
        ("queued", {"leave", "report"}),
        ("preparing", {"stop", "report"}),
        ("training", {"stop", "save", "sample", "report"}),
        ("exporting", {"report"}),
        ("stopped", {"resume", "extend", "anew", "report"}),
        ("interrupted", {"resume", "anew", "report"}),
        ("failed", {"again", "anew", "report"}),
        ("done", {"extend", "anew", "report"}),
    ],
)
def test_buttons_stand_where_they_work(state: Any, names: set[str]):
    status = Status(state, 10, 20, 10)
    assert {name for name, asked in BUTTONS.items() if asked.when(status)} == names


def test_the_sentence_is_announced_at_phases_and_seldom_in_between(run: RunFolder):
    sent: dict[str, Any] = {}
    first = announcement(run, Status("training", 1, 20, 0), sent)
    assert 'role="status"' in first["announced"][1]
    sent["announced"] = first["announced"][0]
    assert announcement(run, Status("training", 2, 20, 0), sent) == {}
    assert announcement(run, Status("saving", 2, 20, 0), sent)
    sent["announced"] = (sent["announced"][0], sent["announced"][1] - 31)
    assert announcement(run, Status("training", 2, 20, 0), sent)
