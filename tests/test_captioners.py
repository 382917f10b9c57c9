"""Captions written by machines: small models of the real classes fill real folders, through the command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from transformers import (
    BartTokenizer,
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipProcessor,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from lorasmith.datasets.captioners import Choice, Tag, TagRules, choose, on_square, tags_of, without_araf
from lorasmith.datasets.filling import fill, with_prefix
from lorasmith.datasets.folder import look, scan
from lorasmith.datasets.images import read_rgb
from lorasmith.datasets.machine import RECORD, append, entry_of, read_record, wrote
from lorasmith.trainer import cli
from lorasmith.trainer.errors import LorasmithError, UserError
from lorasmith.trainer.events import Event, Phase

from .conftest import draw_picture

SIDE = 16
TAGS = [("general", 9), ("red_picture", 0), ("green_picture", 0), ("blue_picture", 0), (">_<", 0), ("ruby_(gem)", 4)]
SEES = np.array(
    [[0, 0.05, 0, 0, 0.01, 0.04], [0, 0, 0.05, 0, 0.01, 0], [0, 0, 0, 0.05, 0.01, 0.02]]
)  # red, green, blue
STARTS = np.array([9.0, -6.4, -6.4, -6.4, -5.0, -13.2])
"""The tagger's probabilities are sigmoid(mean colour @ SEES + STARTS)."""

Lorasmith = Callable[..., Any]


# ---------------------------------------------------------------------------------------------------------------------
# models


@pytest.fixture(scope="session")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tagger(tmp_path_factory.mktemp("models") / "tagger")


def make_tagger(folder: Path, batch: int | str = "batch") -> Path:
    """SmilingWolf's layout: pixels (batch, side, side, 3) blue first to probabilities, here of mean colours."""
    folder.mkdir()
    nodes = [
        helper.make_node("ReduceMean", ["pixels"], ["means"], axes=[1, 2], keepdims=0),
        helper.make_node("Gemm", ["means", "sees", "starts"], ["logits"]),
        helper.make_node("Sigmoid", ["logits"], ["probabilities"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tagger",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [batch, SIDE, SIDE, 3])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, [batch, len(TAGS)])],
        [
            helper.make_tensor("sees", TensorProto.FLOAT, SEES.shape, SEES[::-1].flatten().tolist()),
            helper.make_tensor("starts", TensorProto.FLOAT, STARTS.shape, STARTS.tolist()),
        ],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), folder / "model.onnx"
    )
    rows = [f"{number},{name},{category},1" for number, (name, category) in enumerate(TAGS)]
    (folder / "selected_tags.csv").write_text("\n".join(["tag_id,name,category,count", *rows]), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "blip"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "the", "red", "blue", "cat", "dog", "on", "mat"]
    torch.manual_seed(0)
    text = _SMALL | {"vocab_size": len(words) + 1, "bos_token_id": len(words), "sep_token_id": 3, "pad_token_id": 0}
    vision = _SMALL | {"image_size": 32, "patch_size": 16, "initializer_range": 0.5}
    config = BlipConfig(text_config=text | {"eos_token_id": 3}, vision_config=vision, image_text_hidden_size=16)
    BlipForConditionalGeneration(config).save_pretrained(folder)
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


_SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "projection_dim": 16,
}


@pytest.fixture(scope="session")
def florence2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "florence2"
    letters = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<image>", *map(chr, range(33, 127)), "Ġ"]
    vocab: Any = {letter: number for number, letter in enumerate(letters)}
    tokenizer = BartTokenizer(vocab=vocab, merges=[], extra_special_tokens={"image_token": "<image>"})
    text = {
        "model_type": "bart",
        "vocab_size": len(letters),
        "d_model": 16,
        "max_position_embeddings": 400,
        **{f"{part}_layers": 1 for part in ("encoder", "decoder")},
        **{f"{part}_attention_heads": 2 for part in ("encoder", "decoder")},
        **{f"{part}_ffn_dim": 16 for part in ("encoder", "decoder")},
    }
    vision = {
        "depths": (1, 1),
        "patch_size": (7, 3),
        "patch_stride": (4, 2),
        "patch_padding": (3, 1),
        "patch_prenorm": (False, True),
        "embed_dim": (8, 16),
        "num_heads": (2, 2),
        "num_groups": (2, 2),
        "window_size": 4,
        "projection_dim": 16,
    }
    torch.manual_seed(0)
    config = Florence2Config(text_config=text, vision_config=vision, image_token_id=letters.index("<image>"))
    Florence2ForConditionalGeneration(config).save_pretrained(folder)
    square: Any = {"height": 32, "width": 32}
    images = CLIPImageProcessorPil(size=square, do_center_crop=False, image_seq_length=17)
    Florence2Processor(images, tokenizer, post_processor_config={"pure_text": {}}).save_pretrained(folder)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# the command


@pytest.fixture
def caption(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Lorasmith:
    """Runs `lorasmith caption` in this process; gives what it printed."""
    handler = signal.getsignal(signal.SIGINT)

    def run(folder: Path, *arguments: object, code: int = 0) -> Any:
        monkeypatch.setattr(sys, "argv", ["lorasmith", "caption", str(folder), *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        signal.signal(signal.SIGINT, handler)
        printed = capsys.readouterr()
        assert (left.value.code or 0) == code, printed.out + printed.err
        return printed

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three squares of one colour each."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for colour in ("red", "lime", "blue"):
        Image.new("RGB", (40, 40), colour).save(folder / f"{colour}.png")
    return folder


def texts(folder: Path) -> dict[str, str]:
    return {
        file.relative_to(folder).as_posix(): file.read_text(encoding="utf-8").strip()
        for file in sorted(folder.rglob("*"))
        if ".txt" in file.name or ".caption" in file.name
    }


def test_only_empty_captions_are_filled(caption: Lorasmith, tagger: Path, folder: Path):
    """Not a person's, not one from metadata; but an empty file, another suffix, and what a folder's name says."""
    (folder / "red.txt").write_text("my own words", encoding="utf-8")
    (folder / "lime.caption").write_text(" \n", encoding="utf-8")
    Image.new("RGB", (9, 9), "red").save(folder / "listed.png")
    row = {"file_name": "listed.png", "text": "from the table"}
    (folder / "metadata.jsonl").write_text(json.dumps(row), encoding="utf-8")
    (folder / "10_thing").mkdir()
    Image.new("RGB", (9, 9), "red").save(folder / "10_thing/named.png")
    for suffix, colour in ((".png", "lime"), (".bmp", "blue")):
        Image.new("RGB", (9, 9), colour).save(folder / f"twin{suffix}")

    said = caption(folder, "--model", tagger).out
    assert texts(folder) == {
        "10_thing/named.txt": "red picture",
        "blue.txt": "blue picture",
        "lime.caption": "green picture",
        "red.txt": "my own words",
        "twin.bmp.txt": "blue picture",
        "twin.png.txt": "green picture",
    }
    assert "written: 5 captions by tagger (threshold=0.35 character_threshold=0.85)" in said
    assert "  blue.png: 'blue picture'" in said
    assert "left alone: 2 written by a person" in said

    items = {item.path.name: item for item in scan(folder)}
    assert {name for name, item in items.items() if item.machine} == {
        *("named.png", "blue.png", "lime.png", "twin.bmp", "twin.png")
    }
    assert items["listed.png"].caption == "from the table"


def test_an_edited_caption_is_a_persons(caption: Lorasmith, tagger: Path, folder: Path):
    caption(folder, "--model", tagger)
    assert {item.machine for item in scan(folder)} == {True}
    entry = read_record(folder)["red.txt"]
    assert (entry.model, entry.kind) == ("tagger", "wd-tagger")
    (folder / "red.txt").write_text("red picture, of a stone", encoding="utf-8")
    (folder / "blue.txt").write_text("  blue picture\r\n", encoding="utf-8")  # an editor's line break is no edit
    assert {item.path.stem: item.machine for item in scan(folder)} == {"red": False, "blue": True, "lime": True}

    said = caption(folder, "--model", tagger, "--overwrite", "machine", "--prefix", "mystyle").out
    assert texts(folder) == {
        "blue.txt": "mystyle, blue picture",
        "lime.txt": "mystyle, green picture",
        "red.txt": "red picture, of a stone",
    }
    assert "left alone: 1 written by a person" in said


def test_all_is_overwritten_and_a_persons_words_are_kept(caption: Lorasmith, tagger: Path, folder: Path):
    (folder / "red.txt").write_text("my own words\n", encoding="utf-8")
    again = [folder, "--model", tagger, "--overwrite", "all"]
    said = caption(*again).out
    assert "kept: 1 that persons had written, as copies such as red.txt.bak" in said
    assert texts(folder)["red.txt"] == "red picture"
    assert (folder / "red.txt.bak").read_text(encoding="utf-8") == "my own words\n"
    assert not look(folder).problems

    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert "left alone: 3 written by a machine" in caption(*again).out  # nothing that would come out the same
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before

    (folder / "red.txt").write_text("other words\n", encoding="utf-8")
    caption(*again)
    (folder / "red.txt").write_text("my own words\n", encoding="utf-8")
    caption(*again)
    assert texts(folder)["red.txt.bak"] == "my own words"
    assert texts(folder)["red.txt.bak2"] == "other words"
    assert len(texts(folder)) == 5


@pytest.mark.parametrize("overwrite", ["none", "machine", "all"])
def test_an_interrupted_run_goes_on_where_it_was(overwrite: Any, tagger: Path, tmp_path: Path):
    for number in range(7):
        draw_picture(number, (20 + number, 30)).save(tmp_path / f"{number}.png")
        if overwrite != "none":
            old = entry_of(f"{number}.txt", "old", "another", "blip")
            append(tmp_path, old)
            (tmp_path / f"{number}.txt").write_text("old", encoding="utf-8")

    def interrupt(event: Event) -> None:
        if isinstance(event, Phase) and event.name == "captioning" and event.done == 3:
            raise KeyboardInterrupt

    choice = choose(str(tagger), threshold=0.0, character_threshold=0.0)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path, choice, interrupt, overwrite, batch=2)
    done = {f"{number}.txt": (tmp_path / f"{number}.txt").stat().st_mtime_ns for number in range(3)}
    assert {name for name, entry in read_record(tmp_path).items() if entry.kind == "wd-tagger"} == set(done)

    filled = fill(tmp_path, choice, lambda event: None, overwrite, batch=2)
    assert [written.image.name for written in filled.written] == ["3.png", "4.png", "5.png", "6.png"]
    assert filled.left == {"machine": 3}
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in done} == done
    assert all(item.machine and item.caption != "old" for item in scan(tmp_path))
    assert not list(tmp_path.glob("*.bak*"))


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C cannot be sent to one process on Windows")
def test_ctrl_c_keeps_what_is_written(blip: Path, tmp_path: Path):
    for number in range(100):
        draw_picture(number, (32, 32)).save(tmp_path / f"{number:03d}.png")
    command = [sys.executable, "-m", "lorasmith.trainer.cli", "caption", str(tmp_path), "--model", str(blip)]
    process = subprocess.Popen([*command, "--batch", "1"], stderr=subprocess.PIPE, encoding="utf-8", env=_ENVIRONMENT)
    end = time.monotonic() + 240
    while not (tmp_path / "002.txt").exists():
        assert time.monotonic() < end, "no caption was written"
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130
    assert "interrupted\nWhat is written stays; the same command goes on from there." in said
    assert "Traceback" not in said
    found = look(tmp_path)
    assert not found.problems
    assert {item.machine for item in found.items if item.caption} == {True}
    assert 3 <= sum(bool(item.caption) for item in found.items) < 100
    assert not [file for file in tmp_path.iterdir() if file.name.endswith(".tmp")]


_ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::UserWarning", "PYTHONUNBUFFERED": "1"}


def test_an_unreadable_image_is_named_and_the_others_are_captioned(caption: Lorasmith, tagger: Path, folder: Path):
    (folder / "broken.png").write_bytes(b"this is no picture")
    printed = caption(folder, "--model", tagger, code=1)
    assert "warning: " in printed.err
    assert f"skipped: {folder / 'broken.png'}: cannot be read as an image" in printed.out
    assert sorted(texts(folder)) == ["blue.txt", "lime.txt", "red.txt"]

    facts = json.loads(caption(folder, "--model", tagger, "--json", code=1).out)
    assert (facts["written"], facts["left"]) == ([], {"machine": 3})
    assert [problem["where"] for problem in facts["skipped"]] == [str(folder / "broken.png")]


def test_an_image_that_breaks_while_the_model_runs_is_named(tagger: Path, folder: Path):
    def breaks(event: Event) -> None:
        if isinstance(event, Phase) and event.name.startswith("loading"):
            (folder / "lime.png").write_bytes(b"")

    filled = fill(folder, choose(str(tagger)), breaks)
    assert [problem.where for problem in filled.skipped] == [str(folder / "lime.png")]
    assert sorted(texts(folder)) == ["blue.txt", "red.txt"]


def test_what_a_person_writes_while_the_model_runs_is_kept(tagger: Path, folder: Path):
    def writes(event: Event) -> None:
        if isinstance(event, Phase) and event.name.startswith("loading"):
            (folder / "lime.txt").write_text("quick", encoding="utf-8")

    filled = fill(folder, choose(str(tagger)), writes)
    assert filled.left == {"person": 1}
    assert texts(folder) == {"blue.txt": "blue picture", "lime.txt": "quick", "red.txt": "red picture"}


@pytest.mark.parametrize("overwrite", ["none", "all"])
def test_what_may_be_a_caption_is_left_alone(overwrite: str, caption: Lorasmith, tagger: Path, folder: Path):
    """Text that is not UTF-8, captions of a kind that is not read, a row with a mistake: a person must look."""
    (folder / "red.txt").write_bytes("grün".encode("latin-1"))
    (folder / "lime.tags").write_text("a, b", encoding="utf-8")
    (folder / "sub").mkdir()
    Image.new("RGB", (9, 9), "red").save(folder / "sub/x.png")
    (folder / "sub/metadata.jsonl").write_text('{"file_name": "x.png", "text": null}', encoding="utf-8")
    said = caption(folder, "--model", tagger, "--overwrite", overwrite, code=1).out
    assert "left alone: 3 in doubt" in said
    assert "red.txt: is not UTF-8 text" in said
    assert sorted(file.name for file in folder.rglob("*.txt")) == ["blue.txt", "red.txt"]
    assert (folder / "red.txt").read_bytes() == "grün".encode("latin-1")


def test_an_empty_caption_in_a_table_is_named(caption: Lorasmith, tagger: Path, folder: Path):
    (folder / "metadata.jsonl").write_text('{"file_name": "red.png", "text": ""}', encoding="utf-8")
    said = caption(folder, "--model", tagger, code=1).out
    assert "red.png: its caption is in metadata.jsonl line 1, where none is written. Remove it from there" in said
    assert sorted(texts(folder)) == ["blue.txt", "lime.txt"]
    assert not look(folder).problems


def test_an_image_without_words_is_named(caption: Lorasmith, tagger: Path, folder: Path):
    Image.new("RGB", (9, 9), "black").save(folder / "black.png")
    said = caption(folder, "--model", tagger, "--prefix", "mystyle", code=1).out
    assert "black.png: the model found no words for it. Lower --threshold" in said
    assert "black.txt" not in texts(folder)


def test_where_nothing_is_empty_no_model_is_loaded(caption: Lorasmith, tagger: Path, folder: Path, tmp_path: Path):
    caption(folder, "--model", tagger)
    (tmp_path / "tagger").mkdir()
    (tmp_path / "tagger/selected_tags.csv").touch()
    assert "left alone: 3 written by a machine" in caption(folder, "--model", tmp_path / "tagger").out


# ---------------------------------------------------------------------------------------------------------------------
# sentences


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_blip_writes_what_transformers_would(batch: int, caption: Lorasmith, blip: Path, folder: Path):
    caption(folder, "--model", blip, "--batch", batch)
    model = BlipForConditionalGeneration.from_pretrained(blip)
    processor: Any = BlipProcessor.from_pretrained(blip)
    for name in ("red", "lime", "blue"):
        inputs = processor(images=Image.open(folder / f"{name}.png"), return_tensors="pt")
        ids = model.generate(**inputs, num_beams=3, min_length=5, max_length=75)
        assert texts(folder)[f"{name}.txt"] == processor.decode(ids[0], skip_special_tokens=True)
    assert read_record(folder)["red.txt"].settings == "style=sentence"


@pytest.mark.parametrize(
    ("style", "task"),
    [(None, "<DETAILED_CAPTION>"), ("sentence", "<CAPTION>"), ("paragraph", "<MORE_DETAILED_CAPTION>")],
)
def test_florence_2_writes_what_transformers_would(
    style: str | None, task: str, caption: Lorasmith, florence2: Path, folder: Path
):
    caption(folder, "--model", florence2, "--batch", 2, *(["--style", style] if style else []))
    model: Any = Florence2ForConditionalGeneration.from_pretrained(florence2)
    processor: Any = Florence2Processor.from_pretrained(florence2)
    for name in ("red", "lime", "blue"):
        with Image.open(folder / f"{name}.png") as picture:
            inputs = processor(text=task, images=picture, return_tensors="pt")
        ids = model.generate(**inputs, num_beams=3, max_new_tokens=256)
        said = processor.post_process_generation(processor.batch_decode(ids)[0], task=task)[task]
        assert said
        assert texts(folder)[f"{name}.txt"] == said


def test_blips_word_that_means_nothing_is_left_out():
    assert without_araf("arafed cat on a mat with araffes") == "cat on a mat with"
    assert without_araf("a giraffe and a carafe") == "a giraffe and a carafe"


def test_a_prefix_joins_like_a_trigger_or_as_it_is():
    assert with_prefix("a cat", "mystyle") == "mystyle, a cat"
    assert with_prefix("a cat, mystyle", "mystyle") == "a cat, mystyle"
    assert with_prefix("a cat", "a drawing of ") == "a drawing of a cat"
    assert with_prefix("a cat", "") == "a cat"


@pytest.mark.parametrize(
    ("batch", "fix"), [(8, "--batch: 8 pictures at once do not fit into the memory. Use --batch 4;"), (1, "cpu")]
)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_a_full_memory_is_told_with_a_smaller_batch(
    batch: int, fix: str, error: Exception, tagger: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    class Full:
        failures = (RuntimeError, MemoryError)

        def prepare(self, pictures: Sequence[Image.Image]) -> None:
            pass

        def describe(self, prepared: None) -> list[str]:
            raise error

    monkeypatch.setattr(Choice, "load", lambda choice, device: Full())
    with pytest.raises(LorasmithError) as told:
        fill(folder, choose(str(tagger)), lambda event: None, batch=batch)
    assert fix in str(told.value)
    assert told.value.exit_code == 1


# ---------------------------------------------------------------------------------------------------------------------
# tags


def test_tags_follow_thresholds_and_wishes(caption: Lorasmith, tagger: Path, folder: Path):
    for picture in folder.iterdir():
        picture.unlink()
    Image.new("RGB", (40, 40), (255, 120, 255)).save(folder / "mixed.png")
    probability = dict(zip([name for name, _ in TAGS], _sigmoid((255, 120, 255)), strict=True))
    assert 0.35 < probability["green_picture"] < 0.5 < probability[">_<"] < 0.85 < probability["ruby_(gem)"] < 0.9

    said: dict[str, str] = {}
    wishes: dict[str, list[str]] = {
        "plain": [],
        "strict": ["--threshold", "0.5"],
        "strict with names": ["--threshold", "0.5", "--character-threshold", "0.95"],
        "two": ["--max-tags", "2"],
        "others": ["--exclude-tags", "Red_Picture, >_<,"],
    }
    for name, arguments in wishes.items():
        caption(folder, "--model", tagger, "--overwrite", "machine", *arguments)
        said[name] = texts(folder)["mixed.txt"]
    assert said == {
        "plain": "red picture, blue picture, ruby (gem), >_<, green picture",
        "strict": "red picture, blue picture, ruby (gem), >_<",
        "strict with names": "red picture, blue picture, >_<",
        "two": "red picture, blue picture",
        "others": "blue picture, ruby (gem), green picture",
    }


def _sigmoid(colour: tuple[float, float, float]) -> np.ndarray:
    return 1 / (1 + np.exp(-(np.array(colour) @ SEES + STARTS)))


def test_pixels_are_as_the_taggers_author_makes_them(tagger: Path):
    """On a white square, bicubic, blue first, 0 to 255."""
    picture = draw_picture(3, (50, 21))
    captioner = choose(str(tagger)).load()
    [pixels] = captioner.prepare([picture])
    ground = np.full((50, 50, 3), 255, np.uint8)
    ground[14:35] = np.asarray(picture)
    expected = np.asarray(Image.fromarray(ground).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    assert pixels.dtype == np.float32
    assert np.array_equal(pixels, expected[:, :, ::-1].astype(np.float32))
    assert np.array_equal(np.asarray(on_square(draw_picture(1, (16, 16)), 16)), np.asarray(draw_picture(1, (16, 16))))


@pytest.mark.parametrize("fixed", ["batch", 1, 3])
def test_a_batch_says_what_each_picture_would_alone(fixed: int | str, tmp_path: Path):
    captioner: Any = choose(str(make_tagger(tmp_path / "tagger", fixed)), threshold=0.1).load()
    pictures = [draw_picture(number, (30 + 7 * number, 60 - 5 * number)) for number in range(8)]
    together = captioner.describe(captioner.prepare(pictures))
    alone = [captioner.describe(captioner.prepare([picture]))[0] for picture in pictures]
    assert together == alone
    assert len(set(alone)) > 1


def test_transparent_and_turned_pictures_are_seen_as_trained(caption: Lorasmith, tagger: Path, tmp_path: Path):
    """What is transparent is white, whatever colour lies under it."""
    under = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    under.save(tmp_path / "a.png")
    caption(tmp_path, "--model", tagger)
    expected = tags_of(_sigmoid((255, 255, 255)), [Tag(*tag) for tag in TAGS], TagRules())
    assert texts(tmp_path)["a.txt"] == ", ".join(expected)
    assert read_rgb(tmp_path / "a.png")[0].getpixel((0, 0)) == (255, 255, 255)


# ---------------------------------------------------------------------------------------------------------------------
# mistakes


def offline(folder: Path, *arguments: object, cache: Path, code: int = 0, before: str = "pass") -> str:
    """The command in a process without the Hub; gives what it said on stderr."""
    program = f"import sys; {before}; from lorasmith.trainer.cli import main; main()"
    environment = _ENVIRONMENT | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cache), "HF_HUB_CACHE": str(cache)}
    command = [sys.executable, "-c", program, "caption", str(folder), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize("model", ["blip", "wd-tagger", "some/model"])
def test_without_the_hub_one_error_says_what_to_do(model: str, folder: Path, tmp_path: Path):
    said = offline(folder, "--model", model, cache=tmp_path / "cache", code=2)
    assert said.startswith("error: --model: ")
    assert "nor in the cache, and the Hugging Face Hub cannot be reached. Check the name and the connection" in said
    assert len(said.splitlines()) == 1
    assert texts(folder) == {}


@pytest.mark.parametrize("kind", ["blip", "tagger"])
def test_what_is_in_the_cache_is_used_without_the_hub(
    kind: str, folder: Path, tmp_path: Path, request: pytest.FixtureRequest
):
    model = tmp_path / "cache/models--some--model"
    commit = "0" * 40
    (model / "refs").mkdir(parents=True)
    (model / "refs/main").write_text(commit)
    (model / "snapshots").mkdir()
    (model / "snapshots" / commit).symlink_to(request.getfixturevalue(kind))
    offline(folder, "--model", "some/model", cache=tmp_path / "cache")
    assert read_record(folder)["red.txt"].model == "some/model"


def test_without_onnxruntime_one_error_says_what_to_install(tagger: Path, folder: Path, tmp_path: Path):
    missing = "sys.modules['onnxruntime'] = None"
    said = offline(folder, "--model", tagger, cache=tmp_path, code=2, before=missing)
    assert said.splitlines()[-1].startswith("error: --model: tagger is a tagger, and the package onnxruntime")
    assert "pip install lorasmith[captions]" in said


MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "no such folder of images": (["TAGGER"], ["nowhere", "no such folder"]),
    "no model": (["no folder"], ["--model", "no folder", "blip, florence2, wd-tagger"]),
    "no captioner": (["EMPTY"], ["--model", "none of the kinds that are known"]),
    "another kind": (["TAGGER", "--kind", "blip"], ["--kind", "wd-tagger"]),
    "a style it has not": (["TAGGER", "--style", "sentence"], ["--style", "It has tags"]),
    "tags of sentences": (["BLIP", "--threshold", "0.5"], ["--threshold", "no effect"]),
    "excluded tags of sentences": (["BLIP", "--exclude-tags", "a"], ["--exclude-tags", "no effect"]),
    "a batch of none": (["TAGGER", "--batch", "0"], ["--batch"]),
    "a threshold over 1": (["TAGGER", "--threshold", "35"], ["--threshold"]),
    "a device for tags": (["TAGGER", "--device", "mps"], ["--device", "--device cpu"]),
    "no such device": (["BLIP", "--device", "quantum"], ["--device", "quantum", "--device cpu"]),
    "a program of its own": (["REMOTE"], ["--model", "florence-community/Florence-2-base"]),
    "it answers questions": (["QUESTIONS"], ["BlipForQuestionAnswering", "no captions"]),
    "half of the weights": (["TORN"], ["--model", "cannot be loaded", "again"]),
    "weights that are missing": (["LACKING"], ["weights", "missing", "random"]),
    "no model.onnx": (["TABLE"], ["no model.onnx"]),
    "a broken model.onnx": (["BROKEN"], ["model.onnx cannot be loaded"]),
    "a broken table": (["BADTABLE"], ["selected_tags.csv line 2"]),
    "a table of another model": (["SHORT"], ["knows 6 tags, and selected_tags.csv names 5"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_clear_error_and_changes_nothing(
    mistake: str, caption: Lorasmith, tagger: Path, blip: Path, folder: Path, tmp_path: Path
):
    arguments, words = MISTAKES[mistake]
    if mistake == "no such folder of images":
        folder = folder / "nowhere"
    model = {"TAGGER": tagger, "BLIP": blip}.get(arguments[0]) or _broken(arguments[0], tagger, blip, tmp_path / "m")
    before = sorted(tmp_path.rglob("*"))
    said = caption(folder, "--model", model, *arguments[1:], code=2).err
    assert [word for word in words if word not in said] == []
    assert sorted(tmp_path.rglob("*")) == before


def _broken(what: str, tagger: Path, blip: Path, folder: Path) -> Path | str:
    """A model with a mistake; or what was given, if there is none of that name."""
    folder.mkdir()
    originals = {"TORN": blip, "LACKING": blip, "BROKEN": tagger, "BADTABLE": tagger, "SHORT": tagger, "TABLE": tagger}
    for file in originals[what].iterdir() if what in originals else []:
        (folder / file.name).write_bytes(file.read_bytes())
    table = folder / "selected_tags.csv"
    match what:
        case "EMPTY":
            pass
        case "REMOTE":
            config = {"model_type": "florence2", "auto_map": {"AutoModel": "modeling.Florence"}}
            (folder / "config.json").write_text(json.dumps(config))
        case "QUESTIONS":
            config = json.loads((blip / "config.json").read_text()) | {"architectures": ["BlipForQuestionAnswering"]}
            (folder / "config.json").write_text(json.dumps(config))
        case "TORN":
            weights = folder / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:1000])
        case "LACKING":
            from safetensors.torch import load_file, save_file

            weights = load_file(folder / "model.safetensors")
            weights.pop("vision_model.post_layernorm.weight")
            save_file(weights, folder / "model.safetensors", {"format": "pt"})
        case "TABLE":
            (folder / "model.onnx").unlink()
        case "BROKEN":
            (folder / "model.onnx").write_bytes(b"no model")
        case "BADTABLE":
            table.write_text("tag_id,name,category,count\n1,a,nought,3\n")
        case "SHORT":
            table.write_text("\n".join(table.read_text().splitlines()[:-1]))
        case _:
            return what
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# the record


def test_a_record_passes_over_torn_and_foreign_lines(tmp_path: Path):
    append(tmp_path, entry_of("a.txt", "one", "m", "blip"))
    with (tmp_path / RECORD).open("a", encoding="utf-8") as file:
        file.write('[]\n{"file": 3, "sha256": "x"}\n\n{"file": "b.txt", "sh')
    append(tmp_path, entry_of("c.txt", "three", "m", "blip", "style=sentence"))
    append(tmp_path, entry_of("a.txt", "two", "m", "blip"))
    record = read_record(tmp_path)
    assert list(record) == ["a.txt", "c.txt"]
    assert wrote(record, "a.txt", " two\n")
    assert not wrote(record, "a.txt", "one")  # the newest line counts
    assert not wrote(record, "b.txt", "")
    assert record["c.txt"].settings == "style=sentence"
    assert read_record(tmp_path / "none") == {}


def test_a_record_in_the_way_is_an_error_with_its_name(caption: Lorasmith, tagger: Path, folder: Path):
    (folder / RECORD).mkdir()
    assert RECORD in caption(folder, "--model", tagger, code=2).err
    with pytest.raises(UserError):
        choose(str(folder))
