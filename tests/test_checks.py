"""The dataset doctor: each check fires on what it is for, and stays silent on a good set; a mended copy is good."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from lorasmith.datasets import photometry
from lorasmith.datasets.checks import Examination, Finding, examine
from lorasmith.datasets.folder import look
from lorasmith.datasets.machine import append, entry_of
from lorasmith.datasets.photometry import Borders, block_steps, blur_radius, find_borders, grey, measure
from lorasmith.datasets.repair import plan_repairs, write_copy
from lorasmith.datasets.report import report, verdict
from lorasmith.datasets.tokens import is_common_word, weigh
from lorasmith.trainer.errors import DataError, UserError

from .command import lorasmith

BLUEPRINT = Path(photometry.__file__).parent / "examples" / "blueprint"
SUBJECTS = ("fox", "boat", "tower", "apple", "bicycle", "lamp", "river", "window", "horse", "bread", "guitar", "cloud")
ORIENTATION = 0x0112


@lru_cache
def photo(seed: int, size: tuple[int, int] = (640, 512)) -> Image.Image:
    """Shading, texture and sharp edges up to the margins, as photographs have them; another one for each seed."""
    draw = np.random.default_rng(seed)
    width, height = size
    picture = np.full((height, width, 3), 128.0)
    for scale, strength in ((4, 60), (16, 30), (64, 15), (256, 6)):
        noise = Image.fromarray(draw.integers(0, 256, (scale, scale, 3), np.uint8)).resize(
            size, Image.Resampling.BICUBIC
        )
        picture += (np.asarray(noise, np.float32) - 128) / 128 * strength
    image = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(12):
        x, y, wide, high = draw.integers(0, [width, height, width // 3, height // 3]).tolist()
        pen.polygon(
            [(x, y), (x + wide, y + high // 2), (x + wide // 3, y + high)], tuple(draw.integers(20, 236, 3).tolist())
        )
    return image


def recoded(image: Image.Image, quality: int, folder: Path) -> Image.Image:
    image.save(folder / "recoded.jpg", quality=quality)
    with Image.open(folder / "recoded.jpg") as file:
        return file.convert("RGB")


@dataclass(frozen=True)
class Set:
    """A folder under test."""

    folder: Path

    def add(self, name: str, image: Image.Image, caption: str | None = None, **save: Any) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, **save)
        if caption is not None:
            path.with_suffix(".txt").write_text(caption, encoding="utf-8")
        return path

    def found(self, check: str, **settings: Any) -> list[Finding]:
        return [finding for finding in examine(self.folder, **settings).findings if finding.check == check]


@pytest.fixture(scope="module")
def good_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight different pictures with a caption each, in which there is nothing to mend."""
    images = Set(tmp_path_factory.mktemp("made") / "good")
    for number, subject in enumerate(SUBJECTS[:8]):
        caption = f"a {subject} in the morning" if number % 2 else f"a green {subject}"
        images.add(f"{number}.png", photo(number), caption)
    return images.folder


@pytest.fixture
def good(good_files: Path, tmp_path: Path) -> Set:
    """A copy of them, to add what is bad."""
    return Set(shutil.copytree(good_files, tmp_path / "good"))


@pytest.fixture
def empty(tmp_path: Path) -> Set:
    (tmp_path / "set").mkdir()
    return Set(tmp_path / "set")


def captioned(images: Set, captions: Sequence[str]) -> Set:
    """Small pictures with these captions."""
    for number, caption in enumerate(captions):
        images.add(f"{number:02d}.png", photo(number, (64, 64)), caption)
    return images


# ---------------------------------------------------------------------------------------------------------------------
# good sets


def test_a_good_set_is_left_in_peace(good: Set):
    examination = examine(good.folder)
    assert examination.findings == []
    assert not examination.is_blocked
    assert verdict(examination) == "verdict: nothing to mend."


def test_of_the_shipped_set_only_its_size_is_remarked(tmp_path: Path):
    assert examine(BLUEPRINT, resolution=256).findings == []
    findings = examine(BLUEPRINT, resolution=512).findings
    assert {finding.check for finding in findings} == {"too small"}
    assert len(findings) == 32


def test_the_worker_processes_can_be_given_the_measuring(good: Set):
    assert pickle.loads(pickle.dumps(measure)) is measure
    measures = measure(good.folder / "0.png")
    assert pickle.loads(pickle.dumps(measures)) == measures
    assert len(pickle.dumps(measures)) < 4000


def test_a_folder_that_does_not_exist_and_a_file_are_usage_errors(tmp_path: Path):
    with pytest.raises(UserError, match="no such folder"):
        examine(tmp_path / "gone")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="not a folder"):
        examine(tmp_path / "file")


def test_a_file_that_goes_while_it_is_looked_at_is_named(good: Set):
    with pytest.raises(DataError) as caught:
        measure(good.folder / "gone.png")
    assert "gone.png" in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# files


def test_what_the_reader_refuses_blocks(good: Set):
    whole = (good.folder / "0.png").read_bytes()
    (good.folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (good.folder / "nothing.jpg").touch()
    (good.folder / "deep").mkdir()
    (good.folder / "deep" / "orphan.txt").write_text("a caption")
    examination = examine(good.folder)
    assert examination.is_blocked
    findings = {finding.where: finding for finding in examination.findings}
    assert set(findings) == {"cut.png", "nothing.jpg", "deep/orphan.txt"}
    assert {finding.severity for finding in findings.values()} == {"error"}
    assert "truncated" in findings["cut.png"].what
    assert all(finding.fix for finding in findings.values())


def test_an_empty_folder_blocks(empty: Set):
    examination = examine(empty.folder)
    assert [(f.check, f.severity, f.where) for f in examination.findings] == [("unusable", "error", str(empty.folder))]


def test_sizes_that_training_refuses_block(good: Set):
    good.add("dot.png", photo(20, (15, 300)), "a dot")
    good.add("line.png", photo(21, (40, 700)), "a line")
    assert {f.where for f in good.found("unusable")} == {"dot.png", "line.png"}


@pytest.mark.parametrize(("size", "fires"), [((512, 512), False), ((480, 480), False), ((460, 460), True)])
def test_small_images_are_named_with_the_factor(empty: Set, size: tuple[int, int], fires: bool):
    empty.add("a.png", photo(1, size), "a caption")
    assert bool(empty.found("too small")) is fires


def test_the_size_counts_for_the_resolution_that_was_asked_for(empty: Set):
    empty.add("a.png", photo(1, (512, 512)), "a caption")
    (finding,) = empty.found("too small", resolution=1024)
    assert "512 x 512" in finding.what
    assert "2 times" in finding.what
    assert "data.resolution = 512" in finding.fix


def test_what_reading_does_is_noted(good: Set):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    good.add("turned.png", photo(20), "a turned one", exif=exif)
    clear = photo(21).convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    good.add("clear.png", clear, "a clear one")
    good.add("grey.png", photo(22).convert("L"), "a grey one")
    notes = {f.where: f for f in examine(good.folder).findings if f.severity == "note"}
    assert {name: note.check for name, note in notes.items()} == {
        "turned.png": "rotated",
        "clear.png": "transparent",
        "grey.png": "converted",
    }
    assert "orientation 6" in notes["turned.png"].what


# ---------------------------------------------------------------------------------------------------------------------
# duplicates


def test_equal_files_are_one_finding(good: Set):
    for copy in ("copy 1.png", "sub/copy 2.png"):
        path = good.add(copy, photo(0), f"another {copy[-5]}")
        path.write_bytes((good.folder / "0.png").read_bytes())
    (finding,) = good.found("same file")
    assert finding.where == "0.png"
    assert "copy 1.png, sub/copy 2.png" in finding.what
    assert "3 times" in finding.what
    assert good.found("same picture") == []


def test_altered_copies_are_one_finding_that_names_the_largest(good: Set, tmp_path: Path):
    original = photo(0)
    good.add("half.png", original.resize((320, 256)), "a")
    good.add("coarse.jpg", original, "b", quality=40)
    good.add("bright.png", ImageEnhance.Brightness(original).enhance(1.15), "c")
    good.add("big.png", original.resize((1280, 1024), Image.Resampling.BICUBIC), "d")
    good.add("barred.png", ImageOps.expand(original, (0, 60), "black"), "e")
    (finding,) = good.found("same picture")
    assert finding.where == "big.png"
    assert all(name in finding.what for name in ("0.png", "half.png", "coarse.jpg", "bright.png", "barred.png"))


def face(mouth: tuple[int, int]) -> Image.Image:
    image = Image.new("RGB", (512, 512), "white")
    pen = ImageDraw.Draw(image)
    pen.ellipse((40, 40, 472, 472), "gold")
    for x in (150, 310):
        pen.ellipse((x, 160, x + 50, 230), "black")
    pen.arc((150, 260, 360, 400), *mouth, "black", 22)
    return image


def test_a_face_that_smiles_is_another_picture(empty: Set):
    for name, mouth in (("smiles", (20, 160)), ("frowns", (200, 340))):
        empty.add(f"{name}.png", face(mouth), f"a face that {name}")
    assert empty.found("same picture") == []


def test_one_shape_in_two_colours_is_two_pictures(empty: Set):
    for colour in ("red", "blue", "green"):
        image = Image.new("RGB", (512, 512), "white")
        ImageDraw.Draw(image).ellipse((100, 100, 400, 420), colour)
        empty.add(f"{colour}.png", image, f"a {colour} ball")
    assert empty.found("same picture") == []


# ---------------------------------------------------------------------------------------------------------------------
# blur


def flat_illustration() -> Image.Image:
    image = Image.new("RGB", (512, 512), (240, 230, 200))
    pen = ImageDraw.Draw(image)
    pen.ellipse((120, 140, 390, 400), (200, 80, 60))
    pen.rectangle((240, 60, 260, 150), (60, 120, 60))
    return image


def out_of_focus_behind() -> Image.Image:
    """A sharp subject before a soft background, as portraits have it."""
    image, mask = photo(3), Image.new("L", (640, 512))
    ImageDraw.Draw(mask).ellipse((240, 180, 400, 380), 255)
    return Image.composite(image, image.filter(ImageFilter.GaussianBlur(6)), mask)


@pytest.mark.parametrize("radius", [2.5, 4.0])
@pytest.mark.parametrize("image", [photo(1), photo(2, (900, 1400)), flat_illustration()], ids=["photo", "tall", "flat"])
def test_blurred_pictures_are_named(good: Set, image: Image.Image, radius: float):
    scale = min(image.size) / 512
    good.add("soft.png", image.filter(ImageFilter.GaussianBlur(radius * scale)), "a soft one")
    assert [f.where for f in good.found("blurred")] == ["soft.png"]


def test_the_radius_that_is_told_is_that_of_the_blur():
    edge = Image.new("L", (256, 256))
    edge.paste(200, (100, 0, 256, 256))
    for radius in (1.5, 2.0, 3.0):
        found = blur_radius(grey(edge.filter(ImageFilter.GaussianBlur(radius))))
        assert found == pytest.approx(radius, rel=0.35)


@pytest.mark.parametrize(
    "image",
    [flat_illustration(), out_of_focus_behind(), Image.new("RGB", (512, 512), "teal"), photo(4, (96, 96))],
    ids=["flat illustration", "background out of focus", "one colour", "small"],
)
def test_what_only_seems_blurred_is_not_named(good: Set, image: Image.Image):
    good.add("sharp.png", image, "a sharp one")
    assert good.found("blurred") == []


def test_without_edges_there_is_no_judgement():
    assert blur_radius(grey(Image.linear_gradient("L").resize((512, 512)))) is None
    assert blur_radius(np.zeros((8, 8), np.float32)) is None


def test_where_all_is_soft_it_is_the_style(empty: Set):
    for number in range(5):
        empty.add(f"{number}.png", photo(number).filter(ImageFilter.GaussianBlur(3)), f"a {SUBJECTS[number]}")
    (finding,) = empty.found("blurred")
    assert (finding.severity, finding.where) == ("note", str(empty.folder))


# ---------------------------------------------------------------------------------------------------------------------
# JPEG blocks


def test_strong_compression_is_seen(good: Set):
    good.add("coarse.jpg", photo(20), "a coarse one", quality=8)
    assert [f.where for f in good.found("JPEG blocks")] == ["coarse.jpg"]


def test_a_png_that_was_a_jpeg_is_seen_wherever_it_was_cropped(good: Set, tmp_path: Path):
    once = recoded(photo(20), 8, tmp_path).crop((3, 5, 600, 480))
    good.add("once.png", once, "a coarse one")
    assert [f.where for f in good.found("JPEG blocks")] == ["once.png"]


def pixel_art() -> Image.Image:
    cells = np.random.default_rng(5).integers(0, 256, (64, 80, 3), np.uint8)
    return Image.fromarray(cells).resize((640, 512), Image.Resampling.NEAREST)


@pytest.mark.parametrize("image", [pixel_art(), photo(3), flat_illustration()], ids=["pixel art", "photo", "flat"])
@pytest.mark.parametrize("quality", [None, 75, 95])
def test_what_has_no_blocks_to_speak_of_is_left_in_peace(image: Image.Image, quality: int | None, tmp_path: Path):
    image = image if quality is None else recoded(image, quality, tmp_path)
    assert block_steps(grey(image)) < 1.2


def test_a_picture_of_a_few_pixels_has_no_blocks():
    assert block_steps(np.zeros((5, 400), np.float32)) == 0


# ---------------------------------------------------------------------------------------------------------------------
# borders


@pytest.mark.parametrize(
    ("bars", "colour"),
    [((0, 60), "black"), ((80, 0), "black"), ((30, 30), "white"), ((0, 60, 0, 44), (12, 40, 90)), ((8, 8), "red")],
    ids=["letterbox", "pillarbox", "frame", "unequal", "thin"],
)
def test_bars_are_measured(bars: Any, colour: Any):
    image = ImageOps.expand(photo(1), bars, colour)
    left, top, right, bottom = bars if len(bars) == 4 else (*bars, *bars)
    assert find_borders(np.asarray(image)) == Borders(left, top, right, bottom)


def test_bars_are_found_in_a_jpeg_and_told_by_side(good: Set):
    good.add("film.jpg", ImageOps.expand(photo(20), (0, 64), "black"), "a still", quality=85)
    (finding,) = good.found("borders")
    assert finding.where == "film.jpg"
    assert "px top" in finding.what
    assert "px bottom" in finding.what
    assert "left" not in finding.what


def object_on(ground: str, draw: Callable[[ImageDraw.ImageDraw], None]) -> Image.Image:
    image = Image.new("RGB", (400, 400), ground)
    draw(ImageDraw.Draw(image))
    return image


@pytest.mark.parametrize(
    "image",
    [
        object_on("white", lambda pen: pen.ellipse((60, 60, 340, 340), "navy")),
        object_on("white", lambda pen: pen.rounded_rectangle((60, 60, 340, 340), 40, "navy")),
        object_on("black", lambda pen: pen.polygon([(60, 340), (200, 60), (340, 340)], "gold")),
        object_on("skyblue", lambda pen: pen.rectangle((0, 250, 400, 400), "green")),
        object_on("white", lambda pen: pen.rectangle((0, 100, 400, 400), "navy")),
        Image.new("RGB", (400, 400), "teal"),
        ImageOps.expand(photo(1), 1, "white"),
    ],
    ids=["ball", "rounded icon", "triangle", "sky and meadow", "one side", "one colour", "hairline"],
)
def test_a_plain_ground_is_no_border(image: Image.Image):
    assert not find_borders(np.asarray(image))


# ---------------------------------------------------------------------------------------------------------------------
# unlike the rest


def test_an_image_unlike_the_rest_is_named_with_what_is_unlike(good: Set):
    good.add("night.png", ImageEnhance.Brightness(photo(20)).enhance(0.15), "at night")
    (finding,) = good.found("unlike the rest")
    assert finding.where == "night.png"
    assert "much darker" in finding.what


def test_of_a_few_images_none_is_unlike_the_rest(empty: Set):
    for number in range(6):
        empty.add(f"{number}.png", photo(number), f"a {SUBJECTS[number]}")
    empty.add("night.png", ImageEnhance.Brightness(photo(20)).enhance(0.15), "at night")
    assert empty.found("unlike the rest") == []


# ---------------------------------------------------------------------------------------------------------------------
# captions


def test_images_without_words_are_named(good: Set):
    good.add("bare.png", photo(20))
    good.add("blank.png", photo(21), " \n")
    found = {f.where: f.what for f in good.found("no caption")}
    assert found == {"bare.png": "has no caption", "blank.png": "its caption in blank.txt is empty"}


@pytest.mark.parametrize(("trigger", "severity"), [("", "warning"), ("mystyle", "note")])
def test_a_set_without_any_captions_is_one_finding(empty: Set, trigger: str, severity: str):
    for number in range(4):
        empty.add(f"{number}.png", photo(number))
    (finding,) = empty.found("no caption", trigger=trigger)
    assert finding.severity == severity
    assert "none of the 4 images" in finding.what


def test_one_caption_for_many_images_is_named(empty: Set):
    captioned(empty, ["a cat", "a cat", "a cat", "a dog", "a dog", "a fish"])
    (finding,) = empty.found("same caption")
    assert "3 of 6 images have the caption 'a cat'" in finding.what
    assert "00.png, 01.png, 02.png" in finding.what


def test_a_folders_name_for_all_is_named(empty: Set):
    for number in range(3):
        empty.add(f"10_cats/{number}.png", photo(number))
    (finding,) = empty.found("same caption")
    assert "the folder's name" in finding.what


def test_long_captions_are_counted_in_tokens_and_chunks(empty: Set):
    long = ", ".join(f"a {subject} and a {other}" for subject in SUBJECTS[:6] for other in SUBJECTS[6:9])
    captioned(empty, ["a cat", long, f"{long}, {long}"])
    examination = examine(empty.folder)
    assert examination.tokens.captions == 3
    assert examination.tokens.longest_in == "02.png"
    assert sum(examination.tokens.chunks.values()) == 3
    assert examination.tokens.chunks[1] == 1
    assert min(examination.tokens.chunks) == 1
    named = {f.where: f for f in examination.findings if f.check == "long caption"}
    assert set(named) == {"01.png", "02.png"}
    assert str(weigh(long).tokens) in named["01.png"].what


def test_75_tokens_are_one_chunk_and_76_are_two():
    assert [weigh(" ".join(["cat"] * count)).tokens for count in (0, 75, 76)] == [0, 75, 76]
    assert [weigh(" ".join(["cat"] * count)).chunks for count in (0, 75, 76)] == [1, 1, 2]
    assert weigh(" ".join(["cat"] * 76)).start == " ".join(["cat"] * 75)


def test_the_trigger_counts_as_a_part_of_the_caption(empty: Set):
    captioned(empty, [" ".join(["cat"] * 75)])
    assert empty.found("long caption") == []
    assert len(empty.found("long caption", trigger="mystyle")) == 1


# ---------------------------------------------------------------------------------------------------------------------
# words


def test_captions_without_the_trigger_are_counted(empty: Set):
    captioned(empty, ["mystyle, a cat", "a dog", "[trigger], a bird"])
    (finding,) = empty.found("trigger", trigger="mystyle")
    assert finding.severity == "note"
    assert "1 of 3 captions" in finding.what


@pytest.mark.parametrize(
    ("word", "common"),
    [("watercolor", True), ("blueprint", True), ("cat", True), ("sks", False), ("mystyle", False), ("blprnt", False)],
)
def test_common_words_are_known_by_their_token(word: str, common: bool):
    assert is_common_word(word) is common


def test_a_trigger_that_means_something_is_explained(empty: Set):
    captioned(empty, ["watercolor, a cat", "watercolor, a dog in watercolor", "watercolor, a bird"])
    (finding,) = empty.found("trigger", trigger="watercolor")
    assert finding.severity == "warning"
    assert "already means something to the base" in finding.what


def test_a_trigger_that_captions_use_as_a_word_is_named(empty: Set):
    captioned(empty, ["a gundam in a room", "a toy gundam", "a cat", "a dog", "a bird"])
    what = " ".join(finding.what for finding in empty.found("trigger", trigger="gundam"))
    assert "2 of 5 captions use" in what


def test_a_mark_for_a_trigger_without_one_is_noted(empty: Set):
    captioned(empty, ["[trigger], a cat", "[trigger], a dog"])
    assert "2 captions hold [trigger]" in empty.found("trigger")[0].what
    assert empty.found("trigger", trigger="mystyle") == []


def test_one_subject_in_nearly_every_caption_is_named(empty: Set):
    captioned(empty, [f"a photo of a woman with a {subject}" for subject in SUBJECTS[:8]] + ["a photo of a dog"])
    (finding,) = empty.found("one subject")
    assert "'woman' stands in 8 of 9 captions" in finding.what
    assert "part of the style" in finding.what


@pytest.mark.parametrize(
    "captions",
    [
        [f"a woman with a {subject}" for subject in SUBJECTS[:5]],
        [f"mystyle, a drawing of a {subject}" for subject in SUBJECTS],
        ["a woman"] * 8,
        [f"a {'woman' if number < 8 else 'man'} and a {subject}" for number, subject in enumerate(SUBJECTS)],
    ],
    ids=["few", "the medium and the trigger", "all the same, which is told already", "two thirds"],
)
def test_what_is_no_one_subject_is_left_in_peace(empty: Set, captions: list[str]):
    assert captioned(empty, captions).found("one subject", trigger="mystyle") == []


# ---------------------------------------------------------------------------------------------------------------------
# the report


def test_the_report_summarises_many_of_a_kind(empty: Set):
    captioned(empty, [f"a {subject}" for subject in SUBJECTS])
    lines = list(report(examine(empty.folder)))
    assert "warning: too small (12)" in lines
    assert "  and 7 more" in lines
    assert sum(line.startswith("  0") and "is 64 x 64" in line for line in lines) == 5
    assert "  0 to 75 tokens, 1 chunk: 12 captions" in lines


def test_errors_come_first_and_the_verdict_says_what_follows(good: Set):
    (good.folder / "orphan.txt").write_text("a caption")
    good.add("bare.png", photo(20))
    examination = examine(good.folder)
    assert [finding.severity for finding in examination.findings] == ["error", "warning"]
    assert "1 error, and 1 warning" in verdict(examination)
    assert "--fix" in verdict(examination)


# ---------------------------------------------------------------------------------------------------------------------
# the mended copy


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copy_of(images: Set, out: Path, **settings: Any) -> Path:
    write_copy(examine(images.folder, **settings), out, lambda _done, _total: None)
    return out


@pytest.fixture
def bad(good: Set) -> Set:
    """The good set, and one of everything that a copy mends."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    exif[0x010F] = "a camera"
    good.add("turned.jpg", photo(20, (520, 700)), "a turned one", exif=exif, comment=b"secret", dpi=(300, 300))
    good.add("film.png", ImageOps.expand(photo(21), (0, 60), "black"), "a still")
    good.add("mask/film.png", Image.linear_gradient("L").resize((640, 632)))
    good.add("twin.webp", photo(0).resize((320, 256)), "a smaller fox")
    (good.folder / "0 copy.png").write_bytes((good.folder / "0.png").read_bytes())
    whole = (good.folder / "1.png").read_bytes()
    (good.folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (good.folder / "orphan.txt").write_text("a caption")
    return good


def test_the_copy_has_nothing_to_mend_and_the_original_is_untouched(bad: Set, tmp_path: Path):
    before = files_of(bad.folder)
    out = copy_of(bad, tmp_path / "out")
    assert files_of(bad.folder) == before
    assert [f for f in examine(out).findings if f.severity != "note"] == []
    assert len(look(out).items) == 10


def test_the_copy_is_upright_cropped_and_without_metadata(bad: Set, tmp_path: Path):
    out = copy_of(bad, tmp_path / "out")
    with Image.open(out / "turned.jpg") as turned:
        assert (turned.size, turned.format, turned.mode) == ((700, 520), "JPEG", "RGB")
        assert not turned.getexif()
        assert not {"comment", "exif", "icc_profile"} & set(turned.info)
    with Image.open(out / "film.png") as film:
        assert film.size == (640, 512)
        assert film.tobytes() == photo(21).tobytes()
    with Image.open(out / "mask" / "film.png") as mask:
        assert mask.size == (640, 512)
        assert abs(mask.getpixel((5, 0)) - 255 * 60 / 632) < 2  # type: ignore[operator]


def test_a_sound_jpeg_keeps_its_pixels_as_far_as_jpeg_can(good: Set, tmp_path: Path):
    original = good.add("sound.jpg", photo(20), "a sound one", quality=90, comment=b"secret")
    copied = copy_of(good, tmp_path / "out") / "sound.jpg"
    assert b"secret" not in copied.read_bytes()
    with Image.open(original) as one, Image.open(copied) as other:
        difference = np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16))
    assert difference.mean() < 0.5


def test_fixes_json_accounts_for_every_file(bad: Set, tmp_path: Path):
    out = copy_of(bad, tmp_path / "out")
    told = json.loads((out / "fixes.json").read_text(encoding="utf-8"))
    by_name = {entry["file"]: entry for entry in told["files"]}
    originals = {name for name in files_of(bad.folder) if name.endswith((".png", ".jpg", ".webp"))} - {"mask/film.png"}
    assert set(by_name) == originals | {"orphan.txt"}
    assert {name for name, entry in by_name.items() if entry["written"] is None} == {
        *("cut.png", "orphan.txt", "twin.webp"),
        "0.png",  # its copy comes first, and takes its caption
    }
    assert by_name["twin.webp"]["done"] == ["left out: is nearly the same picture as 0 copy.png"]
    assert any("60 px top" in done for done in by_name["film.png"]["done"])
    assert (out / "0 copy.txt").read_text(encoding="utf-8") == "a green fox\n"


def test_names_that_would_meet_are_kept_apart(good: Set, tmp_path: Path):
    for number, name in enumerate(("a.webp", "a.bmp", "a-2.png", "fixes.png")):
        good.add(name, photo(30 + number))
        (good.folder / f"{name}.txt").write_text(f"of {name}", encoding="utf-8")
    out = copy_of(good, tmp_path / "out")
    captions = {item.path.name: item.caption for item in look(out).items if item.caption.startswith("of ")}
    assert sorted(captions.values()) == ["of a-2.png", "of a.bmp", "of a.webp", "of fixes.png"]
    assert captions["a-2.png"] == "of a-2.png"
    assert {"a.png", "a-3.png", "fixes-2.png"} <= set(captions)


def test_captions_keep_their_meaning(empty: Set, tmp_path: Path):
    for number, name in enumerate(("10_cats/a.png", "10_cats/b.png", "c.png", "d.png", "e.png")):
        empty.add(name, photo(number))
    (empty.folder / "10_cats" / "b.txt").touch()  # empty on purpose: not the folder's name
    rows = [{"file_name": "c.png", "text": "of  c\n"}, {"file_name": "d.png", "text": ["one d", "another d"]}]
    (empty.folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (empty.folder / "e.txt").write_text("by a machine", encoding="utf-8")
    append(empty.folder, entry_of("e.txt", "by a machine", "a/model", "blip"))
    out = copy_of(empty, tmp_path / "out")
    found = {item.path.relative_to(out).as_posix(): (item.captions, item.machine) for item in look(out).items}
    assert found == {
        "10_cats/a.png": (("cats",), False),
        "10_cats/b.png": (("",), False),
        "c.png": (("of c",), False),
        "d.png": (("one d", "another d"), False),
        "e.png": (("by a machine",), True),
    }
    assert (out / "c.txt").read_text(encoding="utf-8") == "of c\n"


def test_a_folder_that_asks_for_repeats_itself_keeps_them(empty: Set, tmp_path: Path):
    folder = tmp_path / "10_cats"
    empty.folder.rename(folder)
    images = Set(folder)
    images.add("a.png", photo(0))
    images.add("3_dogs/b.png", photo(1), "a dog")
    images.add("mask/a.png", Image.new("L", (640, 512), 200))
    out = copy_of(images, tmp_path / "out")
    found = {
        item.path.relative_to(out).as_posix(): (item.repeats, item.caption, item.mask is not None)
        for item in look(out).items
    }
    assert found == {"10_cats/a.png": (10, "cats", True), "10_cats/3_dogs/b.png": (3, "a dog", False)}


def test_variants_stay_lines_where_lines_are_variants(empty: Set, tmp_path: Path):
    empty.add("a.png", photo(0), "one\n\ntwo\n")
    out = copy_of(empty, tmp_path / "out", lines="variants")
    assert (out / "a.txt").read_text(encoding="utf-8") == "one\ntwo\n"


def test_images_of_which_the_mask_or_the_folder_is_refused_are_left_out(good: Set):
    good.add("mask/1.png", Image.new("L", (640, 512)))
    good.add("0_off/x.png", photo(20), "never shown")
    left_out = plan_repairs(examine(good.folder)).left_out
    assert set(left_out) == {"mask/1.png", "1.png", "0_off", "0_off/x.png"}
    assert "mask/1.png" in left_out["1.png"]


@pytest.mark.parametrize("place", ["good", "good/inside", ".", "full", "file"])
def test_a_place_for_the_copy_that_is_none_is_refused(good: Set, tmp_path: Path, place: str):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    (tmp_path / "file").touch()
    before = files_of(tmp_path)
    with pytest.raises(UserError, match=r"lie in|not empty"):
        copy_of(good, tmp_path / place)
    assert files_of(tmp_path) == before


def test_an_empty_folder_may_take_the_copy(good: Set, tmp_path: Path):
    (tmp_path / "out").mkdir()
    assert (copy_of(good, tmp_path / "out") / "fixes.json").is_file()


# ---------------------------------------------------------------------------------------------------------------------
# the command


def test_check_prints_a_report_and_ends_with_3_if_training_would_not_start(bad: Set, tmp_path: Path):
    done = lorasmith(tmp_path, "check", "good", code=3)
    assert "error: unusable (2)" in done.stdout
    assert "cut.png: cannot be read as an image" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("verdict: 2 errors")
    assert "measuring" in done.stderr


def test_check_of_a_good_set_ends_with_0(good: Set, tmp_path: Path):
    done = lorasmith(tmp_path, "check", "good")
    assert done.stdout.splitlines()[-1] == "verdict: nothing to mend."


def test_check_as_json_and_with_a_copy(bad: Set, tmp_path: Path):
    done = lorasmith(tmp_path, "check", "good", "--json", "--trigger", "mystyle", "--fix", "out", code=3)
    facts = json.loads(done.stdout)
    assert Path(facts["folder"]).samefile(tmp_path / "good")
    assert facts["images"] == 12
    assert facts["summary"]["errors"] == 2
    assert facts["summary"]["blocked"] is True
    assert {"check", "severity", "where", "what", "fix", "images"} == set(facts["findings"][0])
    assert facts["tokens"]["captions"] == 11
    assert facts["copy"] == {"folder": "out", "images": 10, "cropped": 1, "left_out": 4}
    assert (tmp_path / "out" / "fixes.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "gone"], "gone: there is no such folder"),
        (["check", "good", "--resolution", "5"], "64"),
        (["check", "good", "--fix", "good/inside"], "good/inside: the copy would lie in"),
    ],
)
def test_wrong_use_is_exit_code_2(good: Set, tmp_path: Path, arguments: list[str], words: str):
    assert words in lorasmith(tmp_path, *arguments, code=2).stderr


def test_an_examination_of_a_folder_named_in_a_roundabout_way_has_the_same_names(good: Set, tmp_path: Path):
    (good.folder / "orphan.txt").write_text("a caption")
    (tmp_path / "x").mkdir()
    found: Examination = examine(tmp_path / "x" / ".." / "good")
    assert [finding.where for finding in found.findings] == ["orphan.txt"]
