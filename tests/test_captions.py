"""Caption rules: pure functions from text to text."""

from __future__ import annotations

import pytest

from lorasmith.datasets.captions import has_word, tags, tidy, with_trigger


@pytest.mark.parametrize(
    ("caption", "trigger", "expected"),
    [
        ("a cat", "sks", "sks, a cat"),
        ("", "sks", "sks"),
        ("  ", "sks", "sks"),
        ("a cat", "", "a cat"),
        ("a cat", "  ", "a cat"),
        ("", "", ""),
        (" a cat ", " sks ", "sks, a cat"),
        ("sks, a cat", "sks", "sks, a cat"),
        ("a cat in sks style", "sks", "a cat in sks style"),
        ("a cat in SKS style", "sks", "a cat in SKS style"),
        ("a sksy cat", "sks", "sks, a sksy cat"),
        ("asks", "sks", "sks, asks"),
        ("sks_style cat", "sks", "sks, sks_style cat"),
        ("sks-style cat", "sks", "sks-style cat"),
        ("in my style: a cat", "my style", "in my style: a cat"),
        ("a cat", "<my.style>", "<my.style>, a cat"),
        ("a <my.style> cat", "<my.style>", "a <my.style> cat"),
        ("a <my-style> cat", "<my.style>", "<my.style>, a <my-style> cat"),
        ("猫 の絵", "絵風", "絵風, 猫 の絵"),
    ],
)
def test_the_trigger_is_put_first_unless_it_is_there_as_a_word(caption: str, trigger: str, expected: str):
    assert with_trigger(caption, trigger) == expected


@pytest.mark.parametrize("caption", ["a cat", "", "sks", "a sksy cat"])
def test_putting_the_trigger_twice_changes_nothing_more(caption: str):
    once = with_trigger(caption, "sks")
    assert with_trigger(once, "sks") == once


@pytest.mark.parametrize(
    ("caption", "word", "expected"),
    [
        ("a cat.", "cat", True),
        ("CAT", "cat", True),
        ("cats", "cat", False),
        ("a+b", "a+b", True),
        ("aab", "a+b", False),
    ],
)
def test_a_word_is_found_only_when_it_stands_alone(caption: str, word: str, expected: bool):
    assert has_word(caption, word) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a\r\nb", "a b"), ("\ufeffa", "a"), ("  a \t b\u3000c ", "a b c"), ("", ""), ("\n", "")],
)
def test_tidy_makes_one_line_of_single_spaces(text: str, expected: str):
    assert tidy(text) == expected


@pytest.mark.parametrize(
    ("caption", "expected"),
    [("A cat, On a Mat ,, red", ["a cat", "on a mat", "red"]), ("", []), (" , ", []), ("one", ["one"])],
)
def test_tags_are_the_parts_between_commas(caption: str, expected: list[str]):
    assert tags(caption) == expected
