"""Caption rules: pure functions from text to text."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as some

from lorasmith.datasets.captions import CaptionRules, caption_variants, has_word, tags, tidy, with_trigger


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


# ---------------------------------------------------------------------------------------------------------------------
# rules

WORDS = some.text(alphabet="abc {}|,[]", max_size=40)
RULES = some.builds(
    CaptionRules,
    trigger=some.sampled_from(["", "sks"]),
    prefix=some.sampled_from(["", "art of "]),
    suffix=some.sampled_from(["", ", fine"]),
    shuffle=some.booleans(),
    keep_tokens=some.integers(0, 4),
    keep_tokens_separator=some.sampled_from(["", "|||"]),
    tag_dropout=some.sampled_from([0.0, 0.5, 0.99]),
    wildcards=some.booleans(),
    variants=some.integers(1, 5),
)


@given(some.lists(WORDS, min_size=1, max_size=3), RULES, some.text(max_size=5))
def test_variants_are_the_same_for_a_seed_and_hold_what_they_must(captions: list[str], rules: CaptionRules, seed: str):
    made = caption_variants(captions, rules, seed)
    assert made == caption_variants(captions, rules, seed)
    assert len(made) in (len(captions), max(rules.variants, len(captions)))
    for text in made:
        assert text == tidy(text)
        assert not rules.trigger or has_word(text, rules.trigger)


def test_without_rules_each_given_caption_is_one_variant():
    assert caption_variants(["a cat", "one cat"], CaptionRules(), "x") == ("a cat", "one cat")


def test_the_trigger_goes_where_its_place_is():
    rules = CaptionRules(trigger="sks", prefix="a drawing, ")
    assert caption_variants(["a cat", "a cat in [trigger] style"], rules, "x") == (
        "sks, a drawing, a cat",
        "a drawing, a cat in sks style",
    )


def test_shuffling_keeps_the_first_tags_and_loses_none():
    rules = CaptionRules(shuffle=True, keep_tokens=2, variants=20)
    made = caption_variants(["a, b, c, d, e"], rules, "x")
    assert all(text.startswith("a, b, ") for text in made)
    assert {tuple(sorted(tags(text))) for text in made} == {("a", "b", "c", "d", "e")}
    assert len(set(made)) > 3


def test_the_separator_of_kept_tags_takes_the_place_of_a_number():
    rules = CaptionRules(shuffle=True, keep_tokens_separator="|||", variants=20)
    made = caption_variants(["a, b ||| c, d, e"], rules, "x")
    assert all(text.startswith("a, b, ") and "|" not in text for text in made)


def test_another_separator_between_tags():
    made = caption_variants(["a. b b. c"], CaptionRules(shuffle=True, separator=".", variants=30), "x")
    assert {tuple(sorted(text.split(". "))) for text in made} == {("a", "b b", "c")}


def test_tags_are_dropped_at_the_rate_and_never_the_kept_ones_or_the_trigger():
    rules = CaptionRules(trigger="sks", tag_dropout=0.3, keep_tokens=1, variants=2000)
    made = caption_variants(["first, sks art, c, d"], rules, "x")
    assert all(text.startswith("first, sks art") for text in made)
    left = Counter(tag for text in made for tag in tags(text))
    assert left["c"] / 2000 == pytest.approx(0.7, abs=0.04)
    assert left["d"] / 2000 == pytest.approx(0.7, abs=0.04)


def test_wildcards_are_drawn_evenly_and_from_within():
    made = caption_variants(
        ["a {red|blue|{dark|light} green} {} {x} cat"], CaptionRules(wildcards=True, variants=3000), "x"
    )
    counts = Counter(made)
    assert set(counts) == {f"a {colour} {{}} {{x}} cat" for colour in ("red", "blue", "dark green", "light green")}
    assert counts["a red {} {x} cat"] / 3000 == pytest.approx(1 / 3, abs=0.04)
    assert counts["a dark green {} {x} cat"] / 3000 == pytest.approx(1 / 6, abs=0.04)


def test_braces_stay_without_the_rule():
    assert caption_variants(["a {red|blue} cat"], CaptionRules(), "x") == ("a {red|blue} cat",)
