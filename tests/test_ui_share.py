"""The Share page in a browser: what is asked for is written, verified and shown; no failure is silent."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect
from safetensors import safe_open

from lorasmith.trainer.files import sha256_of

from .browser import SECONDS, Site, open_tab, wait_until, watched_page

HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)">${alert(3)}{{alert(4)}}'

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def share(trained_site: Site, page: Page) -> Page:
    """The page of a trained run; a dialog, as only a script would open one, fails the test."""
    page.on("dialog", lambda dialog: pytest.fail(f"a script ran: {dialog.message}"))
    open_share(page, trained_site)
    return page


def open_share(page: Page, site: Site) -> None:
    page.goto(f"{site.url}/?run=seen")
    open_tab(page, "4 Share")
    expect(page.get_by_label("Checkpoint")).to_have_value("step 4 (the newest)", timeout=SECONDS * 1000)


def text_of(page: Page, label: str) -> Locator:
    return page.get_by_role("tabpanel").get_by_role("textbox", name=label)


def wait_for(page: Page, words: str) -> None:
    expect(page.get_by_text(words)).to_be_visible(timeout=SECONDS * 1000)


def test_files_are_asked_for_written_verified_and_shown(share: Page, trained_site: Site, tmp_path: Path):
    text_of(share, "Title").fill(f"Ink {HOSTILE}")
    text_of(share, "Author").fill("Ann")
    text_of(share, "Description").fill(f"{HOSTILE} ![x](https://example.com/a.png)")
    text_of(share, "Tags").fill("ink, <b>wash</b>")
    share.get_by_role("radio", name="Preview 2: emoji of a cat").check()
    share.get_by_role("checkbox", name="Bundle").check()
    share.get_by_role("button", name="Export and verify").click()
    wait_for(share, "Exporting since")
    expect(share.get_by_role("button", name="Exporting...")).to_be_disabled()

    open_share(share, trained_site)  # as after a reload
    wait_for(share, "wrote and verified seen.safetensors, seen-diffusers.safetensors")
    exports = trained_site.run("seen").exports
    with safe_open(exports / "seen.safetensors", "np") as file:
        header = file.metadata()
    assert header["modelspec.title"] == f"Ink {HOSTILE}"
    assert (header["modelspec.author"], header["modelspec.tags"]) == ("Ann", "ink, <b>wash</b>")
    wait_for(share, sha256_of(exports / "seen.safetensors"))
    wait_for(share, header["sshs_model_hash"])
    expect(share.get_by_role("row", name="A1111 ✓ does what was trained")).to_be_visible()

    with share.expect_download() as downloading:
        share.get_by_role("link", name="seen.zip").click()
    downloading.value.save_as(tmp_path / "seen.zip")
    assert (tmp_path / "seen.zip").read_bytes() == (exports / "seen.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "seen.zip") as bundle:
        assert bundle.testzip() is None
        assert "emoji of a cat" in bundle.read("README.md").decode()

    share.get_by_role("button", name="Model card").click()
    card = share.get_by_role("article")
    expect(card.get_by_role("heading")).to_have_text(f"Ink {HOSTILE}")
    expect(card.get_by_role("img", name="emoji of a cat")).to_be_visible()
    expect(card.get_by_role("img", name="Previews of the base")).to_be_visible()
    expect(card.get_by_text('<img src=x onerror="alert(2)">')).to_have_count(2)
    assert text_of(share, "Title").input_value() == f"Ink {HOSTILE}"  # as it was told the last time


def test_the_page_follows_what_is_chosen_in_compare(share: Page, trained_site: Site):
    wait_for(share, "Nothing was chosen in Compare, so the newest checkpoint stands here")
    trained_site.run("seen").choose(2, 0.7)
    wait_for(share, "Chosen in Compare: step 2 at strength 0.7.")
    expect(share.get_by_label("Checkpoint")).to_have_value("step 2")
    expect(share.get_by_role("spinbutton", name="Suggested strength")).to_have_value("0.7")
    share.get_by_role("button", name="Export and verify").click()
    wait_for(share, "wrote and verified seen-step000002.safetensors")
    sidecar = trained_site.run("seen").exports / "seen-step000002.json"
    assert json.loads(sidecar.read_text(encoding="utf-8"))["preferred weight"] == 0.7


def test_an_export_outlives_the_server(trained_site: Site, chromium: Browser, tmp_path: Path):
    before = chromium.new_page()  # which may complain of the server that goes
    open_share(before, trained_site)
    before.get_by_role("button", name="Export and verify").click()
    wait_for(before, "Exporting since")
    before.close()
    trained_site.kill()
    trained_site.start()
    for page in watched_page(chromium, tmp_path):
        open_share(page, trained_site)
        wait_for(page, "wrote and verified seen.safetensors")


def test_a_failure_is_told_with_its_reason(share: Page, trained_site: Site):
    (trained_site.run("seen").checkpoint(4) / "adapter.safetensors").write_bytes(b"torn")
    share.get_by_role("button", name="Export and verify").click()
    expect(share.get_by_role("alert").filter(has_text="the export failed")).to_contain_text(
        "cannot be read", timeout=SECONDS * 1000
    )
    expect(share.get_by_text("wrote and verified")).to_have_count(0)
    expect(share.get_by_role("button", name="Export and verify")).to_be_enabled()


def test_an_answer_that_is_missing_is_told_and_nothing_starts(share: Page, trained_site: Site):
    for name in ("kohya's names", "diffusers' names"):
        share.get_by_role("checkbox", name=name).uncheck()
    share.get_by_role("button", name="Export and verify").click()
    wait_for(share, "no format is ticked")
    assert not (trained_site.run("seen").path / ".export").exists()


def test_a_file_is_copied_into_the_folder_of_a_program(share: Page, trained_site: Site, tmp_path: Path):
    folder = tmp_path / "webui/models/Lora"
    folder.mkdir(parents=True)
    share.get_by_role("button", name="Copy into the folder").click()
    text_of(share, "Folder").fill(str(tmp_path / "webui"))
    share.get_by_role("button", name="Copy", exact=True).click()
    wait_for(share, str(folder / "seen.safetensors"))
    exports = trained_site.run("seen").exports
    assert (folder / "seen.safetensors").read_bytes() == (exports / "seen.safetensors").read_bytes()
    (folder / "seen.safetensors").write_bytes(b"mine")
    share.get_by_role("button", name="Copy", exact=True).click()
    wait_for(share, "another file of the name seen.safetensors is there already")
    assert (folder / "seen.safetensors").read_bytes() == b"mine"


def test_nothing_is_published_without_a_press_a_name_and_a_token(share: Page, trained_site: Site):
    run = trained_site.run("seen")
    share.get_by_role("button", name="Publish on the Hugging Face Hub").click()
    wait_for(share, "There is no bundle yet")
    with zipfile.ZipFile(run.exports / "seen.zip", "w") as bundle:
        bundle.writestr("README.md", "# Seen")
    wait_for(share, "What is uploaded: 1 files")
    text_of(share, "Repository").fill("owner/style")
    share.get_by_role("button", name="Publish", exact=True).click()
    wait_for(share, "no token was given")
    assert share.get_by_label("Token").get_attribute("type") == "password"
    assert not (run.path / ".publish").exists()


def test_a_run_without_checkpoints_has_nothing_to_share(trained_site: Site, page: Page):
    checkpoints = trained_site.run("seen").checkpoints
    checkpoints.rename(checkpoints.with_name("away"))
    page.goto(f"{trained_site.url}/?run=seen")
    open_tab(page, "4 Share")
    wait_for(page, "This run has no checkpoint yet.")
    expect(page.get_by_role("button", name="Export and verify")).to_be_hidden()
    checkpoints.with_name("away").rename(checkpoints)
    wait_until(lambda: page.get_by_role("button", name="Export and verify").is_visible(), "the form is there")
