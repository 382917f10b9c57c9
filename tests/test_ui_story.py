"""The whole way in a browser, as a person walks it: a folder, captions, a plan, a training, a wall, a file to share."""

from __future__ import annotations

import re
from typing import Any

import pytest
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from playwright.sync_api import Page, expect
from safetensors import safe_open

from lorasmith.trainer.bases import POCKET

from .browser import SECONDS, Site, open_tab, wait_until

pytestmark = pytest.mark.timeout(900)


def test_from_a_folder_of_images_to_a_file_that_diffusers_loads(site: Site, page: Page):
    page.goto(site.url)
    _images(page, site)
    _train(page, site)
    _compare(page, site)
    _share(page, site)

    exports = site.run("ink").exports
    with safe_open(exports / "ink-step000008.safetensors", "pt") as file:
        header = file.metadata()
    assert header["modelspec.title"] == "Ink of six things"
    assert header["modelspec.trigger_phrase"] == "zxink"
    assert header["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert header["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")
    pipeline: Any = StableDiffusionPipeline.from_pretrained(POCKET)
    pipeline.load_lora_weights(exports, weight_name="ink-step000008.safetensors")
    assert pipeline.get_active_adapters()


def _images(page: Page, site: Site) -> None:
    box = page.get_by_label("Folder of images")
    box.fill(str(site.images))
    box.press("Enter")
    expect(page.get_by_role("textbox", name=re.compile("^Caption of"))).to_have_count(6)
    page.get_by_label("Trigger word").fill("zxink")
    page.get_by_role("button", name="Change many captions at once").click()
    page.get_by_role("button", name="Preview", exact=True).click()
    expect(page.get_by_text("Will change 6 captions")).to_be_visible()
    page.get_by_role("button", name="Apply", exact=True).click()
    expect(page.get_by_label("Caption of sun.png")).to_have_value("zxink, emoji of a sun")
    assert (site.images / "sun.txt").read_text(encoding="utf-8") == "zxink, emoji of a sun\n"
    page.get_by_role("button", name="Go on to Train").click()


def _train(page: Page, site: Site) -> None:
    name = page.get_by_role("textbox", name=re.compile(r"^Name\b"))
    name.fill("ink")
    name.blur()
    page.get_by_role("button", name="The same as a file, and as a command").click()
    document = page.get_by_role("textbox", name=re.compile("^Configuration"))
    expect(document).to_have_value(re.compile('name = "ink"'))
    document.fill(_shortened(document.input_value()))
    document.blur()
    expect(page.get_by_text("12 steps").first).to_be_visible()
    start = page.get_by_role("button", name="Start training")
    expect(start).to_be_enabled()
    start.click()
    expect(page.get_by_text("Done, 12 steps.").first).to_be_visible(timeout=3 * SECONDS * 1000)
    run = site.run("ink")
    assert run.saved_steps() == [4, 8, 12]
    expect(page.get_by_role("img", name=re.compile("^step 12"))).to_have_count(len(run.read_config().sample.prompts))
    expect(page.get_by_role("img", name=re.compile("^step 0"))).to_have_count(len(run.read_config().sample.prompts))


def _shortened(document: str) -> str:
    """A run of twelve steps, with a checkpoint at each fourth."""
    plain = "\n".join(line for line in document.splitlines() if not line.startswith(("images =", "batch =")))
    assert "[budget]" not in plain or "[save]" not in plain
    tables = {"budget": "images = 24\nbatch = 2", "save": "every = 4", "sample": "every = 6\nsteps = 2"}
    for table, lines in tables.items():
        head = f"[{table}]"
        plain = plain.replace(head, f"{head}\n{lines}") if head in plain else f"{plain}\n\n{head}\n{lines}\n"
    return plain


def _compare(page: Page, site: Site) -> None:
    open_tab(page, "3 Compare")
    page.get_by_label("Score and recommend").uncheck()
    page.get_by_role("textbox", name="Strengths").fill("0, 1")
    page.get_by_role("checkbox", name="step 4", exact=True).uncheck()
    page.get_by_role("textbox", name="Strengths").blur()
    page.get_by_role("button", name="Draw", exact=True).click()
    pick = page.get_by_role("button", name="Pick step 8 at 1", exact=True)
    expect(pick).to_be_visible(timeout=2 * SECONDS * 1000)
    wait_until(lambda: len(list((site.run("ink").path / "compare").glob("*.png"))) == 3, "three pictures are drawn")
    pick.click()
    expect(page.get_by_label("Checkpoint to use")).to_have_value("step 8")
    page.get_by_role("button", name="Use this one").click()
    expect(page.get_by_text("Chosen: step 8 at 1.")).to_be_visible()
    page.get_by_role("button", name="Go on to Share").click()


def _share(page: Page, site: Site) -> None:
    expect(page.get_by_label("Checkpoint", exact=True)).to_have_value("step 8")
    title = page.get_by_role("tabpanel").get_by_role("textbox", name="Title")
    title.fill("Ink of six things")
    page.get_by_role("button", name="Export and verify").click()
    expect(page.get_by_text(re.compile("wrote and verified ink-step000008.safetensors"))).to_be_visible(
        timeout=2 * SECONDS * 1000
    )
