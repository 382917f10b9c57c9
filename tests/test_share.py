"""Sharing without a browser: exports as processes of their own, what is shown of their files, and where these go."""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import gradio as gr
import psutil
import pytest
from PIL import Image, PngImagePlugin
from safetensors import safe_open

from lorasmith.trainer.config import ExportSection
from lorasmith.trainer.configfile import read_config
from lorasmith.trainer.errors import RunError, TrainingError, UserError
from lorasmith.trainer.jobs import RunFolder
from lorasmith.ui.context import Context
from lorasmith.ui.share.card import card_html, parts_of
from lorasmith.ui.share.copying import copy_to
from lorasmith.ui.share.covers import covers_of, pictures_css
from lorasmith.ui.share.errand import Errand, Stand, why_it_failed
from lorasmith.ui.share.exported import (
    compared,
    files_html,
    files_of,
    names_of,
    size_in_words,
    verified_html,
    weights_of,
)
from lorasmith.ui.share.exporting import (
    Wish,
    answer_of,
    expected_size,
    export_html,
    export_of,
    exports_of,
    settings_of,
    start_export,
)
from lorasmith.ui.share.publishing import contents_html, publish, upload_html, uploads_of
from lorasmith.ui.share.remembered import remember, remembered
from lorasmith.ui.share.wish import form_of, wish_of

from .conftest import draw_picture
from .test_hub import TOKEN, FakeHub, hub  # noqa: F401 (a fixture)

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

HOSTILE = '<script>alert(1)</script> <img src=x onerror="alert(2)"> ${alert(3)} {{alert(4)}}'


@pytest.fixture
def run(seen_run: Path, tmp_path: Path) -> RunFolder:
    """A trained and exported run of four steps, with checkpoints at 2 and 4."""
    shutil.copytree(seen_run, tmp_path / "runs/seen")
    return RunFolder(tmp_path / "runs/seen")


@pytest.fixture
def context(run: RunFolder) -> Context:
    return Context.of(run.path.parent)


class Elements(HTMLParser):
    """What a browser would make of a text: its elements with their attributes, and the words between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def cell_of(run: RunFolder, name: str, lora: str, prompt: str = "a castle") -> Path:
    """A picture of the wall."""
    text = PngImagePlugin.PngInfo()
    text.add_itxt("positive_prompt", prompt)
    text.add_itxt("lora", lora)
    file = run.path / "compare" / f"{name * 16}.png"
    file.parent.mkdir(exist_ok=True)
    draw_picture(2, (64, 64)).save(file, pnginfo=text)
    return file


# ---------------------------------------------------------------------------------------------------------------------
# an export


def test_an_export_is_what_was_wished_for(context: Context, run: RunFolder):
    told = {"title": 'My "ink"', "author": "Ann", "description": "a\nb = [1]", "tags": ["ink", "a, b"], "strength": 0.8}
    cell = cell_of(run, "a", "seen step 2 at 0.7")
    wish = Wish(2, ("kohya",), "fp32", tuple(told.items()), cell, bake=2, merged=0.5, bundle=True)
    start_export(context, run, wish)
    with pytest.raises(RunError, match="an export of this run is under way"):
        start_export(context, run, wish)
    assert 'role="status">Exporting since' in export_html(exports_of(run).stand())

    stand = exports_of(run).wait()
    answer = answer_of(stand)
    assert answer, stand
    names = [Path(path).name for path in answer["written"]]
    assert names[0] == "seen-step000002-baked2-strength0.5.safetensors"
    assert names[-1] == "seen-step000002-baked2-strength0.5.zip"
    with safe_open(run.exports / names[0], "np") as file:
        header = file.metadata()
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F32"}  # noqa: SIM118
    assert (header["modelspec.author"], header["modelspec.tags"]) == ("Ann", "ink, a, b")
    assert header["modelspec.title"] == 'My "ink" (baked to rank 2, at strength 0.5)'
    assert header["modelspec.description"] == "a\nb = [1]"
    assert header["lorasmith_preferred_weight"] == "1.6"  # of what is at half strength already
    with Image.open(run.exports / names[0].replace(".safetensors", ".png")) as shown, Image.open(cell) as chosen:
        assert shown.convert("RGB").tobytes() == chosen.convert("RGB").tobytes()
    said = Elements(export_html(stand)).words
    assert "wrote and verified seen-step000002-baked2-strength0.5.safetensors" in said
    assert "of the change of the unet was lost in baking" in said
    last = settings_of(run, run.read_config())
    assert {name: getattr(last, name) for name in told} == told


def test_a_program_gets_the_files_and_what_was_found_of_them(context: Context, run: RunFolder):
    for file in run.exports.iterdir():
        file.unlink()
    answer = export_of(context, "seen", 0, ("kohya",), "bf16", 0.9)
    assert Path(answer["written"][0]) == run.exports / "seen.safetensors"  # the newest has the plain name
    [report] = answer["files"]
    assert report["precision"] == "bf16"
    assert {client["client"] for client in report["clients"] if client["reading"] == "same"} >= {"A1111", "ComfyUI"}
    assert json.loads((run.exports / "seen.json").read_text(encoding="utf-8"))["preferred weight"] == 0.9


def test_what_cannot_be_exported_is_refused_before_anything_starts(context: Context, run: RunFolder):
    refusals: list[tuple[dict[str, Any], str]] = [
        ({"name": "nobody"}, "there is no run"),
        ({"name": "seen", "step": 3}, "no checkpoint of step 3"),
        ({"name": "seen", "formats": ("ldm",)}, "there is no format 'ldm'"),
        ({"name": "seen", "precision": "fp8"}, "there is no precision 'fp8'"),
    ]
    for asked, message in refusals:
        with pytest.raises(UserError, match=message):
            export_of(context, **asked)
    assert exports_of(run).stand().state == "none"
    assert export_html(exports_of(run).stand()) == ""


def test_an_export_that_fails_says_why_and_is_never_done(context: Context, run: RunFolder):
    (run.checkpoint(4) / "adapter.safetensors").write_bytes(b"torn")
    with pytest.raises(TrainingError, match=r"step-000004: cannot be read .*[^.]\.$"):
        export_of(context, "seen")
    stand = exports_of(run).stand()
    assert (stand.state, answer_of(stand)) == ("ended", None)
    assert "the export failed" in export_html(stand)
    assert "wrote and verified" not in export_html(stand)


def test_an_export_that_was_killed_is_not_done_and_can_be_had_again(context: Context, run: RunFolder):
    start_export(context, run, Wish(formats=("kohya",)))
    psutil.Process(json.loads((run.path / ".export/process.json").read_text())["pid"]).kill()
    stand = exports_of(run).wait()
    assert answer_of(stand) is None
    assert "ended before its time" in export_html(stand)
    assert export_of(context, "seen", 0, ("kohya",))["written"]


def test_a_thumbnail_that_is_no_picture_is_told_by_the_command(run: RunFolder, tmp_path: Path):
    (tmp_path / "notes.png").write_text("no picture")
    errand = Errand(tmp_path / "errand", "an export")
    errand.start(["export", str(run.path), "--thumbnail", str(tmp_path / "notes.png"), "--json"])
    stand = errand.wait()
    assert stand.answer == ""
    assert why_it_failed(stand).startswith(f"{tmp_path / 'notes.png'}: is no picture that can be read")


def test_half_an_answer_is_none(run: RunFolder):
    """Of a process that died while it printed."""
    errand = exports_of(run)
    errand.start(["--version"])
    stand = errand.wait()
    assert stand.answer.startswith("lorasmith ")
    assert answer_of(stand) is None
    assert answer_of(replace(stand, answer='{"written": ["a.safetensors"')) is None
    assert answer_of(replace(stand, answer='{"written": []}')) is None
    assert answer_of(replace(stand, answer='{"written": ["a.safetensors"], "lost": {}}')) is not None


def test_every_answer_survives_the_command_line(run: RunFolder):
    texts = ["", "true", "0.5", "[1]", '"quoted" \\ back', "a\nb\tc", "'", "{x}", "häuschen 墨 🎨", "a=b", " ends "]
    for text in texts:
        settings = tuple({"title": text, "tags": [text, "x"], "strength": 0.75, "metadata": "none"}.items())
        given = Wish(settings=settings).arguments(run)
        overrides = [value for flag, value in pairwise(given) if flag == "--set"]
        read = read_config(run.config, overrides).export
        assert (read.title, read.tags, read.strength, read.metadata) == (text, [text, "x"], 0.75, "none")


# ---------------------------------------------------------------------------------------------------------------------
# the form


def test_the_form_follows_what_was_chosen_in_compare(context: Context, run: RunFolder):
    _, page, checkpoint, note, strength, *_, seen = form_of(context, "seen", None, None, 0, None)
    assert page.visible
    assert (checkpoint.value, strength) == (4, 1.0)
    assert "Nothing was chosen in Compare" in note
    run.choose(2, 0.7)
    _, _, checkpoint, note, strength, *_, seen = form_of(context, "seen", 4, None, 0, seen)
    assert (checkpoint.value, strength) == (2, 0.7)
    assert "step 2 at strength 0.7" in note
    _, _, checkpoint, note, strength, *_ = form_of(context, "seen", 4, None, 0, seen)  # a person wants another one
    assert isinstance(checkpoint, dict)
    assert isinstance(strength, dict)
    assert "another one was chosen: step 2" in note


def test_what_has_not_changed_is_left_to_the_person(context: Context):
    *_, seen = form_of(context, "seen", None, None, 0, None)
    *shown, again = form_of(context, "seen", 4, None, 0, seen)
    assert again == seen
    assert all(value == {"__type__": "update"} for value in shown)


def test_without_a_run_or_a_checkpoint_the_page_says_so(context: Context, run: RunFolder):
    assert "There is no run to share yet" in form_of(context, None, None, None, 0, None)[0]
    shutil.rmtree(run.checkpoints)
    assert "no checkpoint yet" in form_of(context, "seen", None, None, 0, None)[0]


def test_a_configuration_that_cannot_be_read_is_told_in_the_page(context: Context, run: RunFolder):
    run.config.write_text("adapter = 3", encoding="utf-8")
    told, page, *_, seen = form_of(context, "seen", None, None, 0, None)
    assert "adapter" in told
    assert page.visible is False
    assert form_of(context, "seen", None, None, 0, seen)[0] == gr.skip()


def test_a_run_has_the_author_of_the_last_one(context: Context, run: RunFolder):
    assert remembered(context.runs, "author") == ""
    remember(context.runs, "author", "Ann")
    assert "Ann" in form_of(context, "seen", None, None, 0, None)
    (context.runs / ".share.json").write_text("torn")
    assert remembered(context.runs, "author") == ""


def test_an_empty_license_is_that_of_the_base(context: Context):
    license = form_of(context, "seen", None, None, 0, None)[8]
    assert license.info.startswith("Empty: Apache License 2.0, that of the base")


ANSWERS = [4, 0.8, ["kohya"], "fp16", False, " T ", "A", "", "", "a, ,b", "safe", None, None, 1.0]


def test_the_answers_are_a_wish(run: RunFolder):
    wish = wish_of(run, ANSWERS)
    assert (wish.step, wish.formats, wish.bake, wish.merged, wish.thumbnail) == (4, ("kohya",), 0, 1.0, None)
    settings = ExportSection.model_validate(dict(wish.settings))
    assert (settings.title, settings.strength, settings.tags, settings.license) == ("T", 0.8, ["a", "b"], "")
    picture = "samples/step-000004/01.png"
    assert wish_of(run, [*ANSWERS[:11], picture, None, 1.0]).thumbnail == run.path / picture


@pytest.mark.parametrize(
    ("place", "answer", "message"),
    [
        (1, None, "strength"),
        (1, 0, "strength"),
        (2, [], "no format"),
        (11, "config.toml", "none of"),
        (13, 0, "leaves"),
    ],
)
def test_an_answer_that_makes_no_sense_is_told(run: RunFolder, place: int, answer: Any, message: str):
    with pytest.raises(UserError, match=message):
        wish_of(run, [*ANSWERS[:place], answer, *ANSWERS[place + 1 :]])


def test_pictures_of_this_checkpoint_may_stand_for_it(run: RunFolder):
    own = cell_of(run, "a", "seen step 4 at 0.7", HOSTILE)
    cell_of(run, "b", "seen step 2 at 0.7")
    cell_of(run, "c", "none")  # the untouched base
    (run.path / "compare/wall-0123456789abcdef.png").write_bytes(own.read_bytes())
    (run.path / "compare/ffffffffffffffff.png").write_bytes(b"torn")
    covers = covers_of(run, 4)
    assert [cover.file.relative_to(run.path).as_posix() for cover in covers] == [
        *("samples/step-000004/00.png", "samples/step-000004/01.png"),
        own.relative_to(run.path).as_posix(),
    ]
    assert [cover.label[:12] for cover in covers] == ["Preview 1: t", "Preview 2: e", "Wall at 0.7:"]
    css = pictures_css(run, covers, "choices")
    assert css.count('url("/pictures/seen/') == 3
    assert "alert" not in css


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_the_size_that_is_expected_is_the_size_that_comes(context: Context, run: RunFolder, precision: str):
    written = export_of(context, "seen", 0, ("kohya",), precision)["written"]
    size = Path(written[0]).stat().st_size
    assert expected_size(run, run.read_config(), 4, precision) == pytest.approx(size, rel=0.05)


def test_a_size_that_cannot_be_known_is_not_invented(run: RunFolder):
    config = run.read_config()
    half = expected_size(run, config, 4, "fp16", bake=config.adapter.rank // 2)
    assert half and half < 0.6 * (expected_size(run, config, 4, "fp16") or 0)  # noqa: PT018
    config.adapter.kind = "full"
    known = (run.exports / "seen.safetensors").stat().st_size
    assert expected_size(run, config, 4, "fp32") == 2 * known
    assert expected_size(run, config, 4, "fp32", bake=4) is None
    (run.exports / "seen.safetensors").unlink()
    assert expected_size(run, config, 4, "fp32") is None


# ---------------------------------------------------------------------------------------------------------------------
# what is shown of the files


def test_each_file_is_shown_with_the_names_it_goes_by(run: RunFolder):
    file = run.exports / "seen.safetensors"
    names = names_of(file)
    assert names
    report = json.loads((run.exports / "seen-verified.json").read_text(encoding="utf-8"))["files"][0]
    assert (names.sha256, names.autov2) == (report["hashes"]["sha256"], report["hashes"]["autov2"])
    assert names.model_hash == report["hashes"]["tensors"]
    shown = Elements(files_html(run))
    for text in (str(file), names.sha256, names.autov2, names.model_hash, size_in_words(file.stat().st_size)):
        assert text in shown.words
    links = [link["href"] for link in shown.all("a")]
    assert links[0] == "/exports/seen/exports/seen.safetensors"
    assert len(links) == len(files_of(run)) == 7
    assert [found.name for found in weights_of(run)] == ["seen.safetensors", "seen-diffusers.safetensors"]


def test_only_files_to_share_are_shown(run: RunFolder):
    before = files_of(run)
    (run.exports / ".seen-diffusers.1.tmp").mkdir()
    for name in ("x.unverified.safetensors", "x.safetensors.rejected", ".seen-diffusers.1.tmp/a.json", ".x.log"):
        (run.exports / name).touch()
    assert files_of(run) == before


def test_each_client_is_told_with_the_reason(run: RunFolder):
    shown = verified_html(run)
    assert "Loaded back and compared with the trained model: largest difference" in shown
    assert "✓ does what was trained" in shown
    assert "it finds 68 of 68 layers" in shown
    assert "the file was changed" not in shown
    with (run.exports / "seen.safetensors").open("ab") as file:
        file.write(b"more")
    assert "the file was changed since it was verified" in verified_html(run)
    (run.exports / "seen.safetensors").unlink()
    assert "the file was changed" not in verified_html(run)


@pytest.mark.parametrize("torn", ["", "{", "[]", '{"files": [{}]}', '{"files": [{"file": "seen.safetensors"}]}'])
def test_a_report_that_cannot_be_read_is_told(run: RunFolder, torn: str):
    (run.exports / "seen-verified.json").write_text(torn, encoding="utf-8")
    assert "it cannot be read, so nothing is known of its files" in verified_html(run)


@pytest.mark.parametrize("torn", ["", "[]", "{}", '{"pid": 1}'])
def test_an_errand_whose_process_is_not_known_is_none(tmp_path: Path, torn: str):
    (tmp_path / "process.json").write_text(torn, encoding="utf-8")
    assert Errand(tmp_path, "an export").stand() == Stand("none")


def test_the_largest_difference_is_a_share():
    answers = {"unet": {"error": 0.0001}, "text_encoder": {"error": 0.002}}
    found = {"weight_error": 0.00031, "weight_tolerance": 0.002, "answers": answers, "answer_tolerance": 0.01}
    assert "0.031 % of a layer's change (0.2 % is allowed), and 0.2 % of what" in compared(found)
    assert compared(None) == "It was not compared with the trained model."


def test_sizes_have_units():
    assert [size_in_words(count) for count in (12, 1500, 2_340_000, 6_900_000_000)] == [
        *("12 bytes", "1.5 kB", "2.3 MB", "6,900.0 MB"),
    ]


def test_a_card_is_shown_with_its_pictures_and_nothing_of_others(run: RunFolder):
    card = run.exports / "seen.md"
    text = card.read_text(encoding="utf-8").replace("# seen", f"# {HOSTILE}")
    text += f"\n![mine](seen-grid.png) ![theirs](https://example.com/a.png) ![up](../samples/a.png)\n\n{HOSTILE}\n\n"
    text += "[link](javascript:alert(5)) <iframe src='//example.com'></iframe>\n\n| a |\n| --- |\n| <b>x</b> |\n"
    card.write_text(text, encoding="utf-8")
    shown = Elements(card_html(run, card))
    assert {tag for tag, _ in shown.found} <= {
        *("article", "h3", "p", "ul", "li", "strong", "code", "pre", "table", "thead", "tbody", "tr", "th", "td"),
        *("div", "figure", "figcaption", "img", "caption", "a"),
    }
    assert [str(img["src"]).partition("?")[0] for img in shown.all("img")] == [
        *("/pictures/seen/exports/seen.png", "/pictures/seen/exports/seen-grid.png"),
    ]
    assert not [name for _, attributes in shown.found for name in attributes if name.startswith("on")]
    assert all(str(link["href"]).startswith("https://") for link in shown.all("a"))
    assert "<script>alert(1)</script>" in shown.words
    assert "[theirs]" in shown.words
    assert "[up]" in shown.words


def test_the_head_of_a_card_is_read_as_it_was_written():
    head, text = parts_of('---\nlicense: "mit"\ntags: ["a", "b"]\nmine: as I like\n---\n\n# Title\n')
    assert head == {"license": "mit", "tags": ["a", "b"], "mine": "as I like"}
    assert text.strip() == "# Title"
    assert parts_of("# Title") == ({}, "# Title")


# ---------------------------------------------------------------------------------------------------------------------
# where they go


@pytest.mark.parametrize(
    ("there", "whole", "target"),
    [
        *[("models/Lora", False, "models/Lora"), ("models/loras", False, "models/loras"), ("x", False, ".")],
        *[("models/Stable-diffusion", True, "models/Stable-diffusion"), ("models/Lora", True, ".")],
    ],
)
def test_a_file_goes_where_the_program_looks_for_it(
    run: RunFolder, tmp_path: Path, there: str, whole: bool, target: str
):
    program = tmp_path / "program"
    (program / there).mkdir(parents=True)
    file = run.exports / "seen.safetensors"
    copies = copy_to(file, program, whole_model=whole)
    assert [copy.relative_to(program / target).as_posix() for copy in copies] == [
        *("seen.safetensors", "seen.png", "seen.json"),
    ]
    assert all(copy.read_bytes() == (run.exports / copy.name).read_bytes() for copy in copies)
    assert copy_to(file, program, companions=False, whole_model=whole) == copies[:1]  # it is there already


def test_another_file_of_that_name_stays(run: RunFolder, tmp_path: Path):
    (tmp_path / "seen.png").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"another file of the name seen\.png"):
        copy_to(run.exports / "seen.safetensors", tmp_path)
    assert (tmp_path / "seen.png").read_bytes() == b"mine"
    assert not (tmp_path / "seen.safetensors").exists()
    with pytest.raises(UserError, match="there is no such folder"):
        copy_to(run.exports / "seen.safetensors", tmp_path / "nowhere")


@pytest.fixture
def bundle(run: RunFolder) -> Path:
    path = run.exports / "seen.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("README.md", "---\nlicense: mit\n---\n\n# Seen\n")
        archive.writestr("SHA256SUMS", "")
    return path


def test_publishing_tells_first_what_it_will_send(bundle: Path):
    shown = Elements(contents_html(bundle)).words
    assert "What is uploaded: 2 files" in shown
    assert "README.md" in shown
    assert "There is no bundle yet" in contents_html(None)


def test_what_is_published_arrives_and_the_token_is_nowhere_on_the_disk(
    run: RunFolder,
    bundle: Path,
    hub: FakeHub,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    publish(run, bundle, " owner/style ", True, False, f" {TOKEN}\n")
    stand = uploads_of(run).wait()
    assert f"{hub.url}/owner/style" in upload_html(stand), stand
    assert hub.private["owner/style"]
    with zipfile.ZipFile(io.BytesIO(bundle.read_bytes())) as archive:
        assert hub.repos["owner/style"]["README.md"] == archive.read("README.md")
    written = b"".join(file.read_bytes() for file in run.path.parent.rglob("*") if file.is_file())
    assert TOKEN.encode() not in written
    assert TOKEN not in os.environ.values()


def test_an_upload_that_is_refused_says_why(run: RunFolder, bundle: Path, hub: FakeHub, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    publish(run, bundle, "owner/style", False, False, "hf_wrong")
    shown = upload_html(uploads_of(run).wait())
    assert "the upload failed" in shown
    assert "does not know the token" in shown
    assert not hub.repos


@pytest.mark.parametrize(("repo", "token", "message"), [("", TOKEN, "no repository"), ("a/b", " ", "no token")])
def test_nothing_is_sent_without_a_name_and_a_token(run: RunFolder, bundle: Path, repo: str, token: str, message: str):
    with pytest.raises(UserError, match=message):
        publish(run, bundle, repo, True, False, token)
    assert uploads_of(run).stand().state == "none"
    assert upload_html(uploads_of(run).stand()) == ""
