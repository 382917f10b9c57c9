"""Captions changed one by one and in bulk, images removed, and all of it undone, in real folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorasmith.datasets import bulk
from lorasmith.datasets.editing import ChangedMeanwhileError, Elsewhere, place_of, save_caption, sharers, text_of
from lorasmith.datasets.folder import look
from lorasmith.datasets.journal import JOURNAL, REMOVED, last_deed, undo
from lorasmith.datasets.listing import list_images
from lorasmith.datasets.removal import remove_file, remove_images
from lorasmith.trainer.errors import DataError, LorasmithError, UserError

from .conftest import draw_picture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "images"
    made.mkdir()
    return made


def add(folder: Path, name: str, caption: str | None = None, number: int = 0) -> Path:
    """An image, with its caption beside it."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    draw_picture(number, (64, 48)).save(file)
    if caption is not None:
        file.with_suffix(".txt").write_bytes(caption.encode())
    return file


def state(folder: Path) -> dict[str, bytes]:
    """All that training sees, and what was removed; without the journal."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and not file.name.startswith(JOURNAL)]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def save(folder: Path, name: str, text: str) -> bool:
    listing = list_images(folder)
    image = listing.image(name)
    assert image
    return save_caption(listing.folder, name, text_of(listing, image), text)


def captions(folder: Path) -> dict[str, str]:
    return {image.name: text_of(list_images(folder), image) for image in list_images(folder).images}


def write_table(folder: Path, *lines: str, name: str = "metadata.jsonl") -> Path:
    table = folder / name
    table.write_bytes("".join(lines).encode())
    return table


# ---------------------------------------------------------------------------------------------------------------------
# the listing


def test_the_listing_is_what_training_reads(folder: Path):
    add(folder, "a.png", "a cat")
    add(folder, "10_red dogs/b.png", number=1)
    add(folder, "sub/c.png", number=2)
    add(folder, "mask/a.png", number=3)
    (folder / "sub" / "c.caption").write_text("a bird")
    (folder / "lost.txt").write_text("of no image")
    (folder / "photo.heic").write_bytes(b"?")
    listing, found = list_images(folder), look(folder)
    assert [(i.path, i.captions, i.source) for i in listing.images] == [
        (i.path, i.captions, i.source) for i in found.items
    ]
    assert listing.problems == found.problems
    assert listing.masks == {folder / "a.png": folder / "mask" / "a.png"}


def test_a_folder_without_images_is_told(folder: Path):
    [problem] = list_images(folder).problems
    assert "holds no images" in problem.what
    with pytest.raises(UserError, match="no such folder"):
        list_images(folder / "not here")


# ---------------------------------------------------------------------------------------------------------------------
# one caption


@pytest.mark.parametrize("before", [None, "a dog\n", "a dog", "\ufeffa  dog \r\n"])
def test_a_caption_goes_to_the_text_file_beside_its_image(folder: Path, before: str | None):
    add(folder, "a.png", before)
    assert save(folder, "a.png", " a cat,  on a mat ")
    assert (folder / "a.txt").read_bytes() == b"a cat, on a mat\n"
    assert look(folder).items[0].captions == ("a cat, on a mat",)


def test_what_is_as_it_was_is_not_written(folder: Path):
    add(folder, "a.png", "a  dog ")
    assert not save(folder, "a.png", "a dog")
    assert (folder / "a.txt").read_bytes() == b"a  dog "


def test_a_caption_file_of_another_suffix_stays_the_one(folder: Path):
    add(folder, "a.png")
    (folder / "a.caption").write_text("a dog")
    save(folder, "a.png", "a cat")
    assert (folder / "a.caption").read_text() == "a cat\n"
    assert not (folder / "a.txt").exists()


def test_lines_stay_lines(folder: Path):
    add(folder, "a.png", "one dog\n\n a dog \n")
    assert captions(folder) == {"a.png": "one dog\na dog"}
    save(folder, "a.png", "one cat\na cat")
    assert look(folder, "variants").items[0].captions == ("one cat", "a cat")


def test_a_folders_name_gives_way_to_a_file(folder: Path):
    add(folder, "10_dogs/a.png")
    assert captions(folder) == {"10_dogs/a.png": ""}
    save(folder, "10_dogs/a.png", "a cat")
    assert look(folder).items[0].captions == ("a cat",)


def test_images_of_one_stem_get_files_of_their_own(folder: Path):
    for name in ("a.png", "a.jpg"):
        add(folder, name)
    for name in ("a.png", "a.jpg"):
        save(folder, name, f"the {name}")
    assert [item.caption for item in look(folder).items] == ["the a.jpg", "the a.png"]
    assert look(folder).problems == []


def test_a_file_that_serves_two_images_is_told(folder: Path):
    add(folder, "a.png", "both")
    add(folder, "a.jpg", number=1)
    add(folder, "b.jpg", "other", number=2)
    listing = list_images(folder)
    assert [[other.name for other in sharers(listing, image)] for image in listing.images] == [["a.png"], ["a.jpg"], []]


def test_a_line_of_a_table_is_changed_and_nothing_else(folder: Path):
    for number, name in enumerate(("a.png", "sub/b.png", "c.png")):
        add(folder, name, number=number)
    lines = [
        '\ufeff{"file_name":"a.png",  "text": "a \\"red\\" dog" , "n": 1.50}\r\n',
        '{"text": "k", "file_name": "sub/b.png", "more": {"text": "k"}}\n',
        "\n",
        '{"file_name": "c.png", "caption": "c"}',
    ]
    table = write_table(folder, *lines)
    save(folder, "a.png", 'a "blue" cät')
    save(folder, "sub/b.png", "kk")
    save(folder, "c.png", "cc")
    assert table.read_bytes().decode() == (
        '\ufeff{"file_name":"a.png",  "text": "a \\"blue\\" c\\u00e4t" , "n": 1.50}\r\n'.replace("\\u00e4", "ä")
        + '{"text": "kk", "file_name": "sub/b.png", "more": {"text": "k"}}\n\n'
        + '{"file_name": "c.png", "caption": "cc"}'
    )


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("a.json", '{"caption": "a dog"}', "a.json"),
        ("metadata.csv", "file_name,text\na.png,a dog\n", "metadata.csv line 2"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": ["a dog", "one dog"]}', "metadata.jsonl line 1"),
        ("metadata.jsonl", '{"file_name": "a.png", "te\\u0078t": "a dog"}', "metadata.jsonl line 1"),
    ],
)
def test_what_cannot_be_changed_says_why(folder: Path, name: str, text: str, why: str):
    add(folder, "a.png")
    (folder / name).write_text(text)
    before, listing = state(folder), list_images(folder)
    place = place_of(listing, listing.images[0])
    assert isinstance(place, Elsewhere)
    assert why in place.why
    with pytest.raises(DataError, match="cannot be changed"):
        save(folder, "a.png", "a cat")
    assert state(folder) == before


def test_a_file_that_is_no_text_is_not_overwritten(folder: Path):
    add(folder, "a.png")
    (folder / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be changed"):
        save(folder, "a.png", "a cat")


def test_what_somebody_else_wrote_meanwhile_is_not_lost(folder: Path):
    add(folder, "a.png", "a dog")
    (folder / "a.txt").write_text("a brown dog")
    with pytest.raises(ChangedMeanwhileError) as caught:
        save_caption(folder, "a.png", "a dog", "a cat")
    assert caught.value.now == "a brown dog"
    assert (folder / "a.txt").read_text() == "a brown dog"


def test_an_image_that_is_gone_is_told(folder: Path):
    add(folder, "a.png", "a dog")
    with pytest.raises(DataError, match="no longer"):
        save_caption(folder, "b.png", "", "a cat")


# ---------------------------------------------------------------------------------------------------------------------
# many captions

WRITTEN = {"a.png": "red, dog", "b.png": "a dog \n", "c.png": "trg, cat", "d.png": "Dog, red"}


@pytest.fixture
def four(folder: Path) -> Path:
    for number, (name, caption) in enumerate(WRITTEN.items()):
        add(folder, name, caption, number)
    return folder


@pytest.mark.parametrize(
    ("operation", "after"),
    [
        (
            bulk.add_trigger("trg"),
            {"a.png": "trg, red, dog", "b.png": "trg, a dog", "c.png": "trg, cat", "d.png": "trg, Dog, red"},
        ),
        (
            bulk.replace_text("dog", "fox"),
            {"a.png": "red, fox", "b.png": "a fox", "c.png": "trg, cat", "d.png": "Dog, red"},
        ),
        (bulk.remove_tag(" dog"), {"a.png": "red", "b.png": "a dog", "c.png": "trg, cat", "d.png": "red"}),
        (bulk.sort_tags("trg"), {"a.png": "dog, red", "b.png": "a dog", "c.png": "trg, cat", "d.png": "Dog, red"}),
    ],
)
def test_a_bulk_change_does_what_its_preview_says_and_is_undone(
    four: Path, operation: bulk.Operation, after: dict[str, str]
):
    before = state(four)
    shown = bulk.preview(list_images(four), operation)
    assert state(four) == before
    bulk.apply(list_images(four), shown.what, shown.edits)
    assert captions(four) == after
    changed = [name for name, content in state(four).items() if content != before[name]]
    assert changed == [edit.name.replace("png", "txt") for edit in shown.edits]
    assert shown.sentence.startswith(f"Will change {len(changed)} caption")
    assert last_deed(four) == operation.what
    assert undo(four).restored == len(changed)
    assert state(four) == before
    assert look(four).problems == []


def test_new_files_are_gone_after_undo(folder: Path):
    add(folder, "a.png")
    before = state(folder)
    shown = bulk.preview(list_images(folder), bulk.add_trigger("trg"))
    bulk.apply(list_images(folder), shown.what, shown.edits)
    assert (folder / "a.txt").read_text() == "trg\n"
    undo(folder)
    assert state(folder) == before


def test_many_lines_of_one_table_are_one_file(folder: Path):
    for number, name in enumerate(("a.png", "b.png")):
        add(folder, name, number=number)
    table = write_table(folder, *(json.dumps({"file_name": f"{n}.png", "text": f"{n} dog"}) + "\n" for n in "ab"))
    before = table.read_bytes()
    shown = bulk.preview(list_images(folder), bulk.replace_text("dog", "cat"))
    assert bulk.apply(list_images(folder), shown.what, shown.edits) == 2
    assert table.read_bytes() == before.replace(b"dog", b"cat")
    assert undo(folder).restored == 1
    assert table.read_bytes() == before


def test_what_a_bulk_change_leaves_is_told(folder: Path):
    add(folder, "a.png", "red\ndog")
    add(folder, "b.png", number=1)
    (folder / "b.json").write_text('"a dog"')
    shown = bulk.preview(list_images(folder), bulk.add_trigger("trg"))
    assert shown.edits == []
    assert [problem.where for problem in shown.left] == ["a.png", "b.png"]
    assert [edit.after for edit in bulk.preview(list_images(folder), bulk.remove_tag("dog")).edits] == ["red\n"]


@pytest.mark.parametrize(
    "make", [lambda: bulk.add_trigger(" "), lambda: bulk.replace_text("", "x"), lambda: bulk.remove_tag("")]
)
def test_nothing_given_is_told(make):
    with pytest.raises(DataError) as caught:
        make()
    assert caught.value.problems[0].fix


def test_a_preview_that_is_out_of_date_changes_nothing(four: Path):
    shown = bulk.preview(list_images(four), bulk.replace_text("dog", "fox"))
    (four / "b.txt").write_text("a wolf")
    before = state(four)
    with pytest.raises(DataError, match="since the preview"):
        bulk.apply(list_images(four), shown.what, shown.edits)
    assert state(four) == before
    assert last_deed(four) == ""


def test_undo_leaves_what_was_changed_since_and_names_it(four: Path):
    shown = bulk.preview(list_images(four), bulk.replace_text("dog", "fox"))
    bulk.apply(list_images(four), shown.what, shown.edits)
    (four / "a.txt").write_text("mine")
    undone = undo(four)
    assert [problem.where for problem in undone.left] == ["a.txt"]
    assert (four / "a.txt").read_text() == "mine"
    assert (four / "b.txt").read_bytes() == b"a dog \n"


def test_deeds_are_undone_last_first(four: Path):
    before = state(four)
    for operation in (bulk.replace_text("dog", "fox"), bulk.replace_text("fox", "owl")):
        shown = bulk.preview(list_images(four), operation)
        bulk.apply(list_images(four), shown.what, shown.edits)
    assert undo(four).what == "replace 'fox' by 'owl'"
    assert captions(four)["a.png"] == "red, fox"
    undo(four)
    assert state(four) == before
    with pytest.raises(DataError, match="nothing to undo"):
        undo(four)


def test_a_journal_from_elsewhere_writes_nowhere_else(four: Path, tmp_path: Path):
    row = {"file": "../stolen.txt", "before": "AAAA", "after": None}
    (four / JOURNAL).write_text(json.dumps({"deeds": [{"what": "x", "moves": [], "changes": [row]}]}))
    with pytest.raises(DataError, match="outside of the folder"):
        undo(four)
    assert not (tmp_path / "stolen.txt").exists()


# ---------------------------------------------------------------------------------------------------------------------
# removal


def test_an_image_goes_with_all_that_is_its_own_and_comes_back(four: Path):
    add(four, "mask/a.png", number=8)
    before = state(four)
    assert remove_images(four, ["a.png"]) == "removed a.png"
    assert sorted(state(four)) == sorted(
        {*before, *(f"{REMOVED}/{name}" for name in ("a.png", "a.txt", "mask/a.png"))}
        - {"a.png", "a.txt", "mask/a.png"}
    )
    found = look(four)
    assert ([item.path.name for item in found.items], found.problems) == (["b.png", "c.png", "d.png"], [])
    assert undo(four).left == []
    assert state(four) == before


def test_a_caption_that_another_image_needs_stays(folder: Path):
    add(folder, "a.png", "both")
    add(folder, "a.jpg", number=1)
    remove_images(folder, ["a.png"])
    assert captions(folder) == {"a.jpg": "both"}
    remove_images(folder, ["a.jpg"])
    assert list_images(folder).files == []


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_the_line_of_a_table_goes_too(folder: Path, kind: str):
    rows = {f"{n}.png": f"the {n}" for n in "abc"}
    lines = [json.dumps({"file_name": name, "text": text}) + "\n" for name, text in rows.items()]
    if kind == "csv":
        lines = ["file_name,text\n", *(f"{name},{text}\n" for name, text in rows.items())]
    for number, name in enumerate(rows):
        add(folder, name, number=number)
    table = write_table(folder, *lines, name=f"metadata.{kind}")
    before = table.read_bytes()
    remove_images(folder, ["b.png"])
    found = look(folder)
    assert ([item.caption for item in found.items], found.problems) == (["the a", "the c"], [])
    undo(folder)
    assert table.read_bytes() == before
    assert (folder / "b.png").is_file()


def test_the_same_name_can_be_removed_twice(folder: Path):
    for number in range(2):
        add(folder, "a.png", f"dog {number}", number)
        remove_images(folder, ["a.png"])
    assert sorted(file.name for file in (folder / REMOVED).iterdir()) == ["a-2.png", "a-2.txt", "a.png", "a.txt"]


def test_undo_does_not_overwrite_what_took_the_place(folder: Path):
    add(folder, "a.png", "old")
    remove_images(folder, ["a.png"])
    add(folder, "a.png", "new", 1)
    assert [problem.where for problem in undo(folder).left] == ["a.txt", "a.png"]
    assert (folder / "a.txt").read_text() == "new"


def test_a_file_that_is_no_image_can_be_removed(four: Path):
    (four / "lost.txt").write_text("of no image")
    (four / "broken.png").write_bytes(b"")
    remove_file(four, "lost.txt")
    remove_file(four, "broken.png")
    assert look(four).problems == []


@pytest.mark.parametrize("name", ["../secret.txt", "nothing.png", "/etc/passwd", ""])
def test_only_files_of_the_folder_can_be_removed(four: Path, name: str):
    (four.parent / "secret.txt").write_text("secret")
    with pytest.raises(LorasmithError, match="no longer"):
        remove_file(four, name)
    assert (four.parent / "secret.txt").is_file()
