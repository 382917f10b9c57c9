"""A folder of images becomes items with captions; what would be ignored is an error, and all errors come at once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lorasmith.datasets.buckets import BucketRules
from lorasmith.datasets.dataset import Source, load_examples
from lorasmith.datasets.folder import Item, scan
from lorasmith.datasets.images import UnreadableImageError, read_rgb
from lorasmith.trainer.configfile import validate
from lorasmith.trainer.errors import DataError, Problem, UserError
from lorasmith.trainer.plan import check_folders, make_plan


def picture(
    path: Path, size: tuple[int, int] = (8, 6), color: Any = (10, 20, 30), mode: str = "RGB", **save: Any
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **save)
    return path


def text(path: Path, content: str = "a caption") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode())
    return path


def jsonl(path: Path, rows: Sequence[Any]) -> Path:
    return text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def table(folder: Path, items: Sequence[Item]) -> list[tuple[str, str, str]]:
    """Path below the folder, caption and source."""
    return [(item.path.relative_to(folder).as_posix(), item.caption, item.source) for item in items]


def problems_of(folder: Path) -> list[Problem]:
    with pytest.raises(DataError) as caught:
        scan(folder)
    return caught.value.problems


# ---------------------------------------------------------------------------------------------------------------------
# where images and captions are found


def test_a_flat_folder_without_captions(tmp_path: Path):
    for name in ("b.png", "a.jpg", "c.webp"):
        picture(tmp_path / name)
    assert table(tmp_path, scan(tmp_path)) == [("a.jpg", "", "none"), ("b.png", "", "none"), ("c.webp", "", "none")]


def test_nested_folders_with_sidecars_of_both_kinds(tmp_path: Path):
    picture(tmp_path / "a.png")
    text(tmp_path / "a.txt", "first")
    picture(tmp_path / "deep" / "er" / "b.JPG")
    text(tmp_path / "deep" / "er" / "b.caption", "second")
    picture(tmp_path / "deep" / "c.png")
    assert table(tmp_path, scan(tmp_path)) == [
        ("a.png", "first", "a.txt"),
        ("deep/c.png", "", "none"),
        ("deep/er/b.JPG", "second", "b.caption"),
    ]


def test_equal_names_in_two_folders_keep_their_own_captions(tmp_path: Path):
    for folder in ("x", "y"):
        picture(tmp_path / folder / "a.png")
        text(tmp_path / folder / "a.txt", f"caption {folder}")
    assert [item.caption for item in scan(tmp_path)] == ["caption x", "caption y"]


@pytest.mark.parametrize(
    ("content", "caption"),
    [
        (b"a cat", "a cat"),
        (b"\xef\xbb\xbfa cat\r\n", "a cat"),
        (b"  a cat,\n\n\ton a  mat \n", "a cat, on a mat"),
        ("eine Kätzchen 猫".encode(), "eine Kätzchen 猫"),
        (b"", ""),
        (b" \n", ""),
    ],
    ids=["plain", "BOM and CRLF", "several lines", "non-ASCII", "empty", "blank"],
)
def test_a_caption_is_one_tidy_line(tmp_path: Path, content: bytes, caption: str):
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(content)
    assert table(tmp_path, scan(tmp_path)) == [("a.png", caption, "a.txt")]


@pytest.mark.parametrize(
    "stem",
    ["with space", "Größe", "猫と犬", "a (1) [x] {y}", "per%cent #1", "dots.in.name", "it's", "-dash", "a  b"],
)
def test_unusual_names_keep_their_captions(tmp_path: Path, stem: str):
    picture(tmp_path / "bilder ä" / f"{stem}.png")
    text(tmp_path / "bilder ä" / f"{stem}.txt", "its caption")
    assert table(tmp_path, scan(tmp_path)) == [(f"bilder ä/{stem}.png", "its caption", f"{stem}.txt")]


def test_images_of_one_stem_share_the_caption(tmp_path: Path):
    picture(tmp_path / "a.jpg")
    picture(tmp_path / "a.png")
    text(tmp_path / "a.txt", "both")
    assert table(tmp_path, scan(tmp_path)) == [("a.jpg", "both", "a.txt"), ("a.png", "both", "a.txt")]


def test_a_caption_named_after_the_whole_file_name_belongs_to_that_file_alone(tmp_path: Path):
    picture(tmp_path / "a.jpg")
    text(tmp_path / "a.jpg.txt", "of the jpg")
    picture(tmp_path / "a.png")
    text(tmp_path / "a.png.txt", "of the png")
    assert table(tmp_path, scan(tmp_path)) == [
        ("a.jpg", "of the jpg", "a.jpg.txt"),
        ("a.png", "of the png", "a.png.txt"),
    ]


@pytest.mark.parametrize("name", ["a.old.txt", "a.v2.txt", "a.backup.caption"])
def test_another_text_is_not_taken_for_the_caption_of_an_image_with_a_shorter_name(tmp_path: Path, name: str):
    picture(tmp_path / "a.png")
    text(tmp_path / name, "not its caption")
    assert [(p.where, p.what) for p in problems_of(tmp_path)] == [
        (str(tmp_path / name), "is a caption without an image, so it would be ignored")
    ]


@pytest.mark.parametrize(
    "hidden",
    [".hidden.png", "._a.png", ".cache/b.png", "@eaDir/a.png", "__MACOSX/a.png", "Thumbs.db", ".a.txt", ".git/x.txt"],
)
def test_hidden_files_and_what_systems_leave_behind_are_passed_over(tmp_path: Path, hidden: str):
    picture(tmp_path / "a.png")
    text(tmp_path / hidden, "not an image")
    assert table(tmp_path, scan(tmp_path)) == [("a.png", "", "none")]


@pytest.mark.parametrize("name", ["README.txt", "readme.md", "LICENSE.txt", "LICENSE", "Credits.txt", "NOTICE.txt"])
def test_texts_about_the_folder_are_no_captions(tmp_path: Path, name: str):
    picture(tmp_path / "a.png")
    text(tmp_path / name)
    assert table(tmp_path, scan(tmp_path)) == [("a.png", "", "none")]


def test_a_readme_beside_an_image_called_readme_is_its_caption(tmp_path: Path):
    picture(tmp_path / "readme.png")
    text(tmp_path / "readme.txt", "a screenshot")
    assert table(tmp_path, scan(tmp_path)) == [("readme.png", "a screenshot", "readme.txt")]


def test_items_carry_the_hash_of_the_file_bytes(tmp_path: Path):
    file = picture(tmp_path / "a.png")
    assert scan(tmp_path)[0].sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_items_are_sorted_and_the_same_each_time(tmp_path: Path):
    for name in ("10.png", "2.png", "b/1.png", "a/1.png"):
        picture(tmp_path / name)
    first = scan(tmp_path)
    assert [item.path.relative_to(tmp_path).as_posix() for item in first] == ["10.png", "2.png", "a/1.png", "b/1.png"]
    assert scan(tmp_path) == first


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need rights on Windows")
def test_links_that_stay_in_the_folder_are_followed(tmp_path: Path):
    picture(tmp_path / "b" / "a.png")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "link.png").symlink_to(tmp_path / "b" / "a.png")
    assert table(tmp_path, scan(tmp_path)) == [("a/link.png", "", "none"), ("b/a.png", "", "none")]


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need rights on Windows")
def test_a_link_that_leads_out_of_the_folder_is_refused_by_name(tmp_path: Path):
    picture(tmp_path / "elsewhere" / "a.png")
    picture(tmp_path / "photos" / "mine.png")
    for name, target in (("folder", tmp_path / "elsewhere"), ("file.png", tmp_path / "elsewhere" / "a.png")):
        (tmp_path / "photos" / name).symlink_to(target)
    found = problems_of(tmp_path / "photos")
    assert {Path(problem.where).name for problem in found} == {"folder", "file.png"}
    assert all("leads out of the folder" in problem.what for problem in found)


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need rights on Windows")
def test_the_given_folder_may_itself_be_a_link(tmp_path: Path):
    picture(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "photos").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert table(tmp_path / "photos", scan(tmp_path / "photos")) == [("a.png", "", "none")]


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need rights on Windows")
def test_a_picture_that_both_a_folder_and_a_link_hold_is_found_under_the_first_of_the_two_names(tmp_path: Path):
    picture(tmp_path / "b" / "a.png")
    for name in ("c", "a"):
        (tmp_path / name).symlink_to(tmp_path / "b", target_is_directory=True)
    assert table(tmp_path, scan(tmp_path)) == [("a/a.png", "", "none")]


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need rights on Windows")
def test_a_link_that_leads_back_does_not_multiply_the_images(tmp_path: Path):
    picture(tmp_path / "a.png")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert len(scan(tmp_path)) == 1


# ---------------------------------------------------------------------------------------------------------------------
# kohya's folders


def test_kohya_folders_give_repeats_and_a_caption(tmp_path: Path):
    picture(tmp_path / "10_my_style" / "a.png")
    picture(tmp_path / "3_cat photo" / "b.png")
    picture(tmp_path / "c.png")
    items = scan(tmp_path)
    assert table(tmp_path, items) == [
        ("10_my_style/a.png", "my style", "folder name"),
        ("3_cat photo/b.png", "cat photo", "folder name"),
        ("c.png", "", "none"),
    ]
    assert [item.repeats for item in items] == [10, 3, 1]


def test_a_sidecar_goes_before_the_kohya_folder_name(tmp_path: Path):
    picture(tmp_path / "10_style" / "a.png")
    text(tmp_path / "10_style" / "a.txt", "own caption")
    picture(tmp_path / "10_style" / "b.png")
    text(tmp_path / "10_style" / "b.txt", "")
    items = scan(tmp_path)
    assert table(tmp_path, items) == [("10_style/a.png", "own caption", "a.txt"), ("10_style/b.png", "", "b.txt")]
    assert [item.repeats for item in items] == [10, 10]


def test_the_nearest_kohya_folder_counts_and_the_given_folder_may_be_one(tmp_path: Path):
    root = tmp_path / "5_outer"
    picture(root / "a.png")
    picture(root / "2_inner" / "deep" / "b.png")
    assert [(item.repeats, item.caption) for item in scan(root)] == [(2, "inner"), (5, "outer")]


def test_a_folder_above_the_given_one_does_not_count(tmp_path: Path):
    picture(tmp_path / "7_above" / "photos" / "a.png")
    assert [(item.repeats, item.caption) for item in scan(tmp_path / "7_above" / "photos")] == [(1, "")]


@pytest.mark.parametrize("name", ["ten_style", "10style", "10-style", "_style", "10_"])
def test_other_folder_names_give_no_repeats(tmp_path: Path, name: str):
    picture(tmp_path / name / "a.png")
    assert [(item.repeats, item.caption, item.source) for item in scan(tmp_path)] == [(1, "", "none")]


@pytest.mark.parametrize("name", ["2024_summer", "20240131_birthday"])
def test_a_folder_named_by_date_is_not_silently_taken_for_repeats(tmp_path: Path, name: str):
    picture(tmp_path / name / "a.png")
    try:
        found = [item.repeats for item in scan(tmp_path)]
    except DataError as error:
        found = [1] if name in str(error) else []  # an error that names the folder is as good
    assert found == [1]


def test_a_folder_of_0_repeats_is_named_once(tmp_path: Path):
    """kohya leaves such folders out without a word."""
    picture(tmp_path / "0_off" / "a.png")
    picture(tmp_path / "0_off" / "b.png")
    picture(tmp_path / "2_on" / "c.png")
    assert [problem.where for problem in problems_of(tmp_path)] == [str(tmp_path / "0_off")]


@pytest.mark.parametrize(("name", "repeats"), [("500_style", 500), ("501_style", 1), ("007_bond", 7)])
def test_up_to_500_a_number_is_repeats(tmp_path: Path, name: str, repeats: int):
    picture(tmp_path / name / "a.png")
    assert [item.repeats for item in scan(tmp_path)] == [repeats]


def test_a_date_within_a_kohya_folder_leaves_its_repeats(tmp_path: Path):
    picture(tmp_path / "3_cat" / "2024_summer" / "a.png")
    assert [(item.repeats, item.caption) for item in scan(tmp_path)] == [(3, "cat")]


# ---------------------------------------------------------------------------------------------------------------------
# metadata.jsonl


def test_metadata_gives_captions_with_their_line(tmp_path: Path):
    for name in ("a.png", "sub/b ü.png", "c.png"):
        picture(tmp_path / name)
    rows = [{"file_name": "sub/b ü.png", "text": " of b\n"}, {"file_name": "a.png", "text": "of a", "other": 1}]
    jsonl(tmp_path / "metadata.jsonl", rows)
    assert table(tmp_path, scan(tmp_path)) == [
        ("a.png", "of a", "metadata.jsonl line 2"),
        ("c.png", "", "none"),
        ("sub/b ü.png", "of b", "metadata.jsonl line 1"),
    ]


def test_metadata_in_a_nested_folder_counts_from_there(tmp_path: Path):
    picture(tmp_path / "sub" / "a.png")
    jsonl(tmp_path / "sub" / "metadata.jsonl", [{"file_name": "a.png", "text": "of a"}])
    assert table(tmp_path, scan(tmp_path)) == [("sub/a.png", "of a", "metadata.jsonl line 1")]


def test_metadata_is_found_when_the_folder_is_given_in_a_roundabout_way(tmp_path: Path):
    picture(tmp_path / "photos" / "a.png")
    jsonl(tmp_path / "photos" / "metadata.jsonl", [{"file_name": "a.png", "text": "of a"}])
    (tmp_path / "other").mkdir()
    assert [item.caption for item in scan(tmp_path / "other" / ".." / "photos")] == ["of a"]


@pytest.mark.parametrize(
    "mark", ["\u2028", "\u2029", "\x85"], ids=["line separator", "paragraph separator", "next line"]
)
def test_a_unicode_line_break_in_a_metadata_caption_does_not_tear_the_line(tmp_path: Path, mark: str):
    picture(tmp_path / "a.png")
    jsonl(tmp_path / "metadata.jsonl", [{"file_name": "a.png", "text": f"of{mark}a"}])
    assert [item.caption for item in scan(tmp_path)] == ["of a"]


def test_metadata_with_a_byte_order_mark_crlf_and_blank_lines(tmp_path: Path):
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_bytes(b'\xef\xbb\xbf{"file_name": "a.png", "text": "of a"}\r\n\r\n')
    assert [item.caption for item in scan(tmp_path)] == ["of a"]


def test_every_wrong_line_of_metadata_is_named(tmp_path: Path):
    picture(tmp_path / "a.png")
    file = tmp_path / "metadata.jsonl"
    rows = [
        '{"file_name": "a.png", "text": "of a"}',
        "{broken",
        '{"text": "no name"}',
        "[1]",
        '{"file_name": "gone.png", "text": "x"}',
        '{"file_name": "a.png", "text": "again"}',
        '{"file_name": "../outside.png", "text": "x"}',
    ]
    text(file, "\n".join(rows) + "\n")
    assert problems_of(tmp_path) == [
        Problem(f"{file} line 2", "is not a JSON object with a file_name", "Mend or remove the line."),
        Problem(f"{file} line 3", "is not a JSON object with a file_name", "Mend or remove the line."),
        Problem(f"{file} line 4", "is not a JSON object with a file_name", "Mend or remove the line."),
        Problem(f"{file} line 5", "names 'gone.png', which is no image here", "Mend or remove the line."),
        Problem(f"{file} line 6", "is a second caption for a.png", "Keep one of the two."),
        Problem(f"{file} line 7", "names '../outside.png', which is no image here", "Mend or remove the line."),
    ]


@pytest.mark.parametrize("row", [{"file_name": "a.png"}, {"file_name": "a.png", "text": 3}], ids=["none", "a number"])
def test_metadata_without_text_is_an_error(tmp_path: Path, row: dict[str, Any]):
    picture(tmp_path / "a.png")
    file = jsonl(tmp_path / "metadata.jsonl", [row])
    assert problems_of(tmp_path) == [Problem(f"{file} line 1", 'has no "text"', 'Add "text": "the caption".')]


def test_metadata_and_a_sidecar_for_one_image_are_an_error(tmp_path: Path):
    picture(tmp_path / "a.png")
    jsonl(tmp_path / "metadata.jsonl", [{"file_name": "a.png", "text": "of a"}])
    sidecar = text(tmp_path / "a.txt", "other")
    assert problems_of(tmp_path) == [
        Problem(
            str(sidecar),
            "a.png has a caption in metadata.jsonl line 1 already",
            "Keep one of the two; the other would be ignored.",
        )
    ]


def test_metadata_that_is_not_utf8_is_an_error_that_names_it(tmp_path: Path):
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_bytes('{"file_name": "a.png", "text": "Bär"}\n'.encode("cp1252"))
    assert [problem.where for problem in problems_of(tmp_path)] == [str(tmp_path / "metadata.jsonl")]


# ---------------------------------------------------------------------------------------------------------------------
# captions that would be ignored


def test_a_caption_without_an_image_is_an_error(tmp_path: Path):
    picture(tmp_path / "a.png")
    orphan = text(tmp_path / "b.txt")
    assert problems_of(tmp_path) == [
        Problem(
            str(orphan),
            "is a caption without an image, so it would be ignored",
            "Give it the name of its image, or remove it.",
        )
    ]


def test_a_caption_in_another_folder_than_its_image_is_an_error(tmp_path: Path):
    picture(tmp_path / "images" / "a.png")
    orphan = text(tmp_path / "captions" / "a.txt")
    assert [problem.where for problem in problems_of(tmp_path)] == [str(orphan)]


def test_two_sidecars_for_one_image_are_an_error(tmp_path: Path):
    picture(tmp_path / "a.png")
    text(tmp_path / "a.caption", "one")
    second = text(tmp_path / "a.txt", "two")
    assert problems_of(tmp_path) == [
        Problem(
            str(second), "a.png has a caption in a.caption already", "Keep one of the two; the other would be ignored."
        )
    ]


@pytest.mark.parametrize("suffix", [".tags", ".cap", ".captions"])
def test_a_sidecar_of_a_kind_that_is_not_read_is_an_error(tmp_path: Path, suffix: str):
    picture(tmp_path / "a.png")
    file = text(tmp_path / f"a{suffix}", '{"caption": "x"}')
    assert problems_of(tmp_path) == [
        Problem(
            str(file),
            f"looks like a caption, but {suffix} files are not read",
            "Move its text to a .txt file, or remove it.",
        )
    ]


@pytest.mark.parametrize("name", ["metadata.parquet", "captions.json", "meta_cap.json"])
def test_hugging_face_metadata_in_a_table_that_is_not_read_is_an_error(tmp_path: Path, name: str):
    picture(tmp_path / "a.png")
    file = text(tmp_path / name, "file_name,text\na.png,of a\n")
    assert [problem.where for problem in problems_of(tmp_path)] == [str(file)]


def test_a_caption_that_cannot_be_decoded_is_an_error(tmp_path: Path):
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("Bär".encode("latin-1"))
    [problem] = problems_of(tmp_path)
    assert (problem.where, problem.fix) == (str(tmp_path / "a.txt"), "Save it as UTF-8.")
    assert problem.what.startswith("is not UTF-8 text (")
    assert problem.what.endswith("at byte 1)")


# ---------------------------------------------------------------------------------------------------------------------
# folders and images that cannot be used


def test_a_missing_folder_is_an_error(tmp_path: Path):
    assert problems_of(tmp_path / "no") == [
        Problem(str(tmp_path / "no"), "there is no such folder", "Set data.path to the folder that holds your images.")
    ]


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path: Path):
    file = picture(tmp_path / "a.png")
    assert [problem.what for problem in problems_of(file)] == ["is a file, not a folder of images"]


@pytest.mark.parametrize(
    ("files", "seen"),
    [
        ([], "it is empty"),
        (["a.txt", "b.txt", "c.heic", "LICENSE"], "2 x .txt, 1 x .heic, 1 x no suffix"),
        ([".hidden.png"], "it is empty"),
    ],
    ids=["empty", "other files", "only hidden"],
)
def test_a_folder_without_images_says_what_it_holds(tmp_path: Path, files: list[str], seen: str):
    for name in files:
        text(tmp_path / name)
    [problem] = problems_of(tmp_path)
    assert problem.where == str(tmp_path)
    assert problem.what.startswith("holds no images (")
    assert sorted(problem.what.removeprefix("holds no images (").removesuffix(")").split(", ")) == sorted(
        seen.split(", ")
    )


@pytest.mark.parametrize("suffix", [".heic", ".JXL", ".psd", ".svg", ".nef"])
def test_an_image_of_a_kind_that_is_not_read_is_an_error(tmp_path: Path, suffix: str):
    picture(tmp_path / "a.png")
    file = text(tmp_path / f"b{suffix}", "pixels")
    assert [(p.where, p.what) for p in problems_of(tmp_path)] == [(str(file), "is a kind of image that is not read")]


@pytest.mark.parametrize("suffix", [".jpe", ".JFIF"])
def test_a_jpeg_by_another_name_is_read(tmp_path: Path, suffix: str):
    picture(tmp_path / f"a{suffix}", format="JPEG")
    assert [item.path.name for item in scan(tmp_path)] == [f"a{suffix}"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="rights do not bind this user")
def test_what_may_not_be_read_is_an_error(tmp_path: Path):
    picture(tmp_path / "a.png")
    sidecar, folder = text(tmp_path / "a.txt"), tmp_path / "locked"
    picture(folder / "b.png")
    sidecar.chmod(0)
    folder.chmod(0)
    try:
        assert {problem.where for problem in problems_of(tmp_path)} == {str(sidecar), str(folder)}
    finally:
        folder.chmod(0o700)


def test_a_folder_in_place_of_a_caption_is_passed_over(tmp_path: Path):
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").mkdir()
    assert table(tmp_path, scan(tmp_path)) == [("a.png", "", "none")]


def test_all_unusable_files_are_reported_at_once(tmp_path: Path):
    picture(tmp_path / "good.png")
    Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:600])
    text(tmp_path / "text.png", "I am a text")
    (tmp_path / "empty.webp").write_bytes(b"")
    text(tmp_path / "orphan.txt")
    (tmp_path / "good.txt").write_bytes(b"\xff\xff")
    found = problems_of(tmp_path)
    assert sorted(Path(problem.where).name for problem in found) == [
        "cut.jpg",
        "empty.webp",
        "good.txt",
        "orphan.txt",
        "text.png",
    ]
    unreadable = [p for p in found if Path(p.where).name in ("cut.jpg", "empty.webp", "text.png")]
    assert all(p.what.startswith("cannot be read as an image (") for p in unreadable)
    assert all(p.fix == "Save it again or remove it." for p in unreadable)


def test_the_problems_of_two_folders_are_reported_at_once(tmp_path: Path):
    picture(tmp_path / "one" / "a.png", (64, 64))
    text(tmp_path / "one" / "b.txt")
    sources = [Source(tmp_path / name, (64,)) for name in ("one", "missing")]
    with pytest.raises(DataError) as caught:
        load_examples(sources, BucketRules(16))
    assert [problem.where for problem in caught.value.problems] == [
        str(tmp_path / "one" / "b.txt"),
        str(tmp_path / "missing"),
    ]


def test_a_truncated_png_is_unreadable(tmp_path: Path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:500])
    with pytest.raises(UnreadableImageError):
        read_rgb(tmp_path / "a.png")


# ---------------------------------------------------------------------------------------------------------------------
# pixels


def pixels(path: Path) -> tuple[list[Any], tuple[str, ...]]:
    image, notes = read_rgb(path)
    assert image.mode == "RGB"
    return [image.getpixel((x, y)) for y in range(image.height) for x in range(image.width)], notes


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tiff"])
def test_exif_orientation_6_is_applied_and_noted(tmp_path: Path, suffix: str):
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (0, 0, 20, 20))  # the left half; shown upright it is the upper one
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / f"a{suffix}", exif=exif)
    [item] = scan(tmp_path)
    assert (item.width, item.height, item.notes) == (20, 40, ("rotated by EXIF orientation 6",))
    upright, _ = read_rgb(item.path)
    red, _, blue = upright.getpixel((10, 5))  # type: ignore[misc]
    assert red < 40 < 200 < blue
    red, _, blue = upright.getpixel((10, 35))  # type: ignore[misc]
    assert blue < 40 < 200 < red


def test_a_plain_rgb_picture_is_unchanged_and_without_notes(tmp_path: Path):
    assert pixels(picture(tmp_path / "a.png", (2, 1), (10, 20, 30))) == ([(10, 20, 30), (10, 20, 30)], ())


def test_alpha_is_laid_on_white(tmp_path: Path):
    image = Image.new("RGBA", (3, 1))
    for x, value in enumerate([(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 51)]):
        image.putpixel((x, 0), value)
    image.save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png") == (
        [(255, 0, 0), (255, 255, 255), (204, 204, 204)],
        ("transparency laid on white",),
    )


def test_grey_with_alpha_is_laid_on_white(tmp_path: Path):
    picture(tmp_path / "a.png", (1, 1), (0, 51), "LA")
    assert pixels(tmp_path / "a.png") == ([(204, 204, 204)], ("transparency laid on white",))


@pytest.mark.parametrize("suffix", [".png", ".gif"])
def test_a_palette_with_transparency_is_laid_on_white(tmp_path: Path, suffix: str):
    image = Image.new("P", (2, 1))
    image.putpalette([200, 10, 10, 10, 10, 200])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / f"a{suffix}", transparency=0)
    assert pixels(tmp_path / f"a{suffix}") == ([(255, 255, 255), (10, 10, 200)], ("transparency laid on white",))


def test_a_colour_made_transparent_is_laid_on_white(tmp_path: Path):
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    image.save(tmp_path / "a.png", transparency=(1, 2, 3))
    assert pixels(tmp_path / "a.png") == ([(255, 255, 255), (9, 9, 9)], ("transparency laid on white",))


def test_a_palette_without_transparency_is_converted(tmp_path: Path):
    image = Image.new("P", (1, 1))
    image.putpalette([200, 10, 10])
    image.save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png") == ([(200, 10, 10)], ("converted from P to RGB",))


def test_cmyk_is_converted(tmp_path: Path):
    picture(tmp_path / "a.tif", (1, 1), (0, 255, 255, 0), "CMYK")
    assert pixels(tmp_path / "a.tif") == ([(255, 0, 0)], ("converted from CMYK to RGB",))


def test_a_cmyk_jpeg_is_converted(tmp_path: Path):
    found, notes = pixels(picture(tmp_path / "a.jpg", (1, 1), (0, 255, 255, 0), "CMYK", quality=100))
    assert notes == ("converted from CMYK to RGB",)
    assert all(abs(a - b) <= 3 for a, b in zip(found[0], (255, 0, 0), strict=True))


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (257 * 100, 100), (65535, 255)])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path, value: int, expected: int):
    picture(tmp_path / "a.png", (1, 1), value, "I;16")
    found, notes = pixels(tmp_path / "a.png")
    assert found == [(expected,) * 3]
    assert notes == ("converted from I;16 to RGB",)


def test_16_bit_grey_with_a_transparent_value_is_laid_on_white(tmp_path: Path):
    image = Image.new("I;16", (2, 1), 65535)  # type: ignore[arg-type]
    image.putpixel((1, 0), 257 * 100)
    image.save(tmp_path / "a.png", transparency=65535)
    assert pixels(tmp_path / "a.png")[0] == [(255, 255, 255), (100, 100, 100)]


def test_only_the_transparent_value_of_16_bit_grey_is_transparent(tmp_path: Path):
    """Its neighbours become the same value in 8 bit, and stay what they are."""
    image = Image.new("I;16", (2, 1), 25700)  # type: ignore[arg-type]
    image.putpixel((1, 0), 25701)
    image.save(tmp_path / "a.png", transparency=25700)
    assert pixels(tmp_path / "a.png") == ([(255, 255, 255), (100, 100, 100)], ("transparency laid on white",))


@pytest.mark.parametrize(("value", "expected"), [(0, (0, 0, 0)), (1, (255, 255, 255))], ids=["black", "white"])
def test_one_bit_is_converted(tmp_path: Path, value: int, expected: tuple[int, int, int]):
    assert pixels(picture(tmp_path / "a.png", (1, 1), value, "1")) == ([expected], ("converted from 1 to RGB",))


def test_of_an_animation_the_first_frame_is_taken_and_that_is_noted(tmp_path: Path):
    frames = [Image.new("RGB", (2, 2), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    found, notes = pixels(tmp_path / "a.webp")
    assert found == [(255, 0, 0)] * 4
    assert notes[0] == "first frame of an animation"


# ---------------------------------------------------------------------------------------------------------------------
# what the plan says of it


def plan_of(folder: Path, tmp_path: Path, **data: Any) -> Any:
    values = {
        "name": "x",
        "runs": str(tmp_path / "runs"),
        "data": [{"path": str(folder), **data}],
        "save": {"every": 0},
    }
    return make_plan(validate(values))


def test_the_plan_counts_where_captions_come_from(tmp_path: Path):
    folder = tmp_path / "photos"
    for name in ("a", "cat line art", "c", "d", "10_big house/e", "none", "empty"):
        picture(folder / f"{name}.png", (64, 64))
    text(folder / "a.txt")
    text(folder / "cat line art.txt")
    text(folder / "c.caption")
    text(folder / "empty.txt", "")
    jsonl(folder / "metadata.jsonl", [{"file_name": "d.png", "text": "of d"}])
    plan = plan_of(folder, tmp_path)
    assert dict(plan.caption_sources()) == {
        "*.txt": 2,
        "*.caption": 1,
        "metadata.jsonl": 1,
        "folder name": 1,
        "no caption": 1,
        "empty caption file": 1,
    }
    assert (plan.facts()["captions"], plan.facts()["images"]) == (5, 7)


def test_the_plan_warns_of_empty_captions_enlarged_cropped_and_equal_images(tmp_path: Path):
    folder = tmp_path / "photos"
    picture(folder / "a.png", (64, 64))
    picture(folder / "b.png", (64, 64))
    picture(folder / "small.png", (16, 16), (1, 1, 1))
    picture(folder / "wide.png", (960, 64), (2, 2, 2))
    empty, soft, cut, twice = plan_of(folder, tmp_path).warnings()
    assert_says(empty, "4 images", "empty caption", "a.png, b.png, small.png and 1 more", "data.trigger")
    assert_says(soft, "1 image ", "1.5", "small.png")
    assert_says(cut, "1 image ", "25%", "crop", "wide.png")
    assert_says(twice, "b.png", "a.png", "same", "twice")


def assert_says(sentence: str, *words: str) -> None:
    assert [word for word in words if word not in sentence] == [], sentence


def test_a_trigger_alone_is_a_caption(tmp_path: Path):
    picture(tmp_path / "photos" / "a.png", (64, 64))
    plan = plan_of(tmp_path / "photos", tmp_path, trigger="sks")
    assert [example.caption for example in plan.examples] == ["sks"]
    assert dict(plan.caption_sources()) == {"trigger alone": 1}
    assert plan.config.sample.prompts == ["sks"]


def test_a_run_folder_inside_the_dataset_folder_is_refused(tmp_path: Path):
    """Otherwise its previews are taken for training images at resume, and by the next run."""
    picture(tmp_path / "a.png", (64, 64))
    values = {"name": "x", "runs": str(tmp_path / "runs"), "data": [{"path": str(tmp_path)}]}
    with pytest.raises(UserError, match="runs"):
        make_plan(validate(values))


@pytest.mark.parametrize("path", ["hf:{}", "{}?split=train", "hf:{}?split=train"])
def test_a_run_folder_inside_a_folder_of_data_sets_or_tables_is_refused_as_well(tmp_path: Path, path: str):
    (tmp_path / "set").mkdir()
    values = {"name": "x", "runs": str(tmp_path / "set" / "runs"), "data": [{"path": path.format(tmp_path / "set")}]}
    with pytest.raises(UserError, match="lies inside the dataset folder"):
        check_folders(validate(values))
    check_folders(validate({**values, "runs": str(tmp_path / "runs")}))


def test_a_resolution_that_no_bucket_can_have_is_refused_at_plan(tmp_path: Path):
    picture(tmp_path / "photos" / "a.png", (64, 64))
    with pytest.raises(UserError, match="resolution"):
        plan_of(tmp_path / "photos", tmp_path, resolution=10)


def test_a_source_file_beside_its_export_is_no_problem(tmp_path: Path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.psd").write_bytes(b"8BPS")
    assert [item.path.name for item in scan(tmp_path)] == ["a.png"]


def test_a_folder_named_after_an_artist_is_read(tmp_path: Path):
    picture(tmp_path / "@artist" / "a.png")
    assert [item.path.name for item in scan(tmp_path)] == ["a.png"]
