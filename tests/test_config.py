"""The configuration: one description of a run, and errors that name their place and their fix."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tomlkit

from lorasmith.configs import read_recipe, recipe_names
from lorasmith.trainer import idle
from lorasmith.trainer.config import RunConfig, settings
from lorasmith.trainer.configfile import (
    merge,
    provenance,
    read_config,
    read_toml,
    read_with_provenance,
    recipe_of,
    set_value,
    to_toml,
    validate,
    write_config,
)
from lorasmith.trainer.errors import ConfigError, Problem

MINIMAL: dict[str, Any] = {"name": "x", "data": [{"path": "photos"}]}


def config_of(**sections: Any) -> RunConfig:
    return validate({**MINIMAL, **sections}, source="run.toml")


def problems_of(values: dict[str, Any]) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        validate(values, source="run.toml")
    return caught.value.problems


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def values_of(config: RunConfig) -> dict[str, Any]:
    """The values by dotted path, the first of a list of tables standing for all, if there is one."""
    return flat({name: first(value) for name, value in config.model_dump().items()})


def first(value: Any) -> Any:
    """The first of a list of tables, an empty one if there is none; anything else as it is."""
    return next(iter(value), {}) if isinstance(value, list) else value


def flat(tables: dict[str, Any]) -> dict[str, Any]:
    """`{"adapter": {"rank": 1}}` as `{"adapter.rank": 1}`."""
    found = {}
    for name, value in tables.items():
        found |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return found


def every_setting() -> set[str]:
    return {dotted for dotted, _ in settings()}


# ---------------------------------------------------------------------------------------------------------------------
# defaults, and the file that is written


def test_three_answers_are_enough_and_the_contract_defaults_follow():
    values = values_of(validate({"name": "my-style", "data": [{"path": "photos/"}], "base": {"model": "pocket"}}))
    contract = {
        "name": "my-style",
        "seed": 42,
        "base.model": "pocket",
        "data.path": "photos/",
        "data.weight": 1.0,
        "adapter.kind": "lora",
        "adapter.rank": 16,
        "adapter.alpha": 16.0,
        "adapter.targets": "attention",
        "adapter.text_encoder": True,
        "budget.images": 2000,
        "budget.batch": 4,
        "budget.accumulate": 1,
        "optimizer.kind": "adamw",
        "optimizer.lr": 1e-4,
        "optimizer.text_encoder_lr": 5e-5,
        "objective.prediction": "auto",
        "objective.min_snr_gamma": 5.0,
        "save.every": 100,
        "save.keep": "all",
        "sample.every": 100,
        "runtime.precision": "auto",
        "runtime.attention": "auto",
    }
    assert {key: values[key] for key in contract} == contract


def test_the_written_file_spells_out_every_setting(tmp_path: Path):
    write_config(config_of(block=[{"path": "unet", "rank": 1}]), tmp_path / "config.toml")
    plain = read_toml(tmp_path / "config.toml")
    assert set(flat({name: first(value) for name, value in plain.items()})) == every_setting()


FULL = {
    "name": "Ölbild 2 - v1.0",
    "seed": 2**63 - 1,
    "runs": "C:\\runs \"quoted\" 'single'",
    "base": {"model": "random:sdxl"},
    "data": [
        {"path": "C:\\Users\\me\\Bilder", "trigger": "my style, 💡", "weight": 0.5, "resolution": 768},
        {"path": "weitere/ä b [1]", "caption_dropout": 0.0},
    ],
    "adapter": {"rank": 8, "alpha": 4.5, "targets": "all", "text_encoder": False, "train_only": ["unet.*", 'a "b"']},
    "block": [{"path": "unet.up_blocks.1", "rank": 4}, {"path": "unet.mid_block", "alpha": 2.5, "lr": 1e-5}],
    "budget": {"images": 1, "batch": 1, "accumulate": 7},
    "optimizer": {"lr": 3e-7, "schedule": "linear", "warmup": 0.0, "weight_decay": 0.0, "max_grad_norm": 0.0}
    | {"options": {"d_coef": 0.8, "growth": 2, "safe": True, "a name": 'of "kind" \\ 1'}},
    "objective": {"prediction": "v_prediction", "min_snr_gamma": 3.0, "noise_offset": 0.05},
    "save": {"every": 0, "keep": 3, "keep_best": True},
    "validation": {"every": 50, "by": "loss", "share": 0.25, "min_images": 8, "draws": 4, "seed": 0, "patience": 3},
    "sample": {"every": 5, "prompts": ["a\nb\ttab", 'quote " \\ back', "\u2028\x7f\x01 # no comment", ""]},
    "export": {
        "formats": ["diffusers", "kohya"],
        "precision": "fp32",
        "metadata": "all",
        "checkpoint": "best",
        "strength": 0.8,
        "bundle": True,
    }
    | {"title": 'My "ink"', "author": "me, 💡", "license": "cc-by-4.0", "tags": ["ink"], "description": "a\n\nb --- c"},
    "runtime": {
        "precision": "bf16",
        "attention": "sdpa",
        "gradient_checkpointing": True,
        "checkpointed_blocks": 3,
        "compile": True,
        "base_weights": "int8",
        "cache": "/tmp/ca che",
    },
}


@pytest.mark.parametrize("comments", [True, False], ids=["with comments", "without comments"])
@pytest.mark.parametrize("values", [MINIMAL, FULL], ids=["defaults", "every kind of value"])
def test_toml_round_trip_keeps_every_value(values: dict[str, Any], comments: bool):
    config = validate(values)
    again = validate(tomlkit.parse(to_toml(config, comments)).unwrap())
    assert again == config


def test_written_file_is_read_back_equal(tmp_path: Path):
    config = validate({**FULL, "data": [{"path": str(tmp_path / "ä b"), "trigger": "sks"}]})
    write_config(config, tmp_path / "config.toml")
    assert read_config(tmp_path / "config.toml") == config


def test_writing_twice_gives_the_same_bytes(tmp_path: Path):
    config = validate(FULL)
    write_config(config, tmp_path / "a.toml")
    write_config(validate(read_toml(tmp_path / "a.toml")), tmp_path / "b.toml")
    assert (tmp_path / "a.toml").read_bytes() == (tmp_path / "b.toml").read_bytes()


def test_comments_hold_the_help_of_every_setting():
    lines = to_toml(config_of(block=[{"path": "unet", "rank": 1}])).splitlines()
    for dotted, field in settings():
        assert field.description, f"{dotted} has no docstring"
        key = dotted.rpartition(".")[2]
        help_line = "# " + field.description.splitlines()[-1].strip()
        assert any(above == help_line and below.startswith(f"{key} =") for above, below in pairwise(lines)), (
            f"{dotted} has no comment above it"
        )


def test_without_comments_no_line_is_a_comment():
    assert [line for line in to_toml(config_of(), comments=False).splitlines() if line.startswith("#")] == []


# ---------------------------------------------------------------------------------------------------------------------
# errors


def test_all_errors_of_a_file_come_at_once_with_dotted_paths(tmp_path: Path):
    file = write(
        tmp_path / "run.toml",
        """
seed = -1
[[data]]
path = "a"
[[data]]
path = "b"
weight = 0
tigger = "sks"
[adapter]
rank = 0
targets = "everything"
rnak = 8
[optimizer]
lr = "fast"
""",
    )
    with pytest.raises(ConfigError) as caught:
        read_config(file)
    assert sorted(problem.where for problem in caught.value.problems) == [
        "run.toml: adapter.rank",
        "run.toml: adapter.rnak",
        "run.toml: adapter.targets",
        "run.toml: data.1.tigger",
        "run.toml: data.1.weight",
        "run.toml: name",
        "run.toml: optimizer.lr",
        "run.toml: seed",
    ]
    assert caught.value.exit_code == 2
    assert len(str(caught.value).splitlines()) == 8


def test_settings_without_effect_are_reported_together_with_other_errors():
    found = problems_of({**MINIMAL, "adapter": {"rnak": 8}, "optimizer": {"lr": 0}})
    assert {problem.where for problem in found} == {"run.toml: adapter.rnak", "run.toml: optimizer.lr"}


def test_a_switch_that_is_wrong_makes_no_second_problem_of_its_rate():
    values = {**MINIMAL, "adapter": {"text_encoder": "no"}, "optimizer": {"text_encoder_lr": 0}}
    assert [problem.where for problem in problems_of(values)] == ["run.toml: adapter.text_encoder"]


def test_settings_without_effect_are_reported_though_a_name_is_missing_and_a_section_is_no_table():
    found = problems_of({"adapter": 3, "optimizer": {"lr": 0}})
    assert sorted(p.where for p in found) == [
        "run.toml: adapter",
        "run.toml: data",
        "run.toml: name",
        "run.toml: optimizer.lr",
    ]


@pytest.mark.parametrize(
    ("values", "where", "fix"),
    [
        ({"adapter": {"rnak": 8}}, "adapter.rnak", "Did you mean adapter.rank?"),
        ({"lr": 1e-4}, "lr", "Did you mean optimizer.lr?"),
        ({"adaptor": {}}, "adaptor", "Did you mean adapter?"),
        ({"data": [{"path": "p", "tigger": "x"}]}, "data.0.tigger", "Did you mean data.trigger?"),
        ({"budget": {"batchsize": 2}}, "budget.batchsize", "Did you mean budget.batch?"),
        ({"base": {"rank": 2}}, "base.rank", "Did you mean adapter.rank?"),
        ({"base": {"adapter": {}}}, "base.adapter", "Known here: base.model, base.vae, base.merge."),
        ({"block": [{"path": "unet", "rnak": 2}]}, "block.0.rnak", "Did you mean block.rank?"),
        ({"sample": {"step": 2}}, "sample.step", "Did you mean sample.steps?"),
        (
            {"save": {"zzz": 2}},
            "save.zzz",
            "Known here: save.every, save.keep, save.keep_best.",
        ),
    ],
    ids=[
        "spelling",
        "wrong section",
        "section",
        "list of tables",
        "longer word",
        "another section",
        "a section in a section",
        "list of blocks",
        "two alike",
        "nothing near",
    ],
)
def test_an_unknown_key_is_an_error_with_a_suggestion(values: dict[str, Any], where: str, fix: str):
    assert problems_of({**MINIMAL, **values}) == [Problem(f"run.toml: {where}", "unknown key", fix)]


@pytest.mark.parametrize("key", ["interval", "int", "constrained_by", "literal[x"])
def test_an_unknown_key_is_named_whatever_it_is_called(key: str):
    assert [problem.where for problem in problems_of({**MINIMAL, "save": {key: 5}})] == [f"run.toml: save.{key}"]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            {"adapter": {"rank": 0}},
            "run.toml: adapter.rank: should be greater than or equal to 1 (it is 0). Width of the low-rank matrices.",
        ),
        (
            {"adapter": {"targets": "everything"}},
            "run.toml: adapter.targets: should be 'attention', 'attention+ff', 'all-linear', 'all' or 'style-blocks' "
            "(it is 'everything').",
        ),
        (
            {"save": {"keep": 0}},
            'run.toml: save.keep: must be "all" or a number of at least 1 (it is 0).',
        ),
        ({"name": ""}, "run.toml: name: String should have at least 1 character (it is '')."),
        ({"data": []}, "run.toml: data: List should have at least 1 item"),
        ({"optimizer": {"lr": float("nan")}}, "run.toml: optimizer.lr: should be a finite number (it is nan)."),
        ({"budget": {"images": 0.5}}, "run.toml: budget.images: should be a valid integer"),
    ],
    ids=["rank 0", "choice", "keep 0", "empty name", "no data", "nan", "half an image"],
)
def test_a_wrong_value_is_shown_with_what_is_allowed(values: dict[str, Any], line: str):
    [problem] = problems_of({**MINIMAL, **values})
    assert str(problem).startswith(line)


def test_a_weight_so_small_that_an_image_would_never_come_is_refused():
    found = problems_of({**MINIMAL, "data": [{"path": "p", "weight": 1e-9}]})
    assert [problem.where for problem in found] == ["run.toml: data.0.weight"]


def test_a_wrong_keep_gives_one_problem():
    assert [problem.where for problem in problems_of({**MINIMAL, "save": {"keep": "some"}})] == ["run.toml: save.keep"]


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("adapter", "rank", True), ("save", "keep", True), ("optimizer", "lr", True), ("budget", "images", "100")],
    ids=["rank true", "keep true", "lr true", "images in quotes"],
)
def test_a_value_of_another_type_is_refused(section: str, key: str, value: Any):
    assert [p.where for p in problems_of({**MINIMAL, section: {key: value}})] == [f"run.toml: {section}.{key}"]


def test_a_whole_number_stands_for_a_float():
    assert config_of(adapter={"alpha": 8}).adapter.alpha == 8.0


def test_missing_answers_say_how_to_give_them():
    assert problems_of({}) == [
        Problem("run.toml: name", "is missing", 'Add a line such as: name = "my-style"'),
        Problem("run.toml: data", "is missing", 'Add a table: [[data]] and under it path = "photos/"'),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# names


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "a/b",
        "a\\b",
        "..",
        ".",
        ".hidden",
        "-x",
        "_x",
        " x",
        "x ",
        "x.",
        "a:b",
        "a\nb",
        "a\n",
        "a*",
        'a"b',
        "a|b",
    ],
)
def test_a_name_that_is_no_plain_file_name_is_refused(name: str):
    [problem] = problems_of({**MINIMAL, "name": name})
    assert problem.where == "run.toml: name"
    assert problem.what.startswith("must start with a letter or digit and hold only letters, digits, spaces and . _ -")


@pytest.mark.parametrize("name", ["con", "NUL", "aux", "com1", "LPT9", "nul.v2"])
def test_a_name_that_windows_reserves_is_refused(name: str):
    assert [problem.where for problem in problems_of({**MINIMAL, "name": name})] == ["run.toml: name"]


@pytest.mark.parametrize("name", ["a", "my-style", "My Style 2.1", "Öl", "絵", "2nd_try", "console", "x" * 100])
def test_a_plain_name_is_kept(name: str):
    assert config_of(name=name).name == name


@pytest.mark.parametrize("name", ["絵" * 67, "ü" * 100 + "x"])
def test_a_name_of_more_bytes_than_a_disk_takes_with_its_suffixes_is_refused(name: str):
    assert [problem.where for problem in problems_of({**MINIMAL, "name": name})] == ["run.toml: name"]


def test_a_name_of_101_letters_is_refused():
    assert [problem.where for problem in problems_of({**MINIMAL, "name": "x" * 101})] == ["run.toml: name"]


# ---------------------------------------------------------------------------------------------------------------------
# settings without effect


@pytest.mark.parametrize(
    ("key", "part"), [("lr", "unet"), ("text_encoder_lr", "text_encoder")], ids=["unet", "text encoder"]
)
def test_learning_rate_0_of_a_trained_part_is_an_error(key: str, part: str):
    assert problems_of({**MINIMAL, "optimizer": {key: 0}}) == [
        Problem(
            f"run.toml: optimizer.{key}",
            f"is 0, so adapter.{part} would be trained without changing",
            f"Give a rate above 0, or set adapter.{part} = false.",
        )
    ]


def test_both_learning_rates_0_are_two_problems():
    found = problems_of({**MINIMAL, "optimizer": {"lr": 0, "text_encoder_lr": 0}})
    assert [problem.where for problem in found] == ["run.toml: optimizer.lr", "run.toml: optimizer.text_encoder_lr"]


def test_a_part_switched_off_by_name_may_have_rate_0_and_reads_0_if_not_given():
    off = {"text_encoder": False}
    assert config_of(adapter=off).optimizer.text_encoder_lr == 0
    assert config_of(adapter=off, optimizer={"text_encoder_lr": 0}).optimizer.text_encoder_lr == 0
    assert config_of(adapter=off).optimizer.lr == 1e-4


def test_a_rate_for_a_part_that_is_off_has_no_effect_and_is_an_error():
    assert problems_of({**MINIMAL, "adapter": {"unet": False}, "optimizer": {"lr": 1e-3}}) == [
        Problem(
            "run.toml: optimizer.lr",
            "has no effect, because adapter.unet is false",
            "Remove it (or set it to 0), or set adapter.unet = true.",
        )
    ]


def test_nothing_trained_is_an_error():
    [problem] = problems_of({**MINIMAL, "adapter": {"unet": False, "text_encoder": False}})
    assert problem.where == "run.toml: adapter.unet"
    assert problem.what == "nothing is trained: adapter.text_encoder is off as well"


PREVIEWS = {"prompts": ["a"]}


def test_what_describes_previews_that_are_never_drawn_is_an_error():
    found = problems_of({**MINIMAL, "sample": {"every": 0, **PREVIEWS}})
    assert found == [
        Problem(
            f"run.toml: sample.{key}",
            "has no effect, because sample.every is 0",
            "Remove it, or set sample.every above 0.",
        )
        for key in PREVIEWS
    ]


def test_a_complete_file_without_previews_spells_out_the_defaults_and_is_valid():
    config = config_of(sample={"every": 0})
    assert validate(tomlkit.parse(to_toml(config)).unwrap()) == config


def test_previews_of_no_effect_are_reported_with_other_errors_and_a_wrong_one_once():
    values = {"every": 0, "prompts": [3], "steps": 0}
    found = problems_of({**MINIMAL, "sample": values, "adapter": {"rnak": 1}})
    assert sorted(problem.where for problem in found) == [
        "run.toml: adapter.rnak",
        "run.toml: sample.prompts.0",
        "run.toml: sample.steps",
    ]


def test_convolutions_of_a_unet_that_is_not_trained_are_an_error():
    text_only = {"unet": False, "targets": "all"}
    assert problems_of({**MINIMAL, "adapter": text_only}) == [
        Problem(
            "run.toml: adapter.targets",
            'is the same as "attention+ff", because adapter.unet is false',
            'Set adapter.targets = "attention+ff", or adapter.unet = true.',
        )
    ]
    assert config_of(adapter={**text_only, "targets": "attention+ff"}).optimizer.lr == 0


OTHER: dict[str, Any] = {
    "adapter.rank": 8,
    "adapter.alpha": 8.0,
    "adapter.conv_rank": 4,
    "adapter.conv_alpha": 4.0,
    "adapter.rslora": True,
    "adapter.init": "gaussian",
    "adapter.dropout": 0.1,
    "adapter.rank_dropout": 0.1,
    "adapter.module_dropout": 0.1,
    "adapter.decompose_factor": 8,
    "adapter.block_size": 8,
    "adapter.targets": "attention+ff",
    "adapter.start_from": "a.safetensors",
    "adapter.token_init": "ink drawing",
    "optimizer.loraplus_ratio": 16.0,
    "optimizer.schedule_cycles": 5,
    "optimizer.schedule_power": 3.0,
    "optimizer.schedule_decay": 0.3,
    "optimizer.schedule_floor": 0.1,
    "optimizer.token_lr": 1e-2,
    "objective.min_snr_gamma": 1.0,
    "objective.huber_c": 0.2,
    "objective.huber_schedule": "constant",
    "objective.timestep_mean": 1.0,
    "objective.timestep_std": 2.0,
    "objective.multires_noise_discount": 0.8,
    "sample.prompts": ["a"],
    "validation.by": "scores",
    "validation.share": 0.2,
    "validation.min_images": 8,
    "validation.draws": 4,
    "validation.seed": 1,
    "validation.patience": 3,
    "save.keep_best": True,
    "export.tag_threshold": 5,
    "export.strength": 0.8,
    "runtime.fast_lora": False,
    "runtime.autocast": True,
    "runtime.flat_optimizer": False,
    "runtime.checkpointed_blocks": 2,
}
"""Of settings that depend on others, a value that is not the default."""
WITHOUT = {
    "adapter.kind": ("oft", "lokr", "loha", "dora", "full", "lora"),
    "adapter.targets": ("attention",),
    "optimizer.kind": ("lion", "adafactor"),
    "optimizer.schedule": ("constant", "cosine"),
    "objective.weighting": ("none", "debiased"),
    "objective.loss": ("mse", "l1"),
    "objective.timesteps": ("uniform",),
    "export.metadata": ("all", "none"),
    "runtime.gradient_checkpointing": (False,),
    "validation.by": ("scores",),
}
"""Values of the settings they depend on."""


def with_values(*settings: tuple[str, Any]) -> dict[str, Any]:
    """A minimal run with values at dotted paths; a trigger, which new tokens need, stands in its data."""
    values: dict[str, Any] = {"name": "x", "data": [{"path": "photos", "trigger": "sks"}]}
    for dotted, value in settings:
        section, _, key = dotted.partition(".")
        values.setdefault(section, {})[key] = value
    return values


def shown(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


@pytest.mark.parametrize("setting", idle.ONLY_WITH)
def test_a_setting_that_goes_with_some_choices_is_an_error_with_the_others(setting: str):
    choice, values = idle.ONLY_WITH[setting]
    needed = [(number, 2) for dotted, number in idle.OF_NUMBERS.items() if dotted in (setting, choice)]
    for other in (other for other in WITHOUT[choice] if other not in values):
        found = problems_of(with_values((setting, OTHER[setting]), (choice, other), *needed))
        assert found == [
            Problem(
                f"run.toml: {setting}",
                f"has no effect, because {choice} is {shown(other)}",
                f"Remove it, or set {choice} = {shown(values[0])}.",
            )
        ]
    for value in values:
        given = with_values((setting, OTHER[setting]), (choice, value), *needed)
        assert values_of(validate(given))[setting] == OTHER[setting]


@pytest.mark.parametrize("setting", idle.OF_NUMBERS)
def test_a_setting_that_goes_with_a_number_is_an_error_where_that_is_0(setting: str):
    number = idle.OF_NUMBERS[setting]
    assert problems_of(with_values((setting, OTHER[setting]), (number, 0))) == [
        Problem(f"run.toml: {setting}", f"has no effect, because {number} is 0", f"Remove it, or set {number} above 0.")
    ]
    assert values_of(validate(with_values((setting, OTHER[setting]), (number, 2))))[setting] == OTHER[setting]


OF_DATA = {
    "prior_loss_weight": 0.5,
    "caption_separator": ";",
    "keep_tokens": 1,
    "keep_tokens_separator": "|||",
    "caption_variants": 3,
    "augmentations": 2,
}
SWITCHED_ON = {
    "regularization": True,
    "shuffle_caption": True,
    "caption_tag_dropout": 0.1,
    "wildcards": True,
    "crop": "random",
    "crop_jitter": 0.1,
    "colour_jitter": 0.1,
}


@pytest.mark.parametrize("setting", idle.OF_SWITCHES)
def test_a_setting_of_a_data_table_that_waits_for_a_switch_is_an_error(setting: str):
    switches, fix = idle.OF_SWITCHES[setting]
    style, other = {"path": "a"}, {"path": "b", setting: OF_DATA[setting]}
    [problem] = problems_of({"name": "x", "data": [style, other]})
    assert (problem.where, problem.fix) == (f"run.toml: data.1.{setting}", f"Remove it, or set {fix}.")
    assert [switch for switch in switches if f"data.{switch}" not in problem.what] == []
    for switch in switches:
        assert validate({"name": "x", "data": [style, other | {switch: SWITCHED_ON[switch]}]})


CONTRADICTIONS: dict[str, tuple[list[tuple[str, Any]], str, str, list[tuple[str, Any]]]] = {
    "convolutions of a text encoder": (
        [("adapter.unet", False), ("adapter.targets", "all-linear")],
        "adapter.targets",
        'Set adapter.targets = "attention+ff", or adapter.unet = true.',
        [("adapter.unet", False), ("adapter.targets", "attention+ff")],
    ),
    "style blocks of a text encoder": (
        [("adapter.targets", "style-blocks")],
        "adapter.targets",
        "Set adapter.text_encoder = false.",
        [("adapter.targets", "style-blocks"), ("adapter.text_encoder", False)],
    ),
    "convolutions without a rank": (
        [("adapter.kind", "boft"), ("adapter.targets", "all"), ("adapter.conv_rank", 4)],
        "adapter.conv_rank",
        'Remove it, or set adapter.kind = "lora".',
        [("adapter.kind", "loha"), ("adapter.targets", "all"), ("adapter.conv_rank", 4)],
    ),
    "convolutions that are rotated": (
        [("adapter.kind", "oft"), ("adapter.targets", "all")],
        "adapter.kind",
        'Set adapter.targets = "all-linear", or adapter.kind = "boft".',
        [("adapter.kind", "oft"), ("adapter.targets", "all-linear")],
    ),
    "the base's directions with dora": (
        [("adapter.kind", "dora"), ("adapter.init", "pissa")],
        "adapter.init",
        'Set adapter.init = "default".',
        [("adapter.kind", "dora"), ("adapter.init", "gaussian")],
    ),
    "two places to start from": (
        [("adapter.start_from", "a.safetensors"), ("adapter.init", "gaussian")],
        "adapter.init",
        "Remove one of the two.",
        [("adapter.start_from", "a.safetensors")],
    ),
    "tokens with whole weights": (
        [("adapter.kind", "full"), ("adapter.new_tokens", 2)],
        "adapter.new_tokens",
        "Remove it.",
        [("adapter.new_tokens", 2)],
    ),
    "tokens without a trigger": (
        [("adapter.new_tokens", 2), ("data", [{"path": "a"}])],
        "adapter.new_tokens",
        'Set data.trigger = "mystyle".',
        [("adapter.new_tokens", 2)],
    ),
    "tokens for several triggers": (
        [("adapter.new_tokens", 2), ("data", [{"path": "a", "trigger": "a"}, {"path": "b", "trigger": "b"}])],
        "adapter.new_tokens",
        "Give all [[data]] tables of the style the same trigger.",
        [
            ("adapter.new_tokens", 2),
            ("data", [{"path": "a", "trigger": "a"}, {"path": "b", "regularization": True}]),
        ],
    ),
    "pure noise with epsilon": (
        [("objective.zero_terminal_snr", "on"), ("objective.prediction", "epsilon")],
        "objective.zero_terminal_snr",
        'Set it to "off", or objective.prediction = "v_prediction".',
        [("objective.zero_terminal_snr", "on"), ("objective.prediction", "v_prediction")],
    ),
    "time-steps the wrong way round": (
        [("objective.min_timestep", 500), ("objective.max_timestep", 499)],
        "objective.min_timestep",
        "Exchange the two.",
        [("objective.min_timestep", 500), ("objective.max_timestep", 500)],
    ),
    "longer than the run": (
        [("optimizer.schedule", "wsd"), ("optimizer.warmup", 0.5), ("optimizer.schedule_decay", 0.6)],
        "optimizer.schedule_decay",
        "Lower one of the two.",
        [("optimizer.schedule", "wsd"), ("optimizer.warmup", 0.5), ("optimizer.schedule_decay", 0.5)],
    ),
    "a block that changes nothing": (
        [("block", [{"path": "unet", "rank": 2}, {"path": "unet.mid_block"}])],
        "block.1",
        "Give it a rank, an alpha or a learning rate.",
        [("block", [{"path": "unet", "rank": 2}, {"path": "unet.mid_block", "lr": 1e-5}])],
    ),
    "a block's rank without ranks": (
        [("adapter.kind", "full"), ("block", [{"path": "unet", "rank": 2}])],
        "block.0.rank",
        'Remove it, or set adapter.kind = "lora".',
        [("adapter.kind", "full"), ("block", [{"path": "unet", "lr": 1e-6}])],
    ),
    "the weight of what no mask covers": (
        [("data", [{"path": "a", "mask": "none", "unmasked_weight": 0.1}])],
        "data.0.unmasked_weight",
        "Remove it.",
        [("data", [{"path": "a", "mask": "alpha", "unmasked_weight": 0.1}])],
    ),
    "a format of something else": (
        [("adapter.kind", "loha"), ("export.formats", ["kohya", "diffusers"])],
        "export.formats.1",
        'Formats: "kohya".',
        [("adapter.kind", "full"), ("export.formats", ["ldm", "diffusers"])],
    ),
    "a format twice": (
        [("export.formats", ["kohya", "kohya"])],
        "export.formats.1",
        "Remove one of the two.",
        [("export.formats", ["diffusers", "kohya"])],
    ),
    "no images of the style": (
        [("data", [{"path": "a", "regularization": True}])],
        "data.0.regularization",
        "Add a [[data]] table with the images of the style.",
        [("data", [{"path": "a", "regularization": True}, {"path": "b"}])],
    ),
}
"""Values that rule one another out, the place and the fix that are named, and values that go together."""


def given_at(settings: list[tuple[str, Any]]) -> dict[str, Any]:
    tables = {name: value for name, value in settings if "." not in name}
    return with_values(*[(name, value) for name, value in settings if "." in name]) | tables


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_settings_that_rule_each_other_out_are_an_error_with_its_place_and_fix(case: str):
    wrong, where, fix, right = CONTRADICTIONS[case]
    [problem] = problems_of(given_at(wrong))
    assert (problem.where, problem.fix) == (f"run.toml: {where}", fix)
    assert validate(given_at(right))


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr", "oft", "boft", "full"])
def test_a_complete_file_of_any_kind_is_valid(kind: str):
    """It spells out the defaults of settings that have no effect."""
    config = config_of(adapter={"kind": kind})
    assert validate(tomlkit.parse(to_toml(config)).unwrap()) == config


def test_a_choice_that_is_wrong_makes_no_second_problem_of_what_depends_on_it():
    values = with_values(("adapter.kind", "lokor"), ("adapter.decompose_factor", 8), ("objective.loss", "hubber"))
    values["objective"]["huber_c"] = 0.2
    assert [p.where for p in problems_of(values)] == ["run.toml: adapter.kind", "run.toml: objective.loss"]


def test_blocks_and_data_without_effect_are_reported_with_other_errors():
    values = {"name": "x", "data": [{"path": "p", "augmentations": 2}], "block": [{"path": "unet"}], "seed": -1}
    assert [p.where for p in problems_of(values)] == [
        "run.toml: seed",
        "run.toml: block.0",
        "run.toml: data.0.augmentations",
    ]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"betas": [0.9, 0.99]}, "betas is [0.9, 0.99]"),
        ({"a": 1, "b": {"c": 1}}, "b is {'c': 1}"),
        ({"d_coef": float("inf")}, "d_coef is inf"),
        ("d_coef=0.8", "must be a table"),
    ],
)
def test_options_of_another_type_are_one_problem_that_names_them(options: Any, told: str):
    [problem] = problems_of({**MINIMAL, "optimizer": {"options": options}})
    assert problem.where == "run.toml: optimizer.options"
    assert told in problem.what
    assert problem.fix.startswith("Further arguments of the optimizer")


def test_options_keep_their_types():
    options = {"d_coef": 0.8, "steps": 1, "safe": True, "mode": "fast"}
    found = config_of(optimizer={"options": options}).optimizer.options
    assert [(name, type(value)) for name, value in found.items()] == [(n, type(v)) for n, v in options.items()]


# ---------------------------------------------------------------------------------------------------------------------
# precedence and --set


def test_precedence_is_default_then_recipe_then_file_then_set(tmp_path: Path):
    text = 'name = "x"\nrecipe = "demo"\n[[data]]\npath = "p"\n[adapter]\nalpha = 3\n[budget]\nbatch = 3\nimages = 30\n'
    found = values_of(read_config(write(tmp_path / "run.toml", text), ["budget.images=40", "seed=4"]))
    recipe = flat(read_recipe("demo"))
    expected = {
        "adapter.alpha": 3.0,
        "adapter.targets": recipe["adapter.targets"],
        "budget.batch": 3,
        "budget.images": 40,
        "budget.accumulate": 1,
        "optimizer.lr": recipe["optimizer.lr"],
        "sample.prompts": recipe["sample.prompts"],
        "seed": 4,
    }
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("override", "dotted", "value"),
    [
        ("adapter.rank=8", "adapter.rank", 8),
        ("adapter.rank = 8 ", "adapter.rank", 8),
        ("optimizer.lr=3e-4", "optimizer.lr", 3e-4),
        ("runtime.gradient_checkpointing=true", "runtime.gradient_checkpointing", True),
        ("adapter.targets=attention+ff", "adapter.targets", "attention+ff"),
        ('adapter.targets="attention+ff"', "adapter.targets", "attention+ff"),
        ("save.keep=2", "save.keep", 2),
        ("save.keep=all", "save.keep", "all"),
        ('sample.prompts=["a, b", "c"]', "sample.prompts", ["a, b", "c"]),
        ("sample.negative_prompt=", "sample.negative_prompt", ""),
        ("sample.negative_prompt=a=b", "sample.negative_prompt", "a=b"),
        ("objective.weighting=none", "objective.weighting", "none"),
        ("optimizer.options.d_coef=0.8", "optimizer.options", {"d_coef": 0.8}),
        ("optimizer.options.mode=fast", "optimizer.options", {"mode": "fast"}),
        ("base.merge=['a.safetensors:0.6']", "base.merge", ["a.safetensors:0.6"]),
        ("data.caption_prefix=a drawing of ", "data.caption_prefix", "a drawing of "),
        ("data.caption_suffix= , ink", "data.caption_suffix", " , ink"),
        ('data.caption_prefix= "a " ', "data.caption_prefix", "a "),
        ("data.trigger=sks", "data.trigger", "sks"),
        ("data.0.trigger=sks", "data.trigger", "sks"),
        ("name=2024 b", "name", "2024 b"),
        ('name="2024"', "name", "2024"),
        ("name=2024", "name", "2024"),
        ("name=2024-01-01", "name", "2024-01-01"),
        ("name=true", "name", "true"),
        ("data.0.trigger=1e5", "data.trigger", "1e5"),
        ("runs=C:\\my runs", "runs", "C:\\my runs"),
    ],
)
def test_set_gives_a_value_its_type(tmp_path: Path, override: str, dotted: str, value: Any):
    file = write(tmp_path / "run.toml", 'name = "x"\n[[data]]\npath = "p"\n')
    found = values_of(read_config(file, [override]))[dotted]
    assert (found, type(found)) == (value, type(value))


def test_the_last_of_two_sets_wins(tmp_path: Path):
    file = write(tmp_path / "run.toml", 'name = "x"\n[[data]]\npath = "p"\n')
    assert read_config(file, ["adapter.rank=8", "adapter.rank=9"]).adapter.rank == 9


def test_set_reaches_each_data_table_and_can_add_one(tmp_path: Path):
    file = write(tmp_path / "run.toml", 'name = "x"\n[[data]]\npath = "p"\n[[data]]\npath = "q"\n')
    config = read_config(file, ["data.path=a", "data.1.path=b", "data.2.path=c", "data.2.weight=2"])
    assert [Path(data.path).name for data in config.data] == ["a", "b", "c"]
    assert [data.weight for data in config.data] == [1.0, 1.0, 2.0]


def test_set_reaches_each_block_and_can_add_one(tmp_path: Path):
    text = 'name = "x"\n[[data]]\npath = "p"\n[[block]]\npath = "unet.mid_block"\nrank = 2\n'
    file = write(tmp_path / "run.toml", text)
    assert [block.rank for block in read_config(file, ["block.0.rank=4"]).block] == [4]
    assert [block.rank for block in read_config(file, ["block.rank=4"]).block] == [4]
    added = read_config(file, ["block.1.path=unet", "block.1.lr=1e-5"]).block
    assert [(block.path, block.rank, block.lr) for block in added] == [("unet.mid_block", 2, 0), ("unet", 0, 1e-5)]


def test_set_adds_an_option_to_those_of_the_file(tmp_path: Path):
    text = 'name = "x"\n[[data]]\npath = "p"\n[optimizer]\noptions = { growth = 2.0, d_coef = 1.0 }\n'
    config = read_config(write(tmp_path / "run.toml", text), ["optimizer.options.d_coef=0.8"])
    assert config.optimizer.options == {"growth": 2.0, "d_coef": 0.8}


def test_set_can_give_the_only_data_table(tmp_path: Path):
    file = write(tmp_path / "run.toml", 'name = "x"\n')
    assert Path(read_config(file, ["data.path=a"]).data[0].path) == (tmp_path / "a").resolve()


@pytest.mark.parametrize(
    "override",
    [
        "adapter.rank",
        "=3",
        "adapter..rank=3",
        ".rank=3",
        "data.3.path=x",
        "data.-1.path=x",
        "data.².path=x",
        "data.0.path.x=1",
        "name.a.b=1",
    ],
)
def test_a_set_that_names_no_setting_is_refused_with_its_place(tmp_path: Path, override: str):
    file = write(tmp_path / "run.toml", 'name = "x"\n[[data]]\npath = "p"\n')
    with pytest.raises(ConfigError) as caught:
        read_config(file, [override])
    assert [problem.where for problem in caught.value.problems] == [f"--set {override}"]


def test_set_of_an_unknown_key_is_an_error(tmp_path: Path):
    file = write(tmp_path / "run.toml", 'name = "x"\n[[data]]\npath = "p"\n')
    with pytest.raises(ConfigError, match=r"adapter\.rnak: unknown key\. Did you mean adapter\.rank\?"):
        read_config(file, ["adapter.rnak=8"])


def test_a_wrong_value_is_placed_where_it_was_given(tmp_path: Path):
    file = write(tmp_path / "run.toml", 'name = "x"\nseed = -1\n[[data]]\npath = "p"\n[adapter]\nrank = 0\n')
    with pytest.raises(ConfigError) as caught:
        read_config(file, ["adapter.rnak=8", "data.weight=0", "optimizer.lr=0", "nothing.at.all=1", "adapter.rank=-1"])
    assert sorted(problem.where for problem in caught.value.problems) == [
        "--set adapter.rank",
        "--set adapter.rnak",
        "--set data.0.weight",
        "--set nothing",
        "--set optimizer.lr",
        "run.toml: seed",
    ]


@pytest.mark.parametrize(("part", "rate"), [("unet", "lr"), ("text_encoder", "text_encoder_lr")])
def test_a_part_that_set_switches_off_needs_no_second_set_for_its_rate(tmp_path: Path, part: str, rate: str):
    write_config(config_of(), tmp_path / "complete.toml")
    config = read_config(tmp_path / "complete.toml", [f"adapter.{part}=false"])
    assert getattr(config.optimizer, rate) == 0
    with pytest.raises(ConfigError, match=rf"--set optimizer\.{rate}: has no effect"):
        read_config(tmp_path / "complete.toml", [f"adapter.{part}=false", f"optimizer.{rate}=1e-3"])


def test_previews_that_set_switches_off_need_no_second_set_for_what_describes_them(tmp_path: Path):
    write_config(config_of(sample={"every": 5, "steps": 3, **PREVIEWS}), tmp_path / "complete.toml")
    config = read_config(tmp_path / "complete.toml", ["sample.every=0"])
    assert config.sample == config_of(sample={"every": 0, "steps": 3}).sample
    with pytest.raises(ConfigError, match=r"--set sample\.prompts: has no effect"):
        read_config(tmp_path / "complete.toml", ["sample.every=0", 'sample.prompts=["a"]'])
    with pytest.raises(ConfigError, match=r"--set sample\.every: should be a valid integer"):
        read_config(tmp_path / "complete.toml", ["sample.every=false"])


@pytest.mark.parametrize(
    ("given", "override", "dropped"),
    [
        ({"adapter": {"rank": 32, "alpha": 8.0, "targets": "all"}}, "adapter.kind=full", ["rank", "alpha", "targets"]),
        ({"objective": {"min_snr_gamma": 1.0}}, "objective.weighting=none", ["min_snr_gamma"]),
        ({"adapter": {"new_tokens": 2, "token_init": "ink"}}, "adapter.new_tokens=0", ["token_init"]),
    ],
    ids=["kind", "weighting", "tokens"],
)
def test_a_choice_made_by_set_drops_what_the_file_says_to_no_effect(
    tmp_path: Path, given: dict[str, Any], override: str, dropped: list[str]
):
    [section] = given
    data = [{"path": "p", "trigger": "sks"}]
    write_config(validate({"name": "x", "data": data, **given}), tmp_path / "complete.toml")
    table = getattr(read_config(tmp_path / "complete.toml", [override]), section)
    assert [key for key in dropped if not idle.is_default(table, key)] == []
    with pytest.raises(ConfigError, match=rf"--set {section}\.{dropped[0]}: has no effect"):
        read_config(tmp_path / "complete.toml", [override, f"{section}.{dropped[0]}={given[section][dropped[0]]}"])


def test_an_optimizer_that_finds_its_own_rate_is_not_given_the_one_of_the_file(tmp_path: Path):
    write_config(config_of(), tmp_path / "complete.toml")
    found = read_config(tmp_path / "complete.toml", ["optimizer.kind=prodigy"]).optimizer
    assert (found.lr, found.text_encoder_lr) == (1, 1)
    given = read_config(tmp_path / "complete.toml", ["optimizer.kind=prodigy", "optimizer.lr=0.5"]).optimizer
    assert (given.lr, given.text_encoder_lr) == (0.5, 1)


# ---------------------------------------------------------------------------------------------------------------------
# recipes, and where values come from


def test_a_recipe_that_is_not_shipped_is_an_error_that_lists_those_that_are():
    [problem] = problems_of({**MINIMAL, "recipe": "style-sd4"})
    assert problem.where == "run.toml: recipe"
    assert problem.what == f"there is no such recipe; shipped are {', '.join(recipe_names())} (it is 'style-sd4')"
    with pytest.raises(ConfigError, match=r"--set recipe: there is no such recipe"):
        validate(MINIMAL, overrides=["recipe=x"])


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_recipe_stands_for_what_the_file_leaves_out(recipe: str):
    found, expected = values_of(validate({**MINIMAL, "recipe": recipe})), flat(read_recipe(recipe))
    assert {key: found[key] for key in expected} == expected
    assert found == values_of(validate(MINIMAL, overrides=[f"recipe={recipe}"]))


def test_what_the_file_switches_off_drops_what_the_recipe_sets_for_it():
    config = config_of(recipe="style-sd1", adapter={"text_encoder": False}, optimizer={"kind": "prodigy"})
    assert (config.optimizer.text_encoder_lr, config.optimizer.lr) == (0, 1)
    assert config_of(recipe="demo", adapter={"kind": "full"}).adapter.targets == "attention"


def test_a_recipe_set_over_a_complete_file_has_no_effect_and_is_an_error(tmp_path: Path):
    write_config(config_of(recipe="style-sd1"), tmp_path / "complete.toml")
    with pytest.raises(ConfigError, match=r"--set recipe: has no effect, because the file spells out everything"):
        read_config(tmp_path / "complete.toml", ["recipe=style-sdxl"])


def origins_of(tmp_path: Path, values: dict[str, Any], *overrides: str) -> dict[str, str]:
    return dict(read_with_provenance(write(tmp_path / "run.toml", tomlkit.dumps(values)), overrides)[1])


def test_every_value_has_an_origin(tmp_path: Path):
    values = {
        "name": "x",
        "recipe": "style-sd1",
        "data": [{"path": "a"}, {"path": "b", "weight": 2.0, "flip": False}],
        "adapter": {"alpha": 8.0, "text_encoder": False},
        "budget": {"batch": 4, "accumulate": 3},
        "block": [{"path": "unet", "rank": 2}],
        "optimizer": {"options": {"eps": 1e-7}},
    }
    found = origins_of(tmp_path, values, "adapter.rank=16", "data.1.weight=3", "optimizer.options.amsgrad=true")
    expected = {
        "name": "file",
        "seed": "default",
        "recipe": "file",
        "data.0.path": "file",
        "data.0.weight": "default",
        "data.1.weight": "--set",
        "data.1.flip": "default",
        "adapter.rank": "--set",
        "adapter.alpha": "file",
        "adapter.targets": "recipe",
        "adapter.text_encoder": "file",
        "budget.batch": "recipe",
        "budget.accumulate": "file",
        "block.0.path": "file",
        "block.0.rank": "file",
        "block.0.alpha": "default",
        "optimizer.lr": "recipe",
        "optimizer.text_encoder_lr": "rule",
        "optimizer.options": "--set",
        "runtime.cache": "default",
    }
    assert {key: found[key] for key in expected} == expected
    assert len(found) == len(values_of(config_of(block=values["block"]))) + len(values_of(config_of()).keys() & {
        key for key in every_setting() if key.startswith("data.")
    })  # fmt: skip


def test_what_a_complete_file_repeats_comes_from_what_it_repeats(tmp_path: Path):
    config = config_of(recipe="style-sdxl", adapter={"rank": 8})
    write_config(config, tmp_path / "complete.toml")
    _, found = read_with_provenance(tmp_path / "complete.toml")
    by_file = {dotted for dotted, origin in found.items() if origin == "file"}
    assert by_file == {"name", "recipe", "data.0.path", "adapter.rank"} | {"optimizer.text_encoder_lr"}
    assert found["adapter.alpha"] == found["optimizer.lr"] == "recipe"
    assert found["seed"] == "default"


def test_the_origin_of_rates_that_nobody_gave_is_a_rule(tmp_path: Path):
    values = {**MINIMAL, "optimizer": {"kind": "prodigy", "lr": 0.5}}
    found = origins_of(tmp_path, values)
    assert (found["optimizer.lr"], found["optimizer.text_encoder_lr"]) == ("file", "rule")
    write_config(config_of(), tmp_path / "complete.toml")
    _, found = read_with_provenance(tmp_path / "complete.toml", ["adapter.unet=false"])
    assert (found["adapter.unet"], found["optimizer.lr"]) == ("--set", "rule")


def test_provenance_of_plain_values():
    config = validate(MINIMAL, overrides=["seed=1"])
    found = provenance(recipe_of(MINIMAL), MINIMAL, ["seed=1"], config)
    assert {dotted for dotted, origin in found.items() if origin != "default"} == {"name", "data.0.path", "seed"}


def test_merge_lays_tables_over_tables_and_replaces_anything_else():
    under = {"a": {"x": 1, "y": 1}, "b": [1, 2], "c": 1}
    assert merge(under, {"a": {"y": 2}, "b": [3], "d": 4}) == {"a": {"x": 1, "y": 2}, "b": [3], "c": 1, "d": 4}
    assert under == {"a": {"x": 1, "y": 1}, "b": [1, 2], "c": 1}


def test_what_was_merged_shares_nothing_with_what_it_was_merged_from():
    under, over = {"a": {"x": [1]}}, {"b": {"y": [2]}}
    merged = merge(under, over)
    merged["a"]["x"].append(3)
    merged["b"]["y"].append(4)
    assert (under, over) == ({"a": {"x": [1]}}, {"b": {"y": [2]}})


def test_overrides_leave_the_given_values_as_they_were():
    values = {**MINIMAL, "adapter": {"rank": 2}}
    before = copy.deepcopy(values)
    assert validate(values, overrides=["adapter.rank=4", "data.trigger=sks"]).adapter.rank == 4
    assert values == before


def test_set_value_changes_only_what_it_names():
    values = {"adapter": {"rank": 1, "alpha": 2}}
    set_value(values, "adapter.rank=8")
    assert values == {"adapter": {"rank": 8, "alpha": 2}}


# ---------------------------------------------------------------------------------------------------------------------
# files


def test_relative_data_paths_count_from_the_file_not_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "conf").mkdir()
    (tmp_path / "elsewhere").mkdir()
    file = write(tmp_path / "conf" / "run.toml", 'name = "x"\n[[data]]\npath = "photos"\n[[data]]\npath = "../other"\n')
    monkeypatch.chdir(tmp_path / "elsewhere")
    expected = [str((tmp_path / "conf" / "photos").resolve()), str((tmp_path / "other").resolve())]
    assert [data.path for data in read_config(file).data] == expected
    assert [data.path for data in read_config(Path("..", "conf", "run.toml")).data] == expected


def test_an_absolute_data_path_is_kept(tmp_path: Path):
    folder = tmp_path.resolve() / "photos"
    text = tomlkit.dumps({"name": "x", "data": [{"path": str(folder)}]})
    assert read_config(write(tmp_path / "run.toml", text)).data[0].path == str(folder)


def test_a_byte_order_mark_is_passed_over(tmp_path: Path):
    file = tmp_path / "run.toml"
    file.write_bytes(b'\xef\xbb\xbfname = "x"\r\n[[data]]\r\npath = "p"\r\n')
    assert read_config(file).name == "x"


def test_a_missing_file_says_how_to_write_one(tmp_path: Path):
    with pytest.raises(ConfigError) as caught:
        read_config(tmp_path / "no.toml")
    assert caught.value.problems == [
        Problem(str(tmp_path / "no.toml"), "no such file", "Write one with: lorasmith init FILE --images DIR")
    ]


def test_a_folder_in_place_of_the_file_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError) as caught:
        read_config(tmp_path)
    assert caught.value.problems == [
        Problem(str(tmp_path), "is a folder, not a configuration file", "Name a .toml file.")
    ]


def test_a_path_below_a_file_is_refused(tmp_path: Path):
    write(tmp_path / "file", "")
    with pytest.raises(ConfigError):
        read_config(tmp_path / "file" / "run.toml")


@pytest.mark.parametrize(
    "content",
    ['name = "\xe4"'.encode("latin-1"), 'name = "x"'.encode("utf-16")],
    ids=["latin-1", "utf-16"],
)
def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "run.toml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_config(tmp_path / "run.toml")
    [problem] = caught.value.problems
    assert problem.where == str(tmp_path / "run.toml")
    assert problem.what.startswith("is not UTF-8 text (")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('name = "x"\nseed = \n', 2),
        ('name = "x"\nname = "y"\n', 2),
        ("[adapter\n", 1),
        ('name = "x"\n\nwhen = 2024-13-45\n', 3),
    ],
    ids=["no value", "a key twice", "open bracket", "no such date"],
)
def test_invalid_toml_names_its_line(tmp_path: Path, text: str, line: int):
    with pytest.raises(ConfigError) as caught:
        read_config(write(tmp_path / "run.toml", text))
    [problem] = caught.value.problems
    assert problem.where == str(tmp_path / "run.toml")
    assert problem.what.startswith("is not valid TOML: ")
    assert f"line {line} " in problem.what


# ---------------------------------------------------------------------------------------------------------------------
# the fields, for those who show them


def test_settings_lists_each_setting_once_in_file_order():
    names = [dotted for dotted, _ in settings()]
    assert len(names) == len(set(names))
    assert names[:6] == ["name", "seed", "runs", "recipe", "base.model", "base.vae"]
    assert names[-1] == "runtime.cache"
