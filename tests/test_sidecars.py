"""Captions beside images, in every form that is read; what would be ignored is a problem."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lorasmith.datasets import machine
from lorasmith.datasets.folder import Item, look, scan


def write(folder: Path, **texts: str) -> Path:
    """An image `a.png`, and files by name with their text (`__` stands for a dot)."""
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    for name, text in texts.items():
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


def only(folder: Path, **options: Any) -> Item:
    [item] = scan(folder, **options)
    return item


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a cat", ("a cat",)),
        (["a cat", "one cat"], ("a cat", "one cat")),
        ({"caption": " a \n cat"}, ("a cat",)),
        ({"text": "a cat", "width": 3}, ("a cat",)),
        ({"captions": ["a cat", "one cat"]}, ("a cat", "one cat")),
        ({"prompt": "a cat", "seed": 1}, ("a cat",)),
        ({"tags": ["cat", "on a mat"]}, ("cat, on a mat",)),
        ({"tags": "cat, on a mat"}, ("cat, on a mat",)),
        ({"caption": ""}, ("",)),
    ],
)
def test_json_beside_an_image(tmp_path: Path, value: Any, expected: tuple[str, ...]):
    item = only(write(tmp_path, a__json=json.dumps(value)))
    assert (item.captions, item.source) == (expected, "a.json")


@pytest.mark.parametrize(
    "text", ["{", "[]", "3", '{"width": 3}', '{"caption": 3}', "[1]", '{"tags": [1]}', "null", "", "[" * 9999]
)
def test_json_without_a_caption_is_a_problem_of_that_file(tmp_path: Path, text: str):
    [problem] = look(write(tmp_path, a__json=text)).problems
    assert problem.where == str(tmp_path / "a.json")
    assert problem.fix


def test_json_of_no_image_is_no_caption(tmp_path: Path):
    assert only(write(tmp_path, settings__json='{"caption": "x"}')).source == "none"


def test_the_lines_of_a_file_are_one_caption_or_several(tmp_path: Path):
    write(tmp_path, a__txt="a cat,\n\n on a mat \r\n")
    assert only(tmp_path).captions == ("a cat, on a mat",)
    assert only(tmp_path, lines="variants").captions == ("a cat,", "on a mat")


def test_an_empty_file_has_one_empty_variant(tmp_path: Path):
    assert only(write(tmp_path, a__txt=" \n"), lines="variants").captions == ("",)


def test_metadata_csv(tmp_path: Path):
    write(tmp_path, metadata__csv='file_name,width,text\na.png,3,"a cat, on ""a"" mat"\n')
    item = only(tmp_path)
    assert (item.captions, item.source) == (('a cat, on "a" mat',), "metadata.csv line 2")


@pytest.mark.parametrize(
    ("text", "place", "what"),
    [
        ("name,text\na.png,x\n", "metadata.csv", "has no columns file_name and text (it has name, text)"),
        ("", "metadata.csv", "has no columns file_name and text (it has none)"),
        ("file_name,text\nb.png,x\n", "metadata.csv line 2", "names 'b.png', which is no image here"),
        ("file_name,text\na.png\n", "metadata.csv line 2", 'has no "text"'),
        ('file_name,text\na.png,"x\n', "metadata.csv", "is not CSV (unexpected end of data)"),
        ("file_name,text\na.png,x\na.png,y\n", "metadata.csv line 3", "is a second caption for a.png"),
    ],
)
def test_what_is_wrong_in_metadata_csv_is_named_with_its_line(tmp_path: Path, text: str, place: str, what: str):
    [problem] = look(write(tmp_path, metadata__csv=text)).problems
    assert (problem.where, problem.what) == (str(tmp_path / place), what)


def test_a_list_in_metadata_jsonl_is_several_variants(tmp_path: Path):
    write(tmp_path, metadata__jsonl='{"file_name": "a.png", "text": ["a cat", "one cat"]}\n')
    assert only(tmp_path).captions == ("a cat", "one cat")


def test_a_path_out_of_the_folder_in_metadata_names_no_image(tmp_path: Path):
    Image.new("RGB", (64, 64)).save(tmp_path / "secret.png")
    folder = tmp_path / "photos"
    folder.mkdir()
    write(folder, metadata__jsonl='{"file_name": "../secret.png", "text": "x"}\n')
    [problem] = look(folder).problems
    assert "'../secret.png', which is no image here" in problem.what


def test_json_and_text_of_one_image_are_a_problem(tmp_path: Path):
    [problem] = look(write(tmp_path, a__json='"a cat"', a__txt="a dog")).problems
    assert problem.what == "a.png has a caption in a.json already"


def test_a_machines_caption_is_the_machines_until_a_person_edits_it(tmp_path: Path):
    write(tmp_path, a__txt="a cat")
    assert not only(tmp_path).machine
    machine.append(tmp_path, machine.entry_of("a.txt", "a cat", "some/model", "blip"))
    assert only(tmp_path).machine
    (tmp_path / "a.txt").write_text("a cat \n", encoding="utf-8")
    assert only(tmp_path).machine, "white space is no edit"
    (tmp_path / "a.txt").write_text("a black cat", encoding="utf-8")
    assert not only(tmp_path).machine
