"""The form behind the Train page: its document, what its controls show and read, its TOML and its commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.configs import recipe_names
from lorasmith.trainer.commands.preparing import init
from lorasmith.trainer.config import settings
from lorasmith.trainer.configfile import read_config, validate
from lorasmith.trainer.errors import ConfigError
from lorasmith.trainer.jobs import free_name
from lorasmith.ui.planner import Recognised
from lorasmith.ui.train.draft import (
    FACTORS,
    FIELDS,
    choose,
    commands,
    from_text,
    further_tables,
    images_of,
    name_from,
    of_config,
    problems_of,
    quality_of,
    recipe_by,
    standing,
    suggested_prompts,
    to_text,
    value_at,
    with_value,
    without,
)
from lorasmith.ui.train.form import ASKED_ELSEWHERE, SHOWN, bounds_of, changed, looks_of, read, show

POCKET = Recognised("pocket", "sd1", "epsilon", 64)
DRAFT: dict[str, Any] = {
    "name": "my style",
    "recipe": "style-sd1",
    "base": {"model": "pocket"},
    "data": [{"path": "/photos of mine", "trigger": "trg"}],
}


# ---------------------------------------------------------------------------------------------------------------------
# the document


def test_only_what_differs_from_recipe_and_default_is_given():
    assert standing(DRAFT)["optimizer.text_encoder_lr"].value == 2e-5
    assert choose(DRAFT, "optimizer.text_encoder_lr", 2e-5) == DRAFT
    assert choose(DRAFT, "optimizer.lr", 1e-4) == DRAFT
    given_rate = choose(DRAFT, "optimizer.lr", 2e-4)
    assert given_rate == DRAFT | {"optimizer": {"lr": 2e-4}}
    assert choose(given_rate, "optimizer.lr", 1e-4) == DRAFT
    assert choose(given_rate, "optimizer.lr", None) == DRAFT


def test_a_choice_drops_what_it_leaves_without_effect():
    ranked = choose(DRAFT, "adapter.rank", 32)
    full = choose(ranked, "adapter.kind", "full")
    assert full["adapter"] == {"kind": "full"}
    assert problems_of(full) == []


@pytest.mark.parametrize("dotted", ["data.0.weight", "data.1.path", "adapter.rank", "seed"])
def test_a_value_is_given_and_taken_back(dotted: str):
    assert value_at(with_value(DRAFT, dotted, 7), dotted) == 7
    assert without(with_value(DRAFT, dotted, 7), dotted) in (DRAFT, DRAFT | {"data": [*DRAFT["data"], {}]})


def test_each_setting_stands_with_its_origin_and_what_would_hold_without_it():
    stands = standing(choose(DRAFT, "adapter.rank", 32))
    assert (stands["adapter.rank"].origin, stands["adapter.rank"].below) == ("file", 16)
    assert stands["budget.images"].origin == "recipe"
    assert stands["seed"].origin == "default"
    frozen = standing(choose(choose(DRAFT, "recipe", ""), "adapter.text_encoder", False))
    assert (frozen["optimizer.text_encoder_lr"].value, frozen["optimizer.text_encoder_lr"].origin) == (0, "rule")


def test_a_wrong_document_stands_as_it_was_given():
    stands = standing(DRAFT | {"adapter": {"rank": 5000}, "nonsense": 3})
    assert stands["adapter.rank"].value == 5000


def test_a_second_table_is_kept_and_told():
    assert further_tables(DRAFT) == []
    more = from_text(to_text(DRAFT) + '[[data]]\npath = "/more"\n[[block]]\npath = "unet.mid_block"\nrank = 4\n')
    assert further_tables(more) == ["1 further [[data]] table", "1 further [[block]] table"]
    assert [table["path"] for table in choose(more, "data.0.weight", 2.0)["data"]] == ["/photos of mine", "/more"]


@pytest.mark.parametrize("blocks", [[], [{"path": "unet.mid_block", "rank": 2}]], ids=["plain", "with a block"])
def test_a_run_begins_anew_with_what_it_was_given(short_run, blocks: list[dict[str, Any]]):
    config = short_run(adapter={"rank": 8}, block=blocks)
    values = of_config(config, "again")
    assert values["adapter"]["rank"] == 8
    assert "runtime" not in values or "precision" not in values["runtime"]
    again = validate(values)
    assert again == config.model_copy(update={"name": "again", "runs": "runs"})


# ---------------------------------------------------------------------------------------------------------------------
# as text and as commands


def test_the_text_holds_the_document():
    values = choose(choose(DRAFT, "optimizer.options", {"d": 0.8, "x": "y"}), "sample.prompts", ['say "x"', "it's"])
    assert from_text(to_text(values)) == values
    assert to_text(values).startswith('name = "my style"\nrecipe = "style-sd1"\n\n[base]\n')


def test_a_folder_of_runs_in_the_text_is_left_out():
    assert from_text('runs = "/elsewhere"\nseed = 3') == {"seed": 3}


def test_text_that_is_no_toml_is_refused():
    with pytest.raises(ConfigError, match="not valid TOML"):
        from_text("x = = 3")


CHANGES = [
    ("adapter.rank", 8),
    ("adapter.text_encoder", False),
    ("data.0.resolution", [512, 768]),
    ("data.0.caption_prefix", "a photo, "),
    ("optimizer.options", {"eps": 1e-7, "amsgrad": True}),
    ("sample.prompts", ["it's a, b", "plain", 'in "quotes"', "50 % \\ $x `y`"]),
    ("sample.negative_prompt", "'quoted'"),
    ("save.keep", 3),
    ("export.title", "2024"),
    ("sample.every", 0),
]


@pytest.mark.parametrize("shell", ["bash", "powershell"])
@pytest.mark.parametrize("change", [*CHANGES, None], ids=lambda change: change[0] if change else "none")
def test_the_commands_make_the_same_run(shell: Any, change: Any, pictures: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = with_value(DRAFT, "data.0.path", str(pictures))
    values = choose(values, *change) if change else values
    made, trained = commands(values, tmp_path / "my runs", shell).splitlines()
    split = shlex.split if shell == "bash" else split_as_powershell
    run_init(split(made))
    words = split(trained)
    assert words[:3] == ["lorasmith", "train", "my style.toml"]
    config = read_config(Path(words[2]), words[4::2])
    meant = validate(values | {"runs": str(tmp_path / "my runs")})
    assert without_recipe(config) == without_recipe(meant)


def run_init(words: list[str]) -> None:
    assert words[:2] == ["lorasmith", "init"]
    options = dict(zip(words[3::2], words[4::2], strict=True))
    init(Path(words[2]), **{name.removeprefix("--"): value for name, value in options.items()})


def split_as_powershell(line: str) -> list[str]:
    """Single quotes hold everything but themselves, which are doubled."""
    return [
        part[1:-1].replace("''", "'") if part[0] == "'" else part for part in re.findall(r"'(?:[^']|'')*'|\S+", line)
    ]


def without_recipe(config: Any) -> dict[str, Any]:
    """A file that `init` wrote spells its recipe out; paths are those of the file's folder."""
    return config.model_dump() | {"data": [d.model_dump() | {"path": Path(d.path).resolve()} for d in config.data]}


def test_without_a_recipe_the_file_is_what_is_trained():
    told = commands(without(DRAFT, "recipe"), Path("/runs"), "bash")
    assert told == "# save the TOML as my style.toml, then\nlorasmith train 'my style.toml' --set runs=/runs"


def test_for_powershell_no_double_quotes_are_needed():
    assert '"' not in commands(choose(DRAFT, "sample.prompts", ["it's", "a b"]), Path("/runs"), "powershell")


# ---------------------------------------------------------------------------------------------------------------------
# controls


def test_every_setting_has_a_control_or_is_asked_elsewhere():
    shown = {dotted.replace("data.0.", "data.") for dotted in [*SHOWN, *ASKED_ELSEWHERE]}
    assert shown == {dotted for dotted, _ in settings() if not dotted.startswith("block.")}


@pytest.mark.parametrize("dotted", SHOWN)
def test_a_control_gives_back_what_it_shows(dotted: str):
    annotation = SHOWN[dotted].annotation
    for value in [FIELDS[dotted].get_default(call_default_factory=True), *EXAMPLES.get(dotted, [])]:
        assert read(annotation, show(annotation, value)) == value


EXAMPLES: dict[str, list[Any]] = {
    "base.merge": [["a.safetensors:0.6", "b.safetensors"]],
    "data.0.resolution": [512, [512, 768]],
    "optimizer.options": [{"d": 0.8, "word": "x"}],
    "save.keep": [3],
    "export.formats": [["kohya"]],
    "adapter.alpha": [8.0],
}


@pytest.mark.parametrize(
    ("dotted", "typed", "meant"),
    [
        ("data.0.resolution", "512, 768", [512, 768]),
        ("data.0.resolution", "", None),
        ("save.keep", "all", "all"),
        ("adapter.rank", 8.0, 8),
        ("adapter.rank", 8.5, 8.5),
        ("adapter.rank", None, None),
        ("optimizer.options", "no table", "no table"),
        ("adapter.train_only", " unet.mid_block \n\n", ["unet.mid_block"]),
    ],
)
def test_what_is_typed_is_read_as_it_is_meant(dotted: str, typed: Any, meant: Any):
    assert read(SHOWN[dotted].annotation, typed) == meant


@given(st.one_of(st.text(max_size=20), st.integers(), st.booleans(), st.lists(st.integers(), max_size=2)))
def test_whatever_a_document_gives_every_control_can_show(value: Any):
    values = DRAFT
    for dotted, field in SHOWN.items():
        show(field.annotation, value)
        values = with_value(values, dotted, value)
    assert looks_of(values, problems_of(values)).keys() == SHOWN.keys()


def test_marks_say_where_a_value_comes_from():
    looks = looks_of(choose(DRAFT, "adapter.rank", 32), [])
    assert looks["adapter.rank"].label == "Rank (adapter.rank) · changed, else 16"
    assert looks["budget.images"].label == "Images (budget.images) · from the recipe"
    assert looks["seed"].label == "Seed (seed)"
    assert looks["data.0.weight"].label == "Weight (data.weight)"


def test_a_problem_stands_at_its_field():
    wrong = choose(choose(DRAFT, "adapter.rank", 5000), "data.0.caption_dropout", 2.0)
    looks = looks_of(wrong, problems_of(wrong))
    assert looks["adapter.rank"].value == 5000
    assert looks["adapter.rank"].info.startswith("**Problem: should be less than or equal to 1024 (it is 5000).**")
    assert looks["data.0.caption_dropout"].info.startswith("**Problem: ")
    assert [dotted for dotted, look in looks.items() if "Problem" in look.info] == [
        "data.0.caption_dropout",
        "adapter.rank",
    ]


def test_a_control_without_effect_cannot_be_used_and_says_why():
    looks = looks_of(DRAFT, [])
    assert not looks["adapter.conv_rank"].interactive
    assert looks["adapter.conv_rank"].info.startswith("Has no effect while adapter.targets is attention.")
    assert not looks["data.0.keep_tokens"].interactive
    assert looks_of(choose(DRAFT, "adapter.targets", "all"), [])["adapter.conv_rank"].interactive


def test_bounds_are_told_in_words():
    assert bounds_of(SHOWN["adapter.rank"]) == "At least 1 and at most 1,024."
    assert bounds_of(SHOWN["adapter.alpha"]) == "Above 0 and at most 4,096."
    assert bounds_of(SHOWN["sample.seed"]) == "At least 0."
    assert bounds_of(SHOWN["adapter.kind"]) == ""


def test_changed_settings_are_listed_with_what_would_hold():
    assert changed(choose(DRAFT, "adapter.rank", 32)) == [("adapter.rank = 32 (else 16)", "adapter.rank")]


# ---------------------------------------------------------------------------------------------------------------------
# recipe, length, name, prompts


@pytest.mark.parametrize(
    ("base", "teaching", "recipe"),
    [
        (POCKET, "Object", "demo"),
        (Recognised("x", "sd1", "epsilon", 512), "Style", "style-sd1"),
        (Recognised("x", "sdxl", "epsilon", 1024), "Character", "character-sdxl"),
        (Recognised("x", "sdxl", "v_prediction", 1024), "Object", "object-sdxl-v"),
        (Recognised("x", "sd2", "v_prediction", 768), "Character", "style-sd2"),
    ],
)
def test_a_recipe_is_chosen_by_base_and_teaching(base: Recognised, teaching: Any, recipe: str):
    chosen, why = recipe_by(base, teaching)
    assert chosen == recipe
    assert chosen in recipe_names()
    assert why


@pytest.mark.parametrize("quality", FACTORS)
def test_a_quality_sets_the_images_and_nothing_else(quality: Any):
    values = choose(DRAFT, "budget.images", images_of(DRAFT, quality))
    assert quality_of(values) == quality
    assert standing(values)["budget.images"].value == {"Quick": 2000, "Balanced": 4000, "Thorough": 8000}[quality]
    assert without(values, "budget.images") == DRAFT


def test_a_budget_of_ones_own_is_no_quality():
    assert quality_of(choose(DRAFT, "budget.images", 123)) is None


@pytest.mark.parametrize(
    ("folder", "name"),
    [("/a/ink drawings", "ink drawings"), ("/a/10_ink", "ink"), ("/a/été (2)!", "été -2"), ("/", "")],
)
def test_a_name_comes_from_the_folder(folder: str, name: str):
    assert name_from(folder) == name


def test_a_name_in_use_gets_a_number(tmp_path: Path):
    assert free_name(tmp_path, "ink") == "ink"
    (tmp_path / "ink").mkdir()
    assert free_name(tmp_path, "ink") == "ink-2"
    (tmp_path / "ink-2").mkdir()
    assert free_name(tmp_path, "ink-2") == free_name(tmp_path, "ink") == "ink-3"


def test_previews_are_suggested_with_and_without_the_trigger():
    captions = ["trg, emoji of a cat", "trg, emoji of a dog"]
    assert suggested_prompts(POCKET, "Style", "trg", captions) == ["trg emoji of owl", *captions, "emoji of owl"]
    sd1 = Recognised("x", "sd1", "epsilon", 512)
    assert [prompt for prompt in suggested_prompts(sd1, "Object", "trg", captions) if "trg" not in prompt] == [
        "an object on a wooden table"
    ]
    assert suggested_prompts(POCKET, "Style", "", ["emoji of a cat"]) == ["emoji of owl", "emoji of a cat"]
